"""Former names in stored files: adapters, plans, settings and certificates that were written by commit d665cba."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

NAMES = {
    "redrawn": "reinitialized",  # adapter_config.json
    "of": "relative_to",  # plan.json
    "rates": "learning_rates",
    "tried": "num_tried",  # certificates
    "own": "source_task",  # settings.json of the trajectory commands
    "full": "modules_to_save",
}
"""Present names of options by their former ones."""

VALUES = {"target_modules": {"vectors": "norms-and-biases"}}
"""Present values by their former ones, of options by their present names."""

Config = TypeVar("Config", bound=type)


def renamed(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the former names in the contents of a file. Values are translated where a former name stands."""
    found = {NAMES.get(name, name): value for name, value in stored.items()}
    if NAMES.keys() & stored.keys():
        for name, values in VALUES.items():
            if isinstance(found.get(name), str):
                found[name] = values.get(found[name], found[name])
    return found


def as_stored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Translate settings back to the former names: the keys of stored rows are digests that include them."""
    former = {present: name for name, present in NAMES.items()}
    return {former.get(name, name): value for name, value in settings.items()}


def reads_stored_options(config: Config) -> Config:
    """Let a PEFT configuration class accept what files hold: former names, and the keyword-only fields.

    PEFT passes the contents of a file to the constructor. Unlike users, files also give `peft_type`.
    """
    known: Any = config
    original = known.__init__
    stored = [field.name for field in dataclasses.fields(known) if field.kw_only]

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if "peft_type" in kwargs:
            kwargs = renamed(kwargs)
        elif passed := [name for name in stored if name in kwargs]:
            raise TypeError(
                f"{', '.join(passed)} cannot be passed: attaching or loading an adapter sets it. Leave it out."
            )
        original(self, *args, **kwargs)

    # PEFT looks here for names that it may pass when a file holds others that it does not know.
    signature, kind = inspect.signature(original), inspect.Parameter.KEYWORD_ONLY
    former = [name for name, present in NAMES.items() if present in signature.parameters.keys() - NAMES.keys()]
    parameters = [*signature.parameters.values(), *(inspect.Parameter(name, kind, default=None) for name in former)]
    known.__init__, __init__.__signature__ = __init__, signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return config
