"""Tasks on text: data, what is predicted, and the score."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]
from transformers import AutoConfig

from .checks import TEXT_FILES, Checks, Row, Source, read_rows
from .metrics import METRICS, find_script, load_metric, split_name
from .options import TaskType, TextOptions

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
"""Text columns and metric of each task. MRPC and QQP by accuracy, as Aghajanyan et al. (2020) report them."""

SUFFIXES = (*TEXT_FILES, ".parquet")

IGNORED = -100
"""Label of a token that is not scored, as in torch's cross-entropy."""


@dataclass(frozen=True)
class Task:
    """Data of a task and the metric of its predictions.

    Args:
        data: Splits `train` and `eval`.
        columns: Columns of the one or two texts; of lists of words for TOKEN_CLS.
        label: Column of the label; None for CAUSAL_LM.
        metric: Name for `load_metric`, or `loss`. A metric of floats makes the task a regression.
        task_type: PEFT's name of the task type.
        order: Names of the classes in the order of the model's head, where it is known.
    """

    data: DatasetDict
    columns: tuple[str, ...]
    label: str | None
    metric: str
    task_type: TaskType = "SEQ_CLS"
    order: tuple[str, ...] = ()

    @property
    def regression(self) -> bool:
        """Whether the model predicts a number."""
        return self.metric != "loss" and load_metric(self.metric).regression

    def labels(self, split: str) -> list[Any]:
        """All labels of a split; for TOKEN_CLS word by word."""
        labels = self.data[split][self.label]
        return list(chain.from_iterable(labels)) if self.task_type == "TOKEN_CLS" else list(labels)

    @cached_property
    def classes(self) -> list[Any]:
        """Labels of the training split, sorted; empty for a regression and for CAUSAL_LM.

        Where `order` has the names of them all, they have its order, and names that do not occur are among them.
        """
        if self.regression or self.label is None:
            return []
        found = sorted(set(self.labels("train")))
        named = {self.name_class(label): label for label in found}
        return [named.get(name, name) for name in self.order] if set(named) <= set(self.order) else found

    def name_class(self, label: Any) -> str:
        """Name a class as the dataset does, or by its label."""
        names = list_names(next(iter(self.data.values())).features[str(self.label)])
        return names[label] if names and not isinstance(label, str) else str(label)

    def head_options(self, labels: int | None = None) -> dict[str, Any]:
        """Arguments of `from_pretrained` for a head with the task's classes by name, or with more labels than these."""
        if self.label is None or self.regression:
            return {} if self.label is None else {"num_labels": 1}
        names = [self.name_class(label) for label in self.classes]
        names += [f"LABEL_{i}" for i in range(len(names), labels or 0)]
        return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}

    def encode_labels(self, split: str) -> np.ndarray:
        """Encode the labels of a split as the Trainer does: floats or indexes of `classes`, `[rows]`.

        For TOKEN_CLS they are `[rows, words]`, padded with `IGNORED`.
        """
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
        """-1 if less is better, as for a loss or an error, else 1: correct predictions have the better score.

        Raises:
            ValueError: The metric scores both alike, or does not fit the data.
        """
        if self.metric in METRICS:
            return 1
        if self.metric == "loss":
            return -1
        labels = self.encode_labels("eval")
        wrong = labels.min() + labels.max() - labels if self.regression else (labels + 1) % len(self.classes)
        best, worse = self._compute(labels, labels), self._compute(labels, np.where(labels == IGNORED, labels, wrong))
        if not (best < worse or best > worse):
            raise ValueError(
                f"metric={self.metric!r} (--metric) scores correct predictions {best:g} and incorrect ones {worse:g}. "
                "It must distinguish them on the held-out data."
            )
        return 1 if best > worse else -1

    @cached_property
    def best(self) -> float | None:
        """Score of correct predictions: 1 for a built-in metric, None for a loss."""
        if self.label is None:
            return None
        if self.metric in METRICS:
            return 1.0
        labels = self.encode_labels("eval")
        return round(self.score(labels, labels), 6)  # the last digits differ between machines

    def score(self, labels: np.ndarray, predictions: np.ndarray) -> float:
        """Score predictions against labels, both as of `encode_labels`; higher is better.

        A metric of a single class is averaged over the classes where there are more than two.
        """
        return self.sign * self._compute(labels, predictions)

    def _compute(self, labels: np.ndarray, predictions: np.ndarray) -> float:
        metric = load_metric(self.metric)
        scored = labels != IGNORED if labels.ndim > 1 else np.full(len(labels), True)
        names = [self.name_class(label) for label in self.classes]
        # F1 of two classes is that of the last label, whatever order the head has.
        order = [(isinstance(label, str), label) for label in self.classes]
        positive = order.index(max(order)) if order else 0
        if not metric.rows:
            return float(metric.compute(labels[scored], predictions[scored], names, positive))
        right, given = ([row[mask] for row, mask in zip(rows, scored, strict=True)] for rows in (labels, predictions))
        return float(metric.compute(right, given, names, positive))

    def score_majority(self) -> float | None:
        """Score the majority-class baseline, or the mean of the training labels for a regression.

        None for CAUSAL_LM, and if the metric of a constant is not finite.
        """
        if self.label is None:
            return None
        train, labels = self.encode_labels("train"), self.encode_labels("eval")
        constant = train.mean() if self.regression else np.bincount(train[train != IGNORED]).argmax()
        score = self.score(labels, np.full(labels.shape, constant))
        return score if math.isfinite(score) else None


