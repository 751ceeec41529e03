"""Registration with PEFT, as an external package."""

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
from .names import VECTOR


def _add_peft_type(name: str) -> PeftType:
    """Get the member of that name, such as `PeftType.INTRINSIC`. Add it to the enumeration if it is missing."""
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


def _exclude_vector() -> None:
    """Let PEFT's `get_base_model_state_dict` and its counterpart leave out θ and λ.

    They look for adapters inside tuner layers. `IntrinsicVector` is none, or PEFT's LoRA conversion would convert it.
    """
    original = getattr(save_and_load, "_get_adapter_state_dict_key_prefixes", None)
    if original is None or getattr(original, "excludes_vector", False):
        return

    @functools.wraps(original)
    def prefixes(model: Any) -> set[str]:
        return original(model) | ({VECTOR} if isinstance(model.base_model, IntrinsicModel) else set())

    prefixes.excludes_vector = True  # type: ignore[attr-defined]
    save_and_load._get_adapter_state_dict_key_prefixes = prefixes


def register_method(name: str, config: Any, model: Any) -> None:
    """Register a method of this package with PEFT. Calling it again changes nothing.

    Args:
        name: of its `PeftType`, such as `"INTRINSIC"`.
        config: its configuration class.
        model: its tuner class.

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
    """Register `IntrinsicConfig` and `IntrinsicModel` with PEFT, and make transformers note new parameters.

    Importing `peft_intrinsic` calls it. Calling it again changes nothing.

    Raises:
        RuntimeError: PEFT already has another method of this name.
    """
    register_method("INTRINSIC", IntrinsicConfig, IntrinsicModel)
    _exclude_vector()
    watch(PreTrainedModel)
