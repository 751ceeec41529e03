"""Whether a classifier collapsed in training, and what to try then."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from peft_intrinsic.measure.evidence import collapsed

USUAL = 2e-4
"""The documented learning rate: a run at it, or below, that learned nothing was rather too short (docs/tuner.md)."""


def report_collapse(predicted: ArrayLike, labels: ArrayLike, learning_rate: float) -> None:
    """Print a warning if a model is no better than the majority class, or predicts one class for all examples.

    Args:
        predicted, labels: the class of each example, from 0.
        learning_rate: of the training, for the advice.
    """
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    accuracy, majority = float(np.mean(predicted == labels)), float(np.bincount(labels).max() / len(labels))
    same = len(np.unique(predicted)) == 1
    if same or collapsed(accuracy, majority):
        print(
            f"Training collapsed: the model {'predicts one class for every example' if same else 'learned nothing'}. "
            f"Its accuracy is {accuracy:.4f}, that of the majority class {majority:.4f}. "
            + (
                f"Try a lower learning rate ({learning_rate / 4:g} instead of {learning_rate:g}), or a longer warm-up."
                if learning_rate > USUAL
                else "Train for more steps first, then try a learning rate of up to 4e-4 with a longer warm-up."
            )
        )
