"""What a fit may return, and how it is stored."""

from __future__ import annotations

import io
import json
import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.steps import DIMS, step
from tqdm.auto import tqdm

from peft_intrinsic.measure import NothingToMeasure, measure_intrinsic_dimension
from peft_intrinsic.measure.report import format_markdown


def test_scores_that_are_not_finite_raise():
    with pytest.raises(NothingToMeasure, match=r"Full fine-tuning scores 0\.0000"):
        measure_intrinsic_dimension(lambda d, seed: math.nan, DIMS)
    with pytest.raises(ValueError, match=r"fit returned no finite score for d=0, seed=0"):
        measure_intrinsic_dimension(lambda d, seed: math.nan if d == 0 else 1.0, DIMS, relative_to="gain")


@pytest.mark.parametrize(("center", "scores"), [("median", [0.8, 0.8]), ("mean", [0.8, 0.35, 0.8])])
def test_diverged_trial_counts_as_collapsed(center, scores, tmp_path):
    """In the mean it has the score of the majority-class baseline."""
    fit = lambda d, seed: math.nan if (d, seed) == (1000, 1) else step(d, seed)  # noqa: E731
    options = {"majority": 0.35, "out": tmp_path, "sweep": True, "center": center}
    result = measure_intrinsic_dimension(fit, DIMS, **options)
    assert (result.points[-1].scores, result.points[-1].collapsed) == (scores, 1)
    assert f"| collapsed: full fine-tuning, subspace | 0, 1 of {3 * len(DIMS)} |" in format_markdown(result)
    assert measure_intrinsic_dimension(fit, DIMS, **options) == result
    assert "NaN" not in (tmp_path / "trials.jsonl").read_text()


def test_diverged_full_fine_tuning_counts_as_collapsed(tmp_path):
    result = measure_intrinsic_dimension(lambda d, seed: math.nan if (d, seed) == (None, 1) else step(d, seed), DIMS)
    assert (result.baseline.scores, result.baseline.collapsed) == ([0.8, 0.8], 1)


