"""Options of a text task, and the transformers `TrainingArguments` of its trials."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from ..trials.store import hash_configuration
from .metrics import find_script, split_name

TaskType = Literal["SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM"]
"""Task types as PEFT names them: classify texts, or predict a value; classify each word; predict the next token."""

MODEL_FILES = (".json", ".txt", ".model", ".safetensors", ".bin")
"""Suffixes in a model's folder: configuration, tokenizer and weights."""

DEVICE_OPTIONS = ("bf16", "fp16", "tf32", "deepspeed", "fsdp", "torch_compile")
"""Prefixes of `TrainingArguments` that only the device of the trials can check."""


@dataclass(frozen=True)
class TextOptions:
    """Model, task, and training of the trials.

    Args:
        model: Name on the Hub, or folder.
        task: GLUE task, such as `glue/mrpc`; None for the files `train` and `eval`.
        train, eval: CSV, TSV, JSON lines or Parquet files; with `dataset` names of its splits.
        dataset: Dataset on the Hub, `NAME` or `NAME:CONFIGURATION`.
        columns: Columns of one text, or of two.
        label: Column of the label.
        metric: Name for `load_metric`; None for the task's own.
        task_type: PEFT's name of the task type.
        method: What is trained, a key of `METHODS`.
        max_length: Tokens of an input.
        patience: Evaluations without a better score after which a trial stops; None trains to the end.
        arguments: `TrainingArguments` of every trial.
        train_score: Score the training data too.

    Raises:
        ValueError: An option cannot work; the message names it.
    """

    model: str
    task: str | None = None
    train: str | None = None
    eval: str | None = None
    dataset: str | None = None
    columns: tuple[str, ...] = ("text",)
    label: str | None = "label"
    metric: str | None = None
    task_type: TaskType = "SEQ_CLS"
    method: str = "did"
    max_length: int = 128
    patience: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    train_score: bool = False

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"max_length (--max-length) must be at least 1, got {self.max_length}.")
        if self.patience is not None and self.patience < 1:
            raise ValueError(
                f"patience (--patience) must be at least 1, got {self.patience}. Leave it out to train to the end."
            )
        if self.task is not None and self.dataset is not None:
            raise ValueError(f"name either a GLUE task (--task, got {self.task}) or a dataset (--dataset).")
        if self.task is None and (self.train is None or self.eval is None):
            raise ValueError("name either a GLUE task (--task), or both train and eval (--train, --eval).")
        own = {"train": None, "eval": None, "label": "label"}
        if self.task and (given := [name for name in own if getattr(self, name) != own[name]]):
            raise ValueError(
                f"{given[0]}={getattr(self, given[0])!r} (--{given[0]}) does not go with task={self.task!r} (--task), "
                "which has its own data. Leave one of them out."
            )

    def to_settings(self) -> dict[str, Any]:
        """Describe what the trials depend on: the options, with local files by name and digest instead of path."""
        settings = asdict(self) | ({"adapts_head": True} if self.method == "default" else {})
        settings |= {name: name_with_digest(Path(settings[name])) for name in self.local_files}
        metric = self.metric or ""
        if path := find_script(metric):
            settings["metric"] = ":".join(filter(None, (name_with_digest(path), split_name(metric)[1])))
        return settings

    @property
    def local_files(self) -> list[str]:
        """Options that name an existing file or folder. Splits of a dataset do not."""
        names = ("model",) if self.dataset else ("model", "train", "eval")
        return [name for name in names if getattr(self, name) and Path(getattr(self, name)).exists()]

    @property
    def tokens_name(self) -> str:
        """File name for the tokenized data."""
        names = ("model", "task", "train", "eval", "dataset", "columns", "label", "task_type", "metric", "max_length")
        return hash_configuration({name: value for name, value in self.to_settings().items() if name in names})


def name_with_digest(path: Path) -> str:
    """Describe a file, or the folder of a model, by its name and the SHA-256 of its contents."""
    files = sorted(file for file in path.iterdir() if file.suffix in MODEL_FILES) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for name in files:
        with name.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"{path.name}, sha256 {digest.hexdigest()}"


def complete_arguments(arguments: Mapping[str, Any], best: str | None = None) -> dict[str, Any]:
    """Add the defaults of a trial to `TrainingArguments`, and convert values that YAML read as text.

    `best` is the metric of early stopping; None trains to the end.

    Raises:
        ValueError: `TrainingArguments` has no such argument, each trial sets it, or it is not a number.
    """
    defaults = {field.name: field.default for field in fields(TrainingArguments)}
    unknown = sorted(set(arguments) - set(defaults))
    if unknown:
        raise ValueError(f"transformers' TrainingArguments have no {', '.join(unknown)}.")
    own = sorted({"learning_rate", "seed", "output_dir"} & set(arguments))
    if own:
        raise ValueError(
            f"{', '.join(own)}: set by each trial. For learning rates to try: --full-learning-rates, --learning-rates."
        )
    complete: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    complete["dataloader_pin_memory"] = torch.accelerator.is_available()
    if best:
        complete |= {"eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 1}
        complete |= {"load_best_model_at_end": True, "metric_for_best_model": best}
    return complete | {name: _convert_number(name, value, defaults[name]) for name, value in arguments.items()}


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Check whether a Trainer accepts the arguments. `DEVICE_OPTIONS` are left to the device of the trials.

    Raises:
        ValueError: It does not; the message names the argument.
    """
    arguments = {name: value for name, value in arguments.items() if not name.startswith(DEVICE_OPTIONS)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = TrainingArguments(**{"output_dir": folder, **arguments, "use_cpu": True})
            get_reporting_integration_callbacks(made.report_to)
        except (ValueError, TypeError, ImportError) as error:
            raise ValueError(f"TrainingArguments (--config, --epochs, --batch-size) cannot work: {error}") from None
    if made.max_steps <= 0 and not made.num_train_epochs > 0:
        raise ValueError(f"num_train_epochs (--epochs) must be above 0, got {made.num_train_epochs}.")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        if getattr(made, name) < 1:
            raise ValueError(f"{name} (--batch-size) must be at least 1, got {getattr(made, name)}.")


def _convert_number(name: str, value: Any, default: Any) -> Any:
    if isinstance(value, int | float) or isinstance(default, bool) or not isinstance(default, int | float):
        return value
    try:  # YAML reads 1e-2 as text
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r} of the TrainingArguments is not a number.") from None
    return int(number) if isinstance(default, int) and number.is_integer() else number
