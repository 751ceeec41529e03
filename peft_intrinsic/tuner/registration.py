"""Registration with PEFT, from outside its tree."""

from __future__ import annotations

import functools
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method, save_and_load
from peft.utils.peft_types import PeftType
from transformers import PreTrainedModel

from peft_intrinsic_autoload.loading import watch

from .config import IntrinsicConfig
from .model import IntrinsicModel
from .names import HOLDER


def _add_peft_type(name: str) -> PeftType:
    """The member of that name, such as `PeftType.INTRINSIC`, added to the enumeration when it is not there yet."""
    if name in PeftType.__members__:
        return PeftType.__members__[name]
    enumeration: Any = PeftType
    member: Any = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(enumeration._member_names_)
    enumeration._member_names_.append(name)
    enumeration._member_map_[name] = member
    enumeration._value2member_map_[name] = member
    if hasattr(enumeration, "_hashable_values_"):  # Python ≥ 3.12
        enumeration._hashable_values_.append(name)
    if name not in PeftType.__dict__:
        type.__setattr__(PeftType, name, member)
    return member


def _know_the_holder() -> None:
    """Let PEFT's `get_base_model_state_dict` and its counterpart leave θ and λ out.

    They look for adapters inside tuner layers. The holder is none, or PEFT's LoRA conversion would convert it too.
    """
    original = getattr(save_and_load, "_get_adapter_state_dict_key_prefixes", None)
    if original is None or getattr(original, "knows_the_holder", False):
        return

    @functools.wraps(original)
    def prefixes(model: Any) -> set[str]:
        return original(model) | ({HOLDER} if isinstance(model.base_model, IntrinsicModel) else set())

    prefixes.knows_the_holder = True  # type: ignore[attr-defined]
    save_and_load._get_adapter_state_dict_key_prefixes = prefixes


def register_method(name: str, config: Any, model: Any) -> None:
    """Make PEFT know a method of this package; again is harmless.

    Args:
        name: of its `PeftType`.
        config, model: its classes.

    Raises:
        RuntimeError: PEFT already has another method of this name.
    """
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(_add_peft_type(name))
    if known is None:
        register_peft_method(name=name.lower(), config_cls=config, model_cls=model)
    elif known is not config:
        raise RuntimeError(
            f"PEFT already has a method {name} ({known.__module__}.{known.__qualname__}). Use one or the other."
        )


def register() -> None:
    """Make PEFT know `IntrinsicConfig` and `IntrinsicModel`, and transformers note what a checkpoint did not bring.

    Importing `peft_intrinsic` calls it; again is harmless.

    Raises:
        RuntimeError: PEFT already has another method of this name.
    """
    register_method("INTRINSIC", IntrinsicConfig, IntrinsicModel)
    _know_the_holder()
    watch(PreTrainedModel)
