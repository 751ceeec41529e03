"""Registration with PEFT, from outside its tree."""

from __future__ import annotations

import functools
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method, save_and_load
from peft.utils.peft_types import PeftType

from .config import IntrinsicConfig
from .head import watch_loading
from .model import IntrinsicModel
from .targets import HOLDER

NAME = "INTRINSIC"


def _add_peft_type() -> PeftType:
    """The member `PeftType.INTRINSIC`, added to the enumeration when it is not there yet."""
    if NAME in PeftType.__members__:
        return PeftType.__members__[NAME]
    enumeration: Any = PeftType
    member: Any = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(enumeration._member_names_)
    enumeration._member_names_.append(NAME)
    enumeration._member_map_[NAME] = member
    enumeration._value2member_map_[NAME] = member
    if hasattr(enumeration, "_hashable_values_"):  # Python ≥ 3.12
        enumeration._hashable_values_.append(NAME)
    if NAME not in PeftType.__dict__:
        type.__setattr__(PeftType, NAME, member)
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


def register() -> None:
    """Make PEFT know `IntrinsicConfig` and `IntrinsicModel`, and transformers note what a checkpoint did not bring.

    Importing `peft_intrinsic` calls it; again is harmless.

    Raises:
        RuntimeError: PEFT already has another method of this name.
    """
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(_add_peft_type())
    if known is None:
        register_peft_method(name=NAME.lower(), config_cls=IntrinsicConfig, model_cls=IntrinsicModel)
    elif known is not IntrinsicConfig:
        raise RuntimeError(
            f"PEFT already has a method {NAME} ({known.__module__}.{known.__qualname__}). Use one or the other."
        )
    _know_the_holder()
    watch_loading()
