"""Quantization-aware training on texts, and packing."""

from __future__ import annotations

from typing import Any

from ..codec import compress, quantization_aware
from ..text.labeled import AdapterTexts

TUNING = 0.1
"""Learning rate of quantization-aware training, relative to that of the training before it (docs/packing.md)."""


def train_rounded(texts: AdapterTexts, model: Any, levels: int, steps: int, learning_rate: float, seed: int) -> None:
    """Train an adapter as rounded, for `steps` steps at `TUNING` of the learning rate."""
    if steps:
        with quantization_aware(model, levels):
            texts.train(model, steps, TUNING * learning_rate, seed)


def pack_rounded(texts: AdapterTexts, model: Any, levels: int, steps: int, learning_rate: float, seed: int) -> bytes:
    """Pack an adapter after training it as rounded. The model itself is unchanged.

    Args:
        texts: Training data.
        model: Model with the adapter.
        levels: Number of values that its parameters may have.
        steps: Steps of training; 0 rounds only.
        learning_rate: Learning rate of the training before.
        seed: Seed of the order of the data.
    """
    before = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}
    try:
        train_rounded(texts, model, levels, steps, learning_rate, seed)
        return compress(model, levels)
    finally:
        for parameter, values in before.items():
            parameter.data.copy_(values)
