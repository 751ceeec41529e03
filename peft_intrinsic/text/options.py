"""What the trials of a text task depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..trials.store import key
from .metrics import parts, script

MODEL_FILES = (".json", ".txt", ".model", ".safetensors", ".bin")
"""Of a model's folder: configuration, tokenizer and weights."""


@dataclass(frozen=True)
class TextOptions:
    """A model, a task, and how it is trained.

    Args:
        model: name on the Hub, or folder.
        task: of GLUE; or None for the files `train` and `eval`.
        train, eval: CSV, TSV, JSON lines or Parquet; or names of splits of `dataset`.
        dataset: on the Hub, `NAME` or `NAME:CONFIGURATION`.
        columns: of one text, or of two.
        label: its column.
        metric: see `load_metric`; None is the task's own.
        task_type: one of `TASK_TYPES`.
        method: what is trained, a key of `METHODS`.
        max_length: tokens of an input.
        patience: evaluations without a better score after which a trial stops; None trains to the end.
        arguments: of transformers' `TrainingArguments`.
        train_score: score the training data too.
    """

    model: str
    task: str | None = None
    train: str | None = None
    eval: str | None = None
    dataset: str | None = None
    columns: tuple[str, ...] = ("text",)
    label: str | None = "label"
    metric: str | None = None
    task_type: str = "SEQ_CLS"
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
            raise ValueError(f"name either a task of GLUE (--task, got {self.task}) or a dataset (--dataset).")
        if (self.task is None) == (self.train is None or self.eval is None):
            raise ValueError("name either a task of GLUE (--task), or both train and eval (--train, --eval).")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def settings(options: TextOptions) -> dict[str, Any]:
    """What the trials depend on: the options, with files by name and content instead of by place."""
    found = options.to_dict()
    found |= {name: named(Path(found[name])) for name in places(options)}
    metric = options.metric or ""
    if path := script(metric):
        found["metric"] = ":".join(filter(None, (named(path), parts(metric)[1])))
    return found


def places(options: TextOptions) -> list[str]:
    """Which options name a file or folder that is here; splits of a dataset do not."""
    names = ("model",) if options.dataset else ("model", "train", "eval")
    return [name for name in names if getattr(options, name) and Path(getattr(options, name)).exists()]


def named(path: Path) -> str:
    """A file or a model's folder by its name and a digest of its content."""
    files = sorted(file for file in path.iterdir() if file.suffix in MODEL_FILES) if path.is_dir() else [path]
    found = hashlib.sha256()
    for place in files:
        with place.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return f"{path.name}, sha256 {found.hexdigest()}"


def tokens_name(options: TextOptions) -> str:
    """A name for the tokenised data."""
    names = ("model", "task", "train", "eval", "dataset", "columns", "label", "task_type", "metric", "max_length")
    return key({name: value for name, value in settings(options).items() if name in names})
