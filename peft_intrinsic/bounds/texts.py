"""Labelled texts, and adapters of them packed."""

from __future__ import annotations

from typing import Any

from ..codec import compress, quantization_aware
from ..text.labelled import LabelledTexts

TUNING = 0.1
"""The rate of training as rounded, as a share of that of the training before (docs/packing.md)."""


class PackedTexts(LabelledTexts):
    """A task of classes whose adapters are packed."""

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
                with quantization_aware(model, levels):
                    self.train(model, steps, TUNING * learning_rate, seed)
            return compress(model, levels)
        finally:
            for parameter, values in before.items():
                parameter.data.copy_(values)
