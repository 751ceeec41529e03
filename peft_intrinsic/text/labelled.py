"""Labelled texts and a base model: adapters trained as users train them, and their errors counted."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import transformers

from ..tuner import IntrinsicConfig
from .tasks import files
from .training import TextFit


class LabelledTexts(TextFit):
    """A task of classes, its data tokenised and its base model loaded once.

    Args:
        model: name or folder of the base model.
        train, eval: CSV, TSV, JSON lines or Parquet; without `eval` the training data stand in for it.
        columns: of the one or two texts.
        label: column of the class. Class i of the model is the i-th of the sorted labels of the training data.
        batch: examples in a batch.
        labels: of the model's head, where the training data have only the first of them.

    Raises:
        ValueError: the files do not hold such data, or more labels.
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
    ) -> None:
        sizes = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": 4 * batch}
        task = files(train, eval or train, columns, label, "accuracy")
        self.labels = len(task.classes) if labels is None else labels
        if self.labels < len(task.classes):
            raise ValueError(
                f"The model has {labels} labels, {train} {len(task.classes)}: {', '.join(map(str, task.classes))}. "
                "Correct the data, or use a model with as many."
            )
        super().__init__(model, task, arguments={**sizes, "train_sampling_strategy": "group_by_length"})

    def loaded(self, model: str, labels: int | None = None) -> Any:
        """With `labels` of the class."""
        return super().loaded(model, self.labels)

    def settled(self, base: Any) -> Any:
        """As it is: every adapter draws the fresh head itself."""
        return base

    def whole(self) -> Any:
        """A copy for full training, its fresh head where adapters start it."""
        return super().settled(copy.deepcopy(self.base)).requires_grad_(True)

    def adapter(self, d: int, seed: int) -> IntrinsicConfig:
        """The configuration that users have by default."""
        return IntrinsicConfig(d=d, seed=seed, task_type="SEQ_CLS")

    def train(self, model: Any, steps: int, learning_rate: float, seed: int) -> None:
        """Steps of AdamW on the training data, the rate falling to zero."""
        with tempfile.TemporaryDirectory() as folder:
            self.prepared(model, folder, steps, learning_rate, seed).train()

    def prepared(
        self, model: Any, folder: str, steps: int, learning_rate: float, seed: int, **more: Any
    ) -> transformers.Trainer:
        """The Trainer of `train`, with further TrainingArguments."""
        chosen = {"max_steps": steps, "learning_rate": learning_rate, "seed": seed, "weight_decay": 0.0}
        return self.trainer(model, folder, {**chosen, **more})

    def errors(self, model: Any, split: str) -> int:
        """How many examples of a split, `train` or `eval`, the model gets wrong."""
        data = self.data[split]
        order = np.argsort([len(ids) for ids in data["input_ids"]], kind="stable")  # little is spent on padding
        with tempfile.TemporaryDirectory() as folder:
            score = self.trainer(model, folder, {}).evaluate(data.select(order))["eval_score"]
        return len(data) if np.isnan(score) else round((1 - score) * len(data))

    def accuracy(self, model: Any) -> float:
        """On the data for evaluation."""
        return 1 - self.errors(model, "eval") / len(self.data["eval"])

    def majority(self) -> int:
        """How many training examples do not have the most frequent class."""
        counts = np.bincount(self.task.numbers("train"))
        return int(counts.sum() - counts.max())
