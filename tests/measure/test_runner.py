"""What a fit may return, and what becomes of it."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
import torch

from peft_intrinsic.measure import NothingToMeasure, grid, measure_intrinsic_dimension
from peft_intrinsic.measure.report import markdown

DIMS = grid(10, 1000, 20)


def step(d, seed, *rate) -> float:
    return 0.8 if d is None or d >= 100 else 0.4


def test_a_score_that_is_no_number():
    with pytest.raises(ValueError, match=r"fit returned no finite score for d=None, seed=0"):
        measure_intrinsic_dimension(lambda d, seed: math.nan, DIMS)


def test_a_trial_that_diverges_counts_as_the_trivial_answer(tmp_path):
    fit = lambda d, seed: math.nan if (d, seed) == (1000, 1) else step(d, seed)  # noqa: E731
    result = measure_intrinsic_dimension(fit, DIMS, majority=0.5, out=tmp_path)
    assert dict((d, scores) for d, _, scores in result.points)[1000] == [0.8, 0.5, 0.8]
    assert result.diverged == 1
    assert "| diverged trials, counted as the trivial answer | 1 |" in markdown(result)
    assert measure_intrinsic_dimension(fit, DIMS, majority=0.5, out=tmp_path) == result


def test_a_learning_rate_that_diverges_is_not_chosen(tmp_path):
    def fit(d, seed, rate):
        return math.nan if rate > 1 else step(d, seed)

    result = measure_intrinsic_dimension(fit, DIMS, learning_rates=([9, 0.1], [0.1, 9]), out=tmp_path)
    assert result.learning_rates == (0.1, 0.1)
    assert measure_intrinsic_dimension(fit, DIMS, learning_rates=([9, 0.1], [0.1, 9]), out=tmp_path).d == result.d
    assert "NaN" not in (tmp_path / "trials.jsonl").read_text()
    with pytest.raises(ValueError, match=r"no finite score for d=None at any of the learning rates \[9, 8\]"):
        measure_intrinsic_dimension(fit, DIMS, learning_rates=([9, 8], [0.1, 9]))


@pytest.mark.parametrize("bad", [None, "good", {"accuracy": 0.8}, torch.ones(3)])
def test_what_is_no_score_is_not_kept(bad, tmp_path):
    with pytest.raises((ValueError, RuntimeError), match=r"fit returned .* for d=None, seed=0|3 elements"):
        measure_intrinsic_dimension(lambda d, seed: bad, DIMS, out=tmp_path)
    assert measure_intrinsic_dimension(step, DIMS, out=tmp_path) == measure_intrinsic_dimension(step, DIMS)


@pytest.mark.parametrize("kind", [np.float32, torch.tensor, lambda score: {"score": torch.tensor(score), "note": "x"}])
def test_numbers_of_every_kind(kind, tmp_path):
    result = measure_intrinsic_dimension(lambda d, seed: kind(step(d, seed)), DIMS, out=tmp_path)
    assert result.baseline == pytest.approx([0.8] * 3)
    assert {type(json.loads(row)["score"]) for row in (tmp_path / "trials.jsonl").read_text().splitlines()} == {float}


def test_nothing_is_wasted_where_there_is_nothing_to_measure():
    tried = []
    with pytest.raises(NothingToMeasure):
        measure_intrinsic_dimension(
            lambda d, seed, rate: tried.append(d) or 0.5, DIMS, majority=0.5, learning_rates=([1, 2], [3, 4])
        )
    assert tried == [None] * 4


def test_minutes_count_from_the_call(monkeypatch):
    """On a clock on which each trial takes a minute."""
    minutes, begun = [0], []
    monkeypatch.setattr(time, "monotonic", lambda: 60.0 * minutes[0])

    def fit(d, seed):
        minutes[0] += 1
        if d is not None and seed == 0:
            begun.append(minutes[0] - 1)
        return step(d, seed)

    result = measure_intrinsic_dimension(fit, DIMS, minutes=30)
    assert result.stopped == "the budget of 30 minutes is spent"
    assert len(begun) == len(result.points)
    assert 27 < begun[-1] <= 30 < minutes[0]
    minutes[0] = 0
    with pytest.raises(ValueError, match="the budget of 2 minutes is spent before a single dimension was measured"):
        measure_intrinsic_dimension(fit, DIMS, minutes=2)
