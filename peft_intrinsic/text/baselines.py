"""Baselines that a trained adapter is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegression

BATCH = 64


def logistic_regression(
    encoder: Any, collate: Callable[[list[dict[str, Any]]], Any], train: Dataset, eval: Dataset
) -> tuple[np.ndarray, int]:
    """Fit a logistic regression on features of a frozen encoder: means of its last hidden states over the tokens.

    Args:
        encoder: a model whose output has `last_hidden_state`, `[batch, tokens, width]`.
        collate: makes a padded batch of rows, as `DataCollatorWithPadding` does.
        train, eval: tokenized texts, with classes from 0 in a column `labels`.

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
