"""Trials on text: one or two sentences in, a class or a number out, trained with transformers' Trainer."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from peft import get_peft_model
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from ..tuner import IntrinsicConfig

METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "matthews": matthews_corrcoef,
    "spearman": lambda labels, answers: float(spearmanr(labels, answers).statistic),
}
"""Scores of (labels, answers), higher is better."""

GLUE: dict[str, tuple[tuple[str, ...], str]] = {
    "cola": (("sentence",), "matthews"),
    "sst2": (("sentence",), "accuracy"),
    "mrpc": (("sentence1", "sentence2"), "accuracy"),
    "stsb": (("sentence1", "sentence2"), "spearman"),
    "qqp": (("question1", "question2"), "accuracy"),
    "mnli": (("premise", "hypothesis"), "accuracy"),
    "qnli": (("question", "sentence"), "accuracy"),
    "rte": (("sentence1", "sentence2"), "accuracy"),
    "wnli": (("sentence1", "sentence2"), "accuracy"),
}
"""Text columns and metric of each task. MRPC and QQP by accuracy, as Aghajanyan et al. report them."""

READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Text:
    """A task: data, columns, metric.

    Args:
        data: splits `train` and `eval`.
        columns: of the one or two texts.
        label: its column; numbers with a fraction, or the metric Spearman, make it a regression.
        metric: a key of `METRICS`.
    """

    data: DatasetDict
    columns: tuple[str, ...]
    label: str
    metric: str

    @property
    def regression(self) -> bool:
        """Whether a number is to be predicted."""
        return self.metric == "spearman"

    @property
    def classes(self) -> list[Any]:
        """The labels that occur in training, sorted; empty for a regression."""
        return [] if self.regression else sorted(set(self.data["train"][self.label]))

    def majority(self) -> float | None:
        """The score of always answering the most frequent class of the training split; None for a regression."""
        if self.regression:
            return None
        index = {label: i for i, label in enumerate(self.classes)}
        most = np.bincount([index[label] for label in self.data["train"][self.label]]).argmax()
        labels = np.array([index[label] for label in self.data["eval"][self.label]])
        return float(METRICS[self.metric](labels, np.full(len(labels), most)))


def glue(task: str) -> Text:
    """A task of GLUE from the Hub.

    Raises:
        ValueError: no such task.
    """
    name = task.removeprefix("glue/")
    if name not in GLUE:
        raise ValueError(f"task={task!r} is unknown. Known are {', '.join(f'glue/{known}' for known in GLUE)}.")
    columns, metric = GLUE[name]
    data = load_dataset("nyu-mll/glue", name)
    held_out = data["validation_matched" if name == "mnli" else "validation"]
    return Text(DatasetDict({"train": data["train"], "eval": held_out}), columns, "label", metric)


def files(train: str, held_out: str, columns: Sequence[str], label: str, metric: str) -> Text:
    """A task from local files (CSV, TSV, JSON lines, Parquet).

    Raises:
        ValueError: a column is missing, a split is empty, labels do not fit, or the metric is unknown.
    """
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r} is unknown. Known are {', '.join(METRICS)}.")
    if len(columns) not in (1, 2):
        raise ValueError(f"text={list(columns)}: name one column, or two for pairs of sentences.")
    splits: dict[str, Dataset] = {}
    for split, path in (("train", train), ("eval", held_out)):
        reader = READERS.get(Path(path).suffix)
        if reader is None:
            raise ValueError(f"{path}: the ending must be one of {', '.join(READERS)}.")
        options: dict[str, Any] = {"sep": "\t"} if path.endswith(".tsv") else {}
        data = load_dataset(reader, data_files=str(path), split="train", **options)
        if not len(data):
            raise ValueError(f"{path} holds no rows.")
        for column in (*columns, label):
            if column not in data.column_names:
                raise ValueError(f"{path} has no column {column!r}. It has {', '.join(data.column_names)}.")
        splits[split] = data
    task = Text(DatasetDict(splits), tuple(columns), label, metric)
    unseen = set() if task.regression else set(task.data["eval"][label]) - set(task.classes)
    if unseen:
        raise ValueError(f"{held_out} has labels that {train} lacks: {sorted(unseen)[:5]}.")
    if not task.regression and len(task.classes) < 2:
        raise ValueError(f"{train}: every row has the same label, {task.classes[0]!r}.")
    return task


class TextFit:
    """`fit(d, seed, learning_rate)` for `measure_intrinsic_dimension`.

    The data are tokenised once, and the base model is loaded once: a trial attaches an adapter and takes it off again.
    Full fine-tuning starts from the same weights and the same fresh head, on a copy.

    Args:
        model: name or folder of a pretrained encoder or decoder.
        task: what to learn.
        said: a learned scale per layer.
        max_length: tokens of an input.
        patience: evaluations without a better score after which a trial stops; None trains to the end.
        arguments: of `TrainingArguments`, for every trial.
    """

    def __init__(
        self,
        model: str,
        task: Text,
        said: bool = False,
        max_length: int = 128,
        patience: int | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self.task, self.said, self.patience = task, said, patience
        self.arguments = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, **(arguments or {})}
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        index = {label: i for i, label in enumerate(task.classes)}

        def tokenise(rows: Mapping[str, list[Any]]) -> dict[str, Any]:
            texts = [rows[column] for column in task.columns]
            labels = [float(v) if task.regression else index[v] for v in rows[task.label]]
            return {**self.tokenizer(*texts, truncation=True, max_length=max_length), "labels": labels}

        self.data = task.data.map(tokenise, batched=True, remove_columns=task.data["train"].column_names)
        self.base = AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=1 if task.regression else len(task.classes), dtype="float32"
        )
        self.base.config.pad_token_id = self.tokenizer.pad_token_id
        # A fresh head is drawn from a fixed stream when an adapter is attached: let full training start there too.
        get_peft_model(self.base, self.config(1000, 0)).unload()

    def config(self, d: int, seed: int) -> IntrinsicConfig:
        """The adapter of a trial."""
        return IntrinsicConfig(d=d, seed=seed, said=self.said, task_type="SEQ_CLS")

    def scored(self, prediction: Any) -> dict[str, float]:
        """The metric, from the Trainer's predictions."""
        found = prediction.predictions
        answers = found.squeeze(-1) if self.task.regression else found.argmax(-1)
        return {"score": float(METRICS[self.task.metric](prediction.label_ids, answers))}

    def __call__(self, d: int | None, seed: int, learning_rate: float) -> float:
        model: Any
        if d is None:
            model = copy.deepcopy(self.base).requires_grad_(True)  # detaching an adapter leaves the base frozen
        else:
            model = get_peft_model(self.base, self.config(d, seed))
        stop = {} if self.patience is None else self.stopping()
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                **{"output_dir": folder, "learning_rate": learning_rate, "seed": seed, **self.arguments, **stop}
            )
            trainer = Trainer(
                model=model,
                args=arguments,
                train_dataset=self.data["train"],
                eval_dataset=self.data["eval"],
                data_collator=DataCollatorWithPadding(self.tokenizer),
                compute_metrics=self.scored,
                callbacks=[] if self.patience is None else [EarlyStoppingCallback(self.patience)],
            )
            trainer.remove_callback(PrinterCallback)
            try:
                trainer.train()
                return trainer.evaluate()["eval_score"]
            finally:
                if d is not None:
                    model.unload()

    @staticmethod
    def stopping() -> dict[str, Any]:
        """What early stopping asks of the Trainer."""
        return {
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "save_total_limit": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "score",
        }
