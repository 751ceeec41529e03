"""Tasks on text: where the data are, what is to be learnt of them, and the score."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset

from .metrics import METRICS, load_metric, parts, script
from .options import TextOptions
from .problems import Checks
from .rows import LINES, Row, Source, file_rows

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

TASK_TYPES = ("SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM")
"""As PEFT names them: classify or rate texts; classify each word; predict the next token."""

IGNORED = -100
"""The label of a token that is not scored, as torch's cross entropy has it."""


@dataclass(frozen=True)
class Task:
    """Data, columns, metric.

    Args:
        data: splits `train` and `eval`.
        columns: of the one or two texts; of lists of words for TOKEN_CLS.
        label: its column; None for CAUSAL_LM.
        metric: the name of one (`load_metric`), or `loss`. One of numbers makes it a regression.
        task_type: one of `TASK_TYPES`.
    """

    data: DatasetDict
    columns: tuple[str, ...]
    label: str | None
    metric: str
    task_type: str = "SEQ_CLS"

    @property
    def regression(self) -> bool:
        """Whether a number is to be predicted."""
        return self.metric != "loss" and load_metric(self.metric).numbers

    def labels(self, split: str) -> list[Any]:
        """All labels of a split, word by word for TOKEN_CLS."""
        found = self.data[split][self.label]
        return list(chain.from_iterable(found)) if self.task_type == "TOKEN_CLS" else list(found)

    @cached_property
    def classes(self) -> list[Any]:
        """The labels that occur in training, sorted; empty for a regression and for CAUSAL_LM."""
        return [] if self.regression or self.label is None else sorted(set(self.labels("train")))

    def name(self, label: Any) -> str:
        """What a class is called: its name in a dataset that has names for its numbers, or the label itself."""
        feature = next(iter(self.data.values())).features[str(self.label)]
        feature = getattr(feature, "feature", feature)  # of words in lists
        return feature.int2str(label) if isinstance(feature, ClassLabel) else str(label)

    def head(self, labels: int | None = None) -> dict[str, Any]:
        """Arguments of `from_pretrained` for a head of the task's classes by name, or of more labels than those."""
        if self.label is None or self.regression:
            return {} if self.label is None else {"num_labels": 1}
        names = [self.name(label) for label in self.classes]
        names += [f"LABEL_{i}" for i in range(len(names), labels or 0)]
        return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}

    def numbers(self, split: str) -> np.ndarray:
        """The labels of a split as the Trainer has them: numbers, or indexes into `classes`; of words, in rows."""
        if self.regression:
            return np.array(self.labels(split), dtype=float)
        index = {label: i for i, label in enumerate(self.classes)}
        if self.task_type != "TOKEN_CLS":
            return np.array([index[label] for label in self.labels(split)])
        rows = [[index[label] for label in row] for row in self.data[split][self.label]]
        width = max(map(len, rows))
        return np.array([row + [IGNORED] * (width - len(row)) for row in rows])

    @cached_property
    def sign(self) -> int:
        """-1 where less is better, as of a loss or an error, else 1: right answers are better than wrong ones.

        Raises:
            ValueError: the metric scores them alike, or does not fit the data.
        """
        if self.metric in METRICS:
            return 1
        if self.metric == "loss":
            return -1
        labels = self.numbers("eval")
        wrong = labels.min() + labels.max() - labels if self.regression else (labels + 1) % len(self.classes)
        right, worse = self._value(labels, labels), self._value(labels, np.where(labels == IGNORED, labels, wrong))
        if not (right < worse or right > worse):
            raise ValueError(
                f"metric={self.metric!r} (--metric) gives right answers {right:g} and wrong ones {worse:g}: it does "
                "not tell them apart on the held-out data."
            )
        return 1 if right > worse else -1

    @cached_property
    def best(self) -> float | None:
        """The score of right answers: 1 by a built-in metric, whatever the data; None for a loss."""
        if self.label is None:
            return None
        if self.metric in METRICS:
            return 1.0
        labels = self.numbers("eval")
        return round(self.score(labels, labels), 6)  # its last digits are not the same on every machine

    def score(self, labels: np.ndarray, answers: np.ndarray) -> float:
        """The metric, or minus it where less is better, of numbers or of indexes into `classes`.

        Of more than two classes it is the mean over them where the metric is one of a single class.
        """
        return self.sign * self._value(labels, answers)

    def _value(self, labels: np.ndarray, answers: np.ndarray) -> float:
        found = load_metric(self.metric)
        kept = labels != IGNORED if labels.ndim > 1 else np.full(len(labels), True)
        if not found.rows:
            return float(found.compute(labels[kept], answers[kept], self.classes))
        right, given = ([row[here] for row, here in zip(rows, kept, strict=True)] for rows in (labels, answers))
        return float(found.compute(right, given, self.classes))

    def majority(self) -> float | None:
        """The score of one answer to everything, the most frequent class or the mean of the training split.

        None for CAUSAL_LM, and where the metric gives a constant no finite score.
        """
        if self.label is None:
            return None
        train, labels = self.numbers("train"), self.numbers("eval")
        one = train.mean() if self.regression else np.bincount(train[train != IGNORED]).argmax()
        score = self.score(labels, np.full(labels.shape, one))
        return score if math.isfinite(score) else None


def load_task(options: TextOptions) -> Task:
    """The task that the options name: of GLUE, the files `train` and `eval`, or splits of a dataset of the Hub.

    Raises:
        ValueError: an option does not fit the data; the message names it.
        ImportError: the metric is one of `evaluate`, which is missing.
    """
    if options.task is None:
        shared = (options.columns, options.label, options.metric, options.task_type, options.dataset)
        return files(str(options.train), str(options.eval), *shared)
    if options.task_type != "SEQ_CLS":
        raise ValueError(f"task_type={options.task_type!r}: the tasks of GLUE are SEQ_CLS. Name files for others.")
    return glue(options.task, options.metric)


