"""Baselines that a trained adapter is compared with."""

from __future__ import annotations

import numpy as np
import torch
from conftest import build
from datasets import Dataset
from sklearn.linear_model import LogisticRegression

from peft_intrinsic.text.baselines import logistic_regression


def collate(rows):
    """Pad rows to one length, as DataCollatorWithPadding does."""
    width = max(len(row["input_ids"]) for row in rows)
    padded = [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows]
    masks = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    return Batch(input_ids=torch.tensor(padded), attention_mask=torch.tensor(masks))


class Batch(dict):
    def to(self, device):
        return self


def test_logistic_regression_predicts_from_the_mean_states_of_each_text():
    """Rows of different lengths, in more than one batch, keep their order; padding does not count."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 9, size=150)
    rows = [generator.integers(3, 90, size=int(length)).tolist() for length in lengths]
    labels = generator.integers(0, 3, size=150).tolist()
    data = Dataset.from_dict({"input_ids": rows, "labels": labels})
    train, held_out = data.select(range(100)), data.select(range(100, 150))
    encoder = build("bert").bert.train()
    predicted, weights = logistic_regression(encoder, collate, train, held_out)
    with torch.no_grad():
        encoder.eval()
        states = [encoder(input_ids=torch.tensor([row])).last_hidden_state[0].mean(0).numpy() for row in rows]
    fitted = LogisticRegression(max_iter=1000).fit(states[:100], labels[:100])
    assert predicted.tolist() == fitted.predict(states[100:]).tolist()
    assert len(set(predicted.tolist())) == 3
    assert weights == 3 * 24 + 3