@pytest.mark.parametrize("bad", [None, "good", {"accuracy": 0.8}, torch.ones(3)])
def test_result_without_a_score_raises_and_is_not_stored(bad, tmp_path):
    with pytest.raises((ValueError, RuntimeError), match=r"fit returned .* for d=None, seed=0|3 elements"):
        measure_intrinsic_dimension(lambda d, seed: bad, DIMS, out=tmp_path)
    assert measure_intrinsic_dimension(step, DIMS, out=tmp_path).d == measure_intrinsic_dimension(step, DIMS).d


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": 3}, "returned seed for d=None, seed=0.* Rename it"),
        ({"key": "x", "d": 1}, "returned d, key for"),
        ({"examples": 10}, "returned examples for"),
        ({"right": [True]}, "returned right for"),
        ({"path": Path("x")}, "returned path=.* for d=None, seed=0"),
        ({"many": np.ones(2)}, "returned many="),
        ({"correct": 8}, "returned correct=8 .* a bool for each"),
        ({"correct": [True, False]}, r"with the score 0\.8. .* must be their mean"),
        ({"correct": [0.8, 0.8]}, "a bool for each"),
    ],
)
def test_result_that_a_row_cannot_store_raises(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        measure_intrinsic_dimension(lambda d, seed: {"score": 0.8, **values}, DIMS, out=tmp_path)
    assert measure_intrinsic_dimension(step, DIMS, out=tmp_path).d == measure_intrinsic_dimension(step, DIMS).d


def test_correct_predictions_widen_the_interval_by_their_sampling():
    """Full fine-tuning predicts all of ten held-out examples correctly."""

    def fit(d, seed):
        right = np.arange(10) < (10 if d is None else 10 * min(d, 130) // 130)
        return {"score": torch.tensor(right.mean(), dtype=torch.float32), "correct": right}

    known = measure_intrinsic_dimension(fit, DIMS, sweep=True)
    alone = measure_intrinsic_dimension(lambda d, seed: fit(d, seed)["score"], DIMS, sweep=True)
    assert (known.examples, alone.examples) == (10, None)
    assert known.interval[0] < alone.interval[0] == alone.d == known.d
    lost = measure_intrinsic_dimension(
        lambda d, seed: {"score": math.nan, "correct": [True]} if (d, seed) == (1000, 1) else fit(d, seed),
        DIMS,
        sweep=True,
    )
    assert lost.points[-1].collapsed == 1


def test_search_says_that_the_rest_of_the_interval_is_sampling():
    def fit(d, seed):
        correct = np.arange(50) < (45 if d is None else 15 + 30 * math.log(d / 10) / math.log(100))
        return {"score": correct.mean(), "correct": correct}

    result = measure_intrinsic_dimension(fit, DIMS)
    assert result.stopped == "what is left of the interval is the sampling of the held-out examples"


def test_measurement_works_without_a_progress_bar(monkeypatch):
    monkeypatch.setattr("peft_intrinsic.measure.measure.tqdm", partial(tqdm, disable=True))
    assert measure_intrinsic_dimension(step, DIMS).d == 112


@pytest.mark.parametrize("kind", [np.float32, torch.tensor, lambda score: {"score": torch.tensor(score), "note": "x"}])
def test_scores_of_numpy_and_torch_are_stored_as_floats(kind, tmp_path):
    result = measure_intrinsic_dimension(lambda d, seed: kind(step(d, seed)), DIMS, out=tmp_path)
    assert result.baseline.scores == pytest.approx([0.8] * 3)
    assert {type(json.loads(row)["score"]) for row in (tmp_path / "trials.jsonl").read_text().splitlines()} == {float}


def test_no_subspace_is_trained_where_there_is_nothing_to_measure():
    tried = []
    with pytest.raises(NothingToMeasure):
        measure_intrinsic_dimension(
            lambda d, seed, rate: tried.append(d) or 0.5, DIMS, majority=0.5, learning_rates=([1, 2], [3, 4])
        )
    assert tried == [None] * 5  # two learning rates, three seeds


def test_time_budget_starts_with_the_call(monkeypatch):
    """Each trial takes a minute on this clock."""
    minutes = [0]
    monkeypatch.setattr(time, "monotonic", lambda: 60.0 * minutes[0])

    def fit(d, seed):
        minutes[0] += 1
        return step(d, seed)

    result = measure_intrinsic_dimension(fit, DIMS, minutes=10)
    assert result.stopped == "the budget of 10 minutes is spent"
    assert minutes[0] == 11  # the running trial ends
    minutes[0] = 0
    with pytest.raises(ValueError, match="the budget of 2 minutes is spent before a d from 10 to 1000 was measured"):
        measure_intrinsic_dimension(fit, DIMS, minutes=2)
    minutes[0] = 0
    with pytest.raises(
        ValueError,
        match=r"the budget of 1 minutes is spent before full fine-tuning was measured\. .* \(measure --trials",
    ):
        measure_intrinsic_dimension(
            lambda d, seed, rate: fit(d, seed), DIMS, minutes=1, learning_rates=([1, 2, 3], [1, 2, 3])
        )


def test_progress_bar_estimates_time_from_new_trials_alone(tmp_path, monkeypatch):
    now, bars = [0.0], []

    class Bar(tqdm):
        def __init__(self, **options):
            super().__init__(**options, file=io.StringIO())
            self._time, self.start_t, self.last_print_t = lambda: now[0], 0.0, 0.0
            bars.append(self)

    def slow(d, seed):
        now[0] += 10.0
        return step(d, seed)

    monkeypatch.setattr("peft_intrinsic.measure.measure.tqdm", Bar)
    options = {"out": tmp_path, "sweep": True}
    for dims in (5, 6):
        now[0] = 0.0
        measure_intrinsic_dimension(slow, DIMS[:dims], **options)
        assert "10.00s/trial" in str(bars[-1])
    assert now[0] == 30.0
