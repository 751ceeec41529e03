"""Labelled texts and a base model: adapters trained as users train them, and their errors counted."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..codec import compress, quantisation_aware
from ..measure.tasks import files
from ..measure.text import TextFit
from ..tuner import IntrinsicConfig

TUNING = 0.1
"""The rate of training as rounded, as a share of that of the training before (docs/packing.md)."""


class LabelledTexts(TextFit):
    """A task of classes, its data tokenised and its base model loaded once.

    Args:
        model: name or folder of the base model.
        train, test: CSV, TSV, JSON lines or Parquet; without a test file the training data stand in for it.
        columns: of the one or two texts.
        label: column of the class. Class i of the model is the i-th of the sorted labels of the training data.
        batch: examples in a batch.

    Raises:
        ValueError: the files do not hold such data.
    """

    def __init__(
        self, model: str, train: str, test: str | None, columns: Sequence[str], label: str, batch: int = 32
    ) -> None:
        sizes = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": 4 * batch}
        task = files(train, test or train, columns, label, "accuracy")
        super().__init__(model, task, arguments={**sizes, "train_sampling_strategy": "group_by_length"})

    def settled(self, base: Any) -> Any:
        """As it is: every adapter draws the fresh head itself."""
        return base

    def adapter(self, d: int, seed: int) -> IntrinsicConfig:
        """The configuration that users have by default."""
        return IntrinsicConfig(d=d, seed=seed, task_type="SEQ_CLS")

    def train(self, model: Any, steps: int, learning_rate: float, seed: int) -> None:
        """Steps of AdamW on the training data, the rate falling to zero."""
        with tempfile.TemporaryDirectory() as folder:
            chosen = {"max_steps": steps, "learning_rate": learning_rate, "seed": seed, "weight_decay": 0.0}
            self.trainer(model, folder, chosen).train()

    def packed(self, model: Any, levels: int, steps: int, learning_rate: float, seed: int) -> bytes:
        """The adapter with so many levels, after some steps of training as rounded. The model stays as it is.

        Args:
            model: with the adapter.
            levels: values that its numbers may have.
            steps: of training as rounded, at `TUNING` of the rate; 0 rounds only.
            learning_rate: of the training before.
            seed: of the order of the data.
        """
        before = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}
        try:
            if steps:
                with quantisation_aware(model, levels):
                    self.train(model, steps, TUNING * learning_rate, seed)
            return compress(model, levels)
        finally:
            for parameter, values in before.items():
                parameter.data.copy_(values)

    def errors(self, model: Any, split: str) -> int:
        """How many examples of a split, `train` or `eval`, the model gets wrong."""
        data = self.data[split]
        order = np.argsort([len(ids) for ids in data["input_ids"]], kind="stable")  # little is spent on padding
        with tempfile.TemporaryDirectory() as folder:
            score = self.trainer(model, folder, {}).evaluate(data.select(order))["eval_score"]
        return len(data) if np.isnan(score) else round((1 - score) * len(data))

    def majority(self) -> int:
        """How many training examples do not have the most frequent class."""
        counts = np.bincount(self.task.numbers("train"))
        return int(counts.sum() - counts.max())
