"""Options of transformers' Trainer, as a YAML file or a user gives them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

OF_DEVICES = ("bf16", "fp16", "tf32", "deepspeed", "fsdp", "torch_compile")
"""What the names of such options begin with."""


def checked(arguments: Mapping[str, Any], best: str | None = None) -> dict[str, Any]:
    """The arguments of a trial, numbers as numbers.

    Args:
        arguments: those that were asked for.
        best: what early stopping goes by; None trains to the end.

    Raises:
        ValueError: `TrainingArguments` have no such option, it is one of each trial, or it is not a number.
    """
    defaults = {field.name: field.default for field in fields(TrainingArguments)}
    unknown = sorted(set(arguments) - set(defaults))
    if unknown:
        raise ValueError(f"transformers' TrainingArguments have no {', '.join(unknown)}.")
    own = sorted({"learning_rate", "seed", "output_dir"} & set(arguments))
    if own:
        raise ValueError(
            f"{', '.join(own)}: set by each trial. For learning rates to try: --full-learning-rates and "
            "--learning-rates."
        )
    found: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    found["dataloader_pin_memory"] = torch.accelerator.is_available()
    if best:
        found |= {
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "save_total_limit": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": best,
        }
    return found | {name: _number(name, value, defaults[name]) for name, value in arguments.items()}


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Whether a Trainer could begin with them; what depends on the device is left to those who train.

    Raises:
        ValueError: it could not.
    """
    asked = {name: value for name, value in arguments.items() if not name.startswith(OF_DEVICES)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = TrainingArguments(**{"output_dir": folder, **asked, "use_cpu": True})
            get_reporting_integration_callbacks(made.report_to)
        except (ValueError, TypeError, ImportError) as error:
            raise ValueError(f"TrainingArguments (--config, --epochs, --batch) cannot work: {error}") from None
    if made.max_steps <= 0 and not made.num_train_epochs > 0:
        raise ValueError(f"num_train_epochs (--epochs) must be above 0, got {made.num_train_epochs}.")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        if getattr(made, name) < 1:
            raise ValueError(f"{name} (--batch) must be at least 1, got {getattr(made, name)}.")


def _number(name: str, value: Any, default: Any) -> Any:
    if isinstance(value, int | float) or isinstance(default, bool) or not isinstance(default, int | float):
        return value
    try:  # YAML takes 1e-2 for a text
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r} of the TrainingArguments is not a number.") from None
    return int(number) if isinstance(default, int) and number.is_integer() else number
