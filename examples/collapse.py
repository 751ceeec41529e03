"""Report of a collapsed training run, with advice."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from peft_intrinsic.measure.evidence import is_collapsed
from peft_intrinsic.text.baselines import describe_collapse


def report_collapse(predicted: ArrayLike, labels: ArrayLike, learning_rate: float) -> None:
    """Print a warning if a model is no better than the majority class, or predicts one class for all examples.

    Args:
        predicted, labels: class of each example, from 0.
        learning_rate: learning rate of the run, for the advice.
    """
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    accuracy, majority = float(np.mean(predicted == labels)), float(np.bincount(labels).max() / len(labels))
    same = len(np.unique(predicted)) == 1
    if same or is_collapsed(accuracy, majority):
        print(describe_collapse(accuracy, majority, learning_rate, one_class=same))