def load_task(options: TextOptions) -> Task:
    """Load the task of the options: a GLUE task, the files `train` and `eval`, or splits of a dataset on the Hub.

    Raises:
        ValueError: An option does not fit the data; the message names it.
        ImportError: The metric needs `evaluate`, which is not installed.
    """
    if options.task is None:
        shared = (options.columns, options.label, options.metric, options.task_type, options.dataset)
        return order_as_head(load_files(str(options.train), str(options.eval), *shared), options.model)
    if options.task_type != "SEQ_CLS":
        raise ValueError(f"task_type={options.task_type!r}: GLUE tasks are SEQ_CLS. Name files for others.")
    name = options.task.removeprefix("glue/")
    if name not in GLUE:
        known = ", ".join(f"glue/{task}" for task in GLUE)
        raise ValueError(f"task={options.task!r} is unknown. Known are {known}.")
    columns, metric = GLUE[name]
    if options.columns not in (("text",), tuple(columns)):
        raise ValueError(
            f"text={list(options.columns)} (--text) does not go with task={options.task!r} (--task), whose columns are "
            f"{list(columns)}. Leave it out."
        )
    evaluation = "validation_matched" if name == "mnli" else "validation"
    task = load_files("train", evaluation, columns, metric=options.metric or metric, dataset=f"nyu-mll/glue:{name}")
    return order_as_head(task, options.model)


def order_as_head(task: Task, model: str) -> Task:
    """Order the classes as the head of a model does that has the same names, so that a trained head remains of use."""
    try:
        names = tuple(AutoConfig.from_pretrained(model).id2label.values())
    except (OSError, ValueError):  # loading the model says what is wrong
        return task
    return replace(task, order=names) if {task.name_class(label) for label in task.classes} == set(names) else task


