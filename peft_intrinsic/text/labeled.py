"""Texts for adapters, which are trained as users train them; and the errors of classifiers of labeled texts."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import transformers
from datasets import DatasetDict

from ..tuner import IntrinsicConfig
from .checks import SHOWN
from .options import TextOptions
from .tasks import Task, list_names, load_task
from .training import TextTraining, count_positions


class AdapterTexts:
    """Texts, the base model of adapters for them, and their training. A subclass loads both, and measures adapters."""

    task: Task
    training: TextTraining
    data: DatasetDict
    base: Any

    @property
    def settings(self) -> dict[str, Any]:
        """What a measurement depends on beside the data."""
        return {"max_length": self.training.options.max_length}

    def measure(self, model: Any, splits: Sequence[str]) -> dict[str, Any]:
        """Measure a model on splits, `train` and `eval`. Returns values for JSON, from which a certificate follows."""
        raise NotImplementedError

    def build_config(self, d: int, seed: int) -> IntrinsicConfig:
        """Build the default configuration of an adapter."""
        return IntrinsicConfig(d=d, seed=seed, task_type=self.task.task_type)

    def train(self, model: Any, steps: int, learning_rate: float, seed: int) -> None:
        """Train a model or adapter with AdamW for so many steps. The learning rate falls linearly to zero."""
        with tempfile.TemporaryDirectory() as folder:
            self.build_trainer(model, folder, steps, learning_rate, seed).train()

    def build_trainer(
        self, model: Any, folder: str, steps: int, learning_rate: float, seed: int, **more: Any
    ) -> transformers.Trainer:
        """Build the Trainer of `train`, with checkpoints in `folder` and further `TrainingArguments`."""
        arguments = {"max_steps": steps, "learning_rate": learning_rate, "seed": seed, "weight_decay": 0.0}
        return self.training.build_trainer(model, folder, {**arguments, **more})


class LabeledTexts(AdapterTexts):
    """Labeled texts, and the base model of a classifier of them. Each adapter initializes the new head itself.

    Args:
        model: Name or folder of the base model.
        train, eval: CSV, TSV, JSON lines or Parquet files; without `eval` the training data are used.
        columns: Columns of the one or two texts.
        label: Column of the class. Class i of the model is the i-th of the sorted labels of the training data.
        batch: Examples in a batch.
        labels: Number of labels of the head. The training data may lack some if its labels are integers from 0.
        names: Names of the labels in the order of the head, if they are known. The training data may lack some.
        max_length: Tokens of a text that the model reads.

    Raises:
        ValueError: The files do not hold such data, have more labels, lack some that are no integers, or have
            texts that are too long for the model.
    """

    def __init__(
        self,
        model: str,
        train: str,
        eval: str | None,
        columns: Sequence[str],
        label: str,
        batch: int = 32,
        labels: int | None = None,
        names: Sequence[str] = (),
        max_length: int = 128,
    ) -> None:
        sizes = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": 4 * batch}
        arguments = {**sizes, "train_sampling_strategy": "group_by_length"}
        files: Any = {"train": train, "eval": eval or train, "columns": tuple(columns), "label": label}
        options = TextOptions(model, **files, metric="accuracy", arguments=arguments, max_length=max_length)
        self.task = load_task(options)
        self.task = self._complete(train, labels, names)
        self.training = TextTraining(options, self.task)
        self.data, self.base = self.training.data, self.training.load_base(labels)
        longest = max(len(ids) for split in self.data.values() for ids in split["input_ids"])
        if longest > (positions := count_positions(self.base) or longest):
            raise ValueError(
                f"{model} has {positions} positions, and a text of the data {longest} tokens. Pass --max-length "
                f"{positions}, if the adapter was trained with it."
            )

    def _complete(self, train: str, labels: int | None, names: Sequence[str]) -> Task:
        """The task with all classes of the model, of which the training data may lack some."""
        found = self.task.classes
        classes = [self.task.name_class(each) for each in found]
        shown = ", ".join(classes[:SHOWN]) + ", …" * (len(classes) > SHOWN)
        if names and not set(classes) <= set(names):
            raise ValueError(
                f"The adapter was trained with the labels {', '.join(names[:SHOWN])}, but {train} has {shown}. Pass "
                "data with its labels."
            )
        if not names and labels in (None, len(classes)):
            return self.task
        stored = list_names(self.task.data["train"].features[str(self.task.label)])
        if not (names or stored) and all(isinstance(each, int) for each in found) and 0 in found:
            names = [str(i) for i in range(labels or 0)]
        names = names or stored
        if labels in (None, len(names)) and set(classes) <= set(names):
            return replace(self.task, order=tuple(names))
        raise ValueError(
            f"The model has {labels} labels, {train} {len(stored or classes)}: {shown}. Correct the data: class i of "
            "the model is the i-th of the sorted labels. If these are integers from 0, others than 0 may be missing."
        )

    def copy_base(self) -> Any:
        """Copy the base model for full fine-tuning. Its new head starts where adapters start it."""
        return self.training.initialize_head(copy.deepcopy(self.base)).requires_grad_(True)

    def count_errors(self, model: Any, split: str) -> int:
        """Count the wrong predictions for a split, `train` or `eval`."""
        data = self.data[split]
        order = np.argsort([len(ids) for ids in data["input_ids"]], kind="stable")  # to pad less
        with tempfile.TemporaryDirectory() as folder:
            score = self.training.build_trainer(model, folder, {}).evaluate(data.select(order))["eval_score"]
        return len(data) if np.isnan(score) else round((1 - score) * len(data))

    def accuracy(self, model: Any) -> float:
        """Compute the accuracy on the evaluation data."""
        return 1 - self.count_errors(model, "eval") / len(self.data["eval"])

    def measure(self, model: Any, splits: Sequence[str]) -> dict[str, Any]:
        names = {"train": "errors", "eval": "test_errors"}
        sizes = {"test_n": len(self.data["eval"])} if "eval" in splits else {}
        return {names[split]: self.count_errors(model, split) for split in splits} | sizes

    def count_majority_errors(self) -> int:
        """Count the training examples that do not have the most frequent class."""
        counts = np.bincount(self.task.encode_labels("train"))
        return int(counts.sum() - counts.max())