def glue(task: str, metric: str | None = None) -> Task:
    """A task of GLUE from the Hub, by its own metric unless another is given.

    Raises:
        ValueError: no such task or metric.
    """
    name = task.removeprefix("glue/")
    if name not in GLUE:
        raise ValueError(f"task={task!r} is unknown. Known are {', '.join(f'glue/{known}' for known in GLUE)}.")
    columns, own = GLUE[name]
    metric = _check_metric(metric or own, "SEQ_CLS")
    data = load_dataset("nyu-mll/glue", name)
    held_out = data["validation_matched" if name == "mnli" else "validation"]
    splits = {"train": data["train"], "eval": held_out}
    checks = Checks(columns, "label", "SEQ_CLS", metric if load_metric(metric).numbers else None)
    checks.run([_rows(f"{name}'s {split} split", part, [*columns, "label"], "label") for split, part in splits.items()])
    return Task(DatasetDict(splits), columns, "label", metric)


def files(
    train: str,
    eval: str,
    columns: Sequence[str],
    label: str | None = "label",
    metric: str | None = None,
    task_type: str = "SEQ_CLS",
    dataset: str | None = None,
) -> Task:
    """A task from local files (CSV, TSV, JSON lines, Parquet), by accuracy, or loss for CAUSAL_LM, unless told.

    With `dataset`, a name on the Hub, or `NAME:CONFIGURATION`, `train` and `eval` name its splits.

    Raises:
        ValueError: the metric is unknown, or the data cannot be used; the message names up to ten errors, with the
            lines of the file, or rows where it has none.
    """
    if task_type == "CAUSAL_LM":
        label, metric = None, metric or "loss"
        if metric != "loss":
            raise ValueError(f"metric={metric!r}: a causal language model is measured by its loss.")
    else:
        metric = _check_metric(metric or "accuracy", task_type)
    if len(columns) not in ((1, 2) if task_type == "SEQ_CLS" else (1,)):
        raise ValueError(f"text={list(columns)}: name one column, or two for pairs of sentences (SEQ_CLS).")
    if label in columns:
        raise ValueError(f"label={label!r} (--label) is a column of the text too.")
    if unknown := [path for path in (train, eval) if not dataset and Path(path).suffix not in READERS]:
        raise ValueError(f"{', '.join(unknown)}: the ending must be one of {', '.join(READERS)}.")
    loaded = {path: _load(path, dataset) for path in (train, eval) if dataset or Path(path).suffix not in LINES}
    checks = Checks(columns, label, task_type, metric if label and load_metric(metric).numbers else None)
    kept = [*columns, *([label] if label else [])]
    checks.run(
        [_rows(path, loaded[path], kept, label) if path in loaded else file_rows(path) for path in (train, eval)]
    )
    splits = {}
    for split, path in (("train", train), ("eval", eval)):
        data = loaded[path] if path in loaded else _load(path, None)
        if label and isinstance(data.features[label], ClassLabel):  # -1 stands for none, as in SNLI
            data = data.filter(lambda value: value >= 0, input_columns=label)
        splits[split] = data.select_columns(kept)
    return Task(DatasetDict(splits), tuple(columns), label, metric, task_type)


def _rows(path: str, data: Dataset, kept: Sequence[str], label: str | None) -> Source:
    """The rows of a split, but for those without a class."""
    some = data.select_columns([column for column in kept if column in data.column_names])
    classes = label in some.features and isinstance(some.features[label], ClassLabel)

    def rows() -> Iterator[Row]:
        batches = (zip(*batch.values(), strict=True) for batch in some.iter(1000))
        for i, values in enumerate(chain.from_iterable(batches), 1):
            row = dict(zip(some.column_names, values, strict=True))
            if not (classes and row[label] == -1):
                yield i, row

    return Source(path, rows(), data.column_names, unit="row")


def _load(path: str, dataset: str | None) -> Dataset:
    if dataset:
        name, _, configuration = dataset.partition(":")
        try:
            return load_dataset(name, configuration or None, split=path)
        except Exception as error:  # of the Hub, the network, the dataset
            raise ValueError(f"split {path!r} of dataset={dataset!r} (--dataset) cannot be read: {error}") from error
    reader = READERS[Path(path).suffix]
    # Only an empty cell is missing: None and NA may be classes, or texts.
    options: dict[str, Any] = {"keep_default_na": False, "na_values": [""]} if reader == "csv" else {}
    if path.endswith(".tsv"):
        options |= {"sep": "\t", "quoting": csv.QUOTE_NONE}
    try:
        return load_dataset(reader, data_files=str(path), split="train", **options)
    except FileNotFoundError:
        raise
    except Exception as error:  # each reader has its own
        raise ValueError(
            f"{path} cannot be read: {_cause(error)}. Is it {Path(path).suffix[1:].upper()} in UTF-8, with as many "
            "cells in each row as its head has?"
        ) from error


def _cause(error: BaseException) -> str:
    """What a chain of errors began with: `datasets` says only that generating failed."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return f"{type(error).__name__}: {error}"


def _check_metric(metric: str, task_type: str) -> str:
    found = load_metric(metric)
    if found.numbers and task_type != "SEQ_CLS":
        raise ValueError(f"metric={metric!r} is for texts (SEQ_CLS), not for {task_type}.")
    if found.rows and task_type != "TOKEN_CLS":
        raise ValueError(f"metric={metric!r} is for lists of words (TOKEN_CLS), not for {task_type}.")
    path, key = script(metric), parts(metric)[1]
    return f"{path}:{key}".rstrip(":") if path else metric  # absolute: other processes may run elsewhere