def load_files(
    train: str,
    eval: str,
    columns: Sequence[str],
    label: str | None = "label",
    metric: str | None = None,
    task_type: TaskType = "SEQ_CLS",
    dataset: str | None = None,
) -> Task:
    """Load a task from local files, or from splits of a dataset on the Hub. See `TextOptions`.

    Raises:
        ValueError: The metric is unknown, or the data cannot be used. The message names up to ten errors, with the
            lines of the file, or rows where it has no lines.
    """
    if task_type == "CAUSAL_LM":
        label, metric = None, metric or "loss"
        if metric != "loss":
            raise ValueError(f"metric={metric!r}: a causal language model is measured by its loss.")
    else:
        metric = _resolve_metric(metric or "accuracy", task_type)
    if len(columns) not in ((1, 2) if task_type == "SEQ_CLS" else (1,)):
        raise ValueError(f"text={list(columns)}: name one column, or two for pairs of sentences (SEQ_CLS).")
    if len(set(columns)) < len(columns):
        raise ValueError(f"text={list(columns)} (--text) names one column twice. Name one column, or two that differ.")
    if label in columns:
        raise ValueError(f"label={label!r} (--label) is a column of the text too.")
    if unknown := [path for path in (train, eval) if not dataset and Path(path).suffix not in SUFFIXES]:
        raise ValueError(f"{', '.join(unknown)}: the suffix must be one of {', '.join(SUFFIXES)}.")
    for path in () if dataset else (train, eval):
        if not Path(path).is_file():
            options = [name for name, given in (("--train", train), ("--eval", eval)) if given == path]
            raise ValueError(f"{', '.join(options)} {path}: there is no such file.")
    loaded = {path: _load(path, dataset) for path in (train, eval) if dataset or Path(path).suffix not in TEXT_FILES}
    checks = Checks(columns, label, task_type, metric if label and load_metric(metric).regression else None)
    names = [*columns, *([label] if label else [])]
    sources = {
        path: _read(path, loaded[path], names, label) if path in loaded else read_rows(path) for path in (train, eval)
    }
    checks.run([sources[train], sources[eval]])
    splits = {}
    for split, path in (("train", train), ("eval", eval)):
        data = loaded[path] if path in loaded else Dataset.from_dict(checks.columns_of(sources[path]))
        if label and isinstance(data.features[label], ClassLabel):  # -1 is no class, as in SNLI
            data = data.filter(lambda value: value >= 0, input_columns=label)
        splits[split] = data.select_columns(names)
    if label and len(named := {path: list_names(data.features[label]) for path, data in loaded.items()}) > 1:
        (one, names_of), (other, others) = named.items()
        if names_of and others and names_of != others:
            raise ValueError(
                f"column {label!r} (--label): the classes are {names_of} in {one}, but {others} in {other}, a number "
                "means different classes. Store both with the same classes (Dataset.cast_column)."
            )
    if train != eval:
        texts = [list(zip(*(map(str, data[column]) for column in columns), strict=True)) for data in splits.values()]
        seen, held_out = set(texts[0]), texts[1]
        if both := sum(row in seen for row in held_out):
            warnings.warn(
                f"{both} of the {len(held_out)} texts of {eval} are in {train} too: their scores say nothing about new "
                "texts. Remove them from one of the files.",
                stacklevel=2,
            )
    return Task(DatasetDict(splits), tuple(columns), label, metric, task_type)


def _read(path: str, data: Dataset, names: Sequence[str], label: str | None) -> Source:
    """Read the rows of a split, except those without a class."""
    selected = data.select_columns([column for column in names if column in data.column_names])
    classes = label in selected.features and isinstance(selected.features[label], ClassLabel)

    def rows() -> Iterator[Row]:
        batches = (zip(*batch.values(), strict=True) for batch in selected.iter(1000))
        for i, values in enumerate(chain.from_iterable(batches), 1):
            row = dict(zip(selected.column_names, values, strict=True))
            if not (classes and row[label] == -1):
                yield i, row

    return Source(path, rows(), data.column_names, position="row")


def _load(path: str, dataset: str | None) -> Dataset:
    if dataset:
        name, _, configuration = dataset.partition(":")
        try:
            return load_dataset(name, configuration or None, split=path)
        except Exception as error:  # of the Hub, the network, the dataset
            raise ValueError(f"split {path!r} of dataset={dataset!r} (--dataset) cannot be read: {error}") from error
    try:
        return Dataset(ParquetFile(path).read())
    except Exception as error:  # of pyarrow and of the features that `datasets` stores
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}. Is it Parquet?") from error


def list_names(feature: Any) -> list[str]:
    """The names of the classes that a dataset stores, of texts or of words; none if its labels are values."""
    feature = getattr(feature, "feature", feature)
    return feature.names if isinstance(feature, ClassLabel) else []


def _resolve_metric(metric: str, task_type: TaskType) -> str:
    """Check whether a metric fits the task type. The path of a script becomes absolute, for other processes."""
    loaded = load_metric(metric)
    if loaded.regression and task_type != "SEQ_CLS":
        raise ValueError(f"metric={metric!r} is for texts (SEQ_CLS), not for {task_type}.")
    if loaded.rows and task_type != "TOKEN_CLS":
        raise ValueError(f"metric={metric!r} is for lists of words (TOKEN_CLS), not for {task_type}.")
    path, key = find_script(metric), split_name(metric)[1]
    return f"{path}:{key}".rstrip(":") if path else metric
