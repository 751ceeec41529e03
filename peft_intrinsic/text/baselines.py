"""Comparison of a trained adapter with baselines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegression

BATCH = 64

DOCUMENTED = 2e-4
"""Documented learning rate. A run at it or below that learned nothing was probably too short (docs/tuner.md)."""


def logistic_regression(
    encoder: Any, collate: Callable[[list[dict[str, Any]]], Any], train: Dataset, eval: Dataset
) -> tuple[np.ndarray, int]:
    """Fit a logistic regression on features of a frozen encoder: means of its last hidden states over the tokens.

    Args:
        encoder: Model whose output has `last_hidden_state`, `[batch, tokens, width]`.
        collate: Makes a padded batch of rows, as `DataCollatorWithPadding` does.
        train, eval: Tokenized texts, with classes from 0 in a column `labels`.

    Returns:
        The predicted classes of `eval`, `int[N]`, and the number of trained weights.
    """
    home = encoder.device
    encoder.eval().to(torch.accelerator.current_accelerator(check_available=True) or home)

    @torch.no_grad()
    def features(rows: Dataset) -> np.ndarray:
        order = np.argsort([len(ids) for ids in rows["input_ids"]])  # texts of one length need little padding
        inputs = rows.remove_columns("labels")
        means = []
        for indexes in np.array_split(order, -(-len(order) // BATCH)):
            batch = collate([inputs[int(i)] for i in indexes]).to(encoder.device)
            mask = batch["attention_mask"].unsqueeze(-1)
            states = encoder(**batch).last_hidden_state.float()
            means.append(((states * mask).sum(1) / mask.sum(1)).cpu().numpy())
        return np.concatenate(means)[np.argsort(order)]

    fitted = LogisticRegression(max_iter=1000).fit(features(train), train["labels"])
    predicted = fitted.predict(features(eval))
    encoder.to(home)
    return predicted, fitted.coef_.size + fitted.intercept_.size


def describe_collapse(
    score: float,
    floor: float,
    learning_rate: float,
    metric: str = "accuracy",
    baseline: str = "majority class",
    one_class: bool = False,
) -> str:
    """Say that a run collapsed to the score of a baseline, or to one class, and what to try."""
    what = "predicts one class for every example" if one_class else "learned nothing"
    remedy = "Train for more steps first, then try a learning rate of up to 4e-4 with a longer warm-up."
    if learning_rate > DOCUMENTED:
        remedy = f"Try a lower learning rate ({learning_rate / 4:g} instead of {learning_rate:g}), or a longer warm-up."
    scores = f"Its {metric} is {score:.4f}, that of the {baseline} {floor:.4f}."
    return f"Training collapsed: the model {what}. {scores} {remedy}"
