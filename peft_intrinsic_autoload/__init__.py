"""Registers `peft_intrinsic` with PEFT in programs that never import it.

torch calls `start` at `import torch` (entry point `torch.backends`), which imports nothing. It extends two modules as
soon as they have been imported: the tables of `peft.mapping` then resolve the methods of this package on their first
use, and the models of `transformers.modeling_utils` note which parameters are missing from their checkpoint.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

METHODS = ("INTRINSIC", "SUPERMASK")
"""The values of `peft_type` that `peft_intrinsic` registers."""


class Table(dict):
    """One of PEFT's tables by `peft_type`, which imports `peft_intrinsic` when one of its methods is looked up."""

    def __missing__(self, key: Any) -> Any:
        if key in self:
            return self[key]
        raise KeyError(key)

    def __contains__(self, key: Any) -> bool:
        # While `peft_intrinsic` is being imported, the import does nothing and the method is not there yet.
        if key in METHODS and not super().__contains__(key):
            _register(key)
        return super().__contains__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        """The value of a method, or the default."""
        return super().get(key, default) if key in self else default


def _register(method: str) -> None:
    try:
        import peft_intrinsic  # noqa: F401
    except Exception as error:
        raise ImportError(
            f"peft_type={method!r} is a method of peft_intrinsic, which is installed but cannot be imported: {error}"
        ) from error


def _resolve_methods(mapping: Any) -> None:
    for table in ("CONFIG", "TUNER", "PREFIX"):
        name = f"PEFT_TYPE_TO_{table}_MAPPING"
        setattr(mapping, name, Table(getattr(mapping, name)))

    def missing(cls: Any, value: object) -> Any:
        if value not in METHODS:
            return None
        _register(str(value))
        return cls.__members__.get(value)

    mapping.PeftType._missing_ = classmethod(missing)


def _watch_loading(modeling: ModuleType) -> None:
    from .loading import watch

    watch(modeling.PreTrainedModel)


class Finder:
    """Calls functions, by the names of modules, with each module as soon as it has been imported."""

    def __init__(self, actions: dict[str, Callable[[Any], None]]) -> None:
        self._actions = actions

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find a module for `import`. Also act on modules whose import had started before `start` and has ended."""
        for waiting in list(self._actions):
            module = sys.modules.get(waiting)
            if module is not None and not getattr(module.__spec__, "_initializing", False):
                self._act(waiting, module)
        if name not in self._actions:
            return None
        others = (finder.find_spec(name, path, target) for finder in list(sys.meta_path) if finder is not self)
        spec = next(filter(None, others), None)
        if spec is not None:
            try:
                self._extend(spec.loader, name)
            except Exception as error:  # a loader of another kind
                self._actions.pop(name, None)
                _report(error)
        return spec

    def _extend(self, loader: Any, name: str) -> None:
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            if module.__name__ == name:  # a loader can serve several modules
                self._act(name, module)

        loader.exec_module = exec_module

    def _act(self, name: str, module: ModuleType) -> None:
        action = self._actions.pop(name, None)
        try:
            if action is not None:
                action(module)
        except Exception as error:
            _report(error)


def _report(error: Exception) -> None:
    import logging

    logging.getLogger(__name__).warning(
        "peft_intrinsic did not register itself with PEFT (%r). Import it before you load its adapters.", error
    )


def start() -> None:
    """Extend PEFT and transformers when they are imported, once. `PEFT_INTRINSIC_AUTOLOAD=0` switches this off."""
    try:
        if os.environ.get("PEFT_INTRINSIC_AUTOLOAD") == "0" or any(isinstance(each, Finder) for each in sys.meta_path):
            return
        actions: dict[str, Callable[[Any], None]] = {"transformers.modeling_utils": _watch_loading}
        if "peft.mapping" not in sys.modules:  # else PEFT's modules hold its tables already
            actions["peft.mapping"] = _resolve_methods
        sys.meta_path.insert(0, Finder(actions))
    except Exception as error:  # `import torch` must not fail
        _report(error)
