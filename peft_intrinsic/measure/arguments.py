"""Options of transformers' Trainer, as a YAML file or a user gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments


def checked(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, numbers as numbers.

    Raises:
        ValueError: `TrainingArguments` have no such option, it is one of each trial, or it is not a number.
    """
    defaults = {field.name: field.default for field in fields(TrainingArguments)}
    unknown = sorted(set(arguments) - set(defaults))
    if unknown:
        raise ValueError(f"transformers' TrainingArguments have no {', '.join(unknown)}.")
    own = sorted({"learning_rate", "seed", "output_dir"} & set(arguments))
    if own:
        raise ValueError(f"{', '.join(own)}: set by each trial. For learning rates to try: --full-rates and --rates.")
    return {name: _number(name, value, defaults[name]) for name, value in arguments.items()}


def _number(name: str, value: Any, default: Any) -> Any:
    if isinstance(value, int | float) or isinstance(default, bool) or not isinstance(default, int | float):
        return value
    try:  # YAML takes 1e-2 for a text
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r} of the TrainingArguments is not a number.") from None
    return int(number) if isinstance(default, int) and number.is_integer() else number
