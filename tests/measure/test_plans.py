"""Other plans for stored trials."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from helpers.steps import DIMS, step

from peft_intrinsic.measure import analyze, grid, measure_intrinsic_dimension
from peft_intrinsic.measure.evidence import TUNING
from peft_intrinsic.measure.measure import run_plan
from peft_intrinsic.measure.plan import Plan
from peft_intrinsic.measure.report import format_markdown, summarize


def test_another_plan_reuses_the_stored_trials(tmp_path):
    """The plans differ in target, definition, seeds, and grid. Only missing trials run."""
    calls: list = []

    def fit(d, seed):
        calls.append((d, seed))
        return step(d, seed)

    first = measure_intrinsic_dimension(fit, DIMS, majority=0.2, out=tmp_path)
    known, rows = len(calls), first.trials
    assert measure_intrinsic_dimension(fit, DIMS, majority=0.2, out=tmp_path) == first
    assert len(calls) == known
    for plan in ({"relative_to": "gain"}, {"center": "mean"}):
        again = measure_intrinsic_dimension(fit, DIMS, majority=0.2, **plan)
        assert analyze(tmp_path, **plan).answers == again.answers
    assert analyze(tmp_path, target=0.5).answers["score"].target == pytest.approx(0.4)
    assert (analyze(tmp_path).name, analyze(tmp_path, target=0.995).name) == ("d90", "d99.5")
    calls.clear()
    more = measure_intrinsic_dimension(fit, grid(10, 1000, 39), majority=0.2, seeds=4, out=tmp_path)
    assert not set(calls) & {(row["d"], row["seed"]) for row in rows}
    assert more.d == next(d for d in grid(10, 1000, 39) if d >= 100)
    assert analyze(tmp_path).d == more.d  # the newest plan is that of the folder


@pytest.mark.parametrize("dims", [(1000, 100_000, 60), (100, 200_000, 60)])
def test_another_grid_continues_from_the_stored_trials(dims, tmp_path):
    """The best learning rate falls with d. No measured d is dropped, and none is scanned again."""
    calls: list = []

    def fit(d, seed, rate):
        calls.append((d, seed, rate))
        best = 4e-5 if d is None else 2e-3 * (d / 100) ** -0.3
        score = 0.9 if d is None else 0.5 + 0.4 / (1 + math.exp(-1.5 * math.log(d / 20_000)))
        return score - 0.03 * math.log(rate / best, 4) ** 2 + random.Random(f"{d} {seed} {rate}").gauss(0, 0.01)

    options = {"majority": 0.5, "learning_rates": "auto", "out": tmp_path}
    first = measure_intrinsic_dimension(fit, **options)
    calls.clear()
    again = measure_intrinsic_dimension(fit, grid(*dims), trials=100, **options)
    assert all(seed != TUNING and (d is None or d > 10_000) for d, seed, _ in calls)
    known = {point.d: (point.seeds, point.learning_rate) for point in first.points if dims[0] <= point.d <= dims[1]}
    now = {point.d: (point.seeds, point.learning_rate) for point in again.points}
    assert all(now[d][0] >= seeds and now[d][1] == rate for d, (seeds, rate) in known.items())
    calls.clear()
    assert measure_intrinsic_dimension(fit, grid(*dims), trials=100, **options) == again
    assert not calls


def test_full_fine_tuning_of_another_run_is_not_repeated(tmp_path):
    """All of its seeds count from the start, as in a study of several methods."""
    calls: list = []
    rows = [{"d": None, "seed": seed, "learning_rate": None, "score": 0.8 + 0.002 * seed} for seed in range(5)]
    run: dict = {"out": tmp_path, "overwrite": False, "settings": None, "engine": None}
    fit = lambda d, seed: calls.append(d) or step(d, seed)  # noqa: E731
    found = run_plan(fit, Plan(tuple(DIMS)), **run, known=rows)
    assert (found.baseline.scores, None in calls) == ([row["score"] for row in rows], False)
    calls.clear()
    assert run_plan(fit, Plan(tuple(DIMS)), **run, known=rows) == found
    assert not calls


def test_d_above_the_measured_ones_is_not_claimed():
    """The search for the score ends below the crossing of the gain."""

    def slow(d, seed):
        return 0.9 if d is None else 0.5 + 0.32 * min(d / 500, 1) + 0.08 * max(math.log10(d / 500), 0) / 3

    found = measure_intrinsic_dimension(slow, grid(10, 100_000, 40), majority=0.5)
    last = found.points[-1].d
    assert last < 15_000
    assert (found.answers["gain"].d, found.answers["gain"].interval) == (None, (None, None))
    assert f"| 0.9 of the gain | 0.8600 | > {last} | [" in format_markdown(found)


def test_trials_at_other_learning_rates_do_not_count(tmp_path):
    fit = lambda d, seed, rate: step(d, seed) - 0.01 * abs(math.log(rate / 0.1))  # noqa: E731
    for rates in (([1e-3, 1e-2, 0.1], [1e-2, 0.1, 0.2]), ([1e-6, 1e-5], [1e-5, 1e-4])):
        found = measure_intrinsic_dimension(fit, DIMS, learning_rates=rates, out=tmp_path)
    assert found.answers == measure_intrinsic_dimension(fit, DIMS, learning_rates=rates).answers
    assert (found.baseline.learning_rate, found.points[0].learning_rate) == (1e-5, 1e-4)


def test_analysis_of_another_grid_uses_the_dims_between_its_ends(tmp_path):
    first = measure_intrinsic_dimension(step, DIMS, out=tmp_path)
    other = analyze(tmp_path, dims=np.array(grid(11, 990, 30)))
    assert other.d in (d for d in grid(11, 990, 30) if first.points[0].d < d)
    assert other.interval[0] <= 112 <= other.interval[1] * 1.2
    always = measure_intrinsic_dimension(lambda d, seed: 0.8, DIMS, out=tmp_path / "always")
    assert (always.ends[0], always.d) == (10, 10)
    assert summarize(analyze(tmp_path / "always", dims=grid(2, 990, 30))).startswith(
        "d90 ≤ 11, 90 % interval [≤ 11, ≤ 11]"
    )
    with pytest.raises(
        ValueError,
        match=r"analyzed before a d from 2 to 3 was measured\. .*\(measure --trials, --minutes\), .*\(--dims\)",
    ):
        analyze(tmp_path, dims=[2, 3])
    with pytest.raises(ValueError, match="relative_to='gain' needs the score of the majority-class baseline"):
        analyze(tmp_path, relative_to="gain")


def test_folder_of_other_settings_or_no_run_raises(tmp_path):
    measure_intrinsic_dimension(step, DIMS, out=tmp_path, settings={"width": 3})
    with pytest.raises(ValueError, match=r"other settings \(width: 3 there, 4 now\).*--overwrite"):
        measure_intrinsic_dimension(step, DIMS, out=tmp_path, settings={"width": 4})
    measure_intrinsic_dimension(step, DIMS, out=tmp_path, settings={"width": 4}, overwrite=True)
    with pytest.raises(ValueError, match=r"not the folder of a run: it has no settings\.json"):
        analyze(tmp_path / "elsewhere")
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ValueError, match=r"plan\.json is damaged .*its plan is unknown"):
        analyze(tmp_path)
    (tmp_path / "plan.json").unlink()
    with pytest.raises(ValueError, match=r"has no plan\.json: it is not the folder of a measurement"):
        analyze(tmp_path)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"learning_rates": ([0.1, 1.0], [0.1, 1.0])}, {"dims": range(80, 150, 10)}),  # none was tried inside
        ({"learning_rates": ([1.0], [1.0]), "trials": 14}, {"learning_rates": ([0.1, 1.0], [0.1, 1.0])}),
    ],
)
def test_learning_rates_of_a_new_plan_are_tried(before, after, tmp_path):
    """A better one counts, for full fine-tuning and for the subspace."""
    fit = lambda d, seed, rate: step(d, seed) - (0.02 if rate == 1.0 else 0.0)  # noqa: E731
    options = {"dims": DIMS, "out": tmp_path, **before}
    measure_intrinsic_dimension(fit, **options)
    found = measure_intrinsic_dimension(fit, **{**options, "trials": 80, **after})
    assert found.d == next(d for d in {**options, **after}["dims"] if d >= 100)
    assert (found.baseline.learning_rate, found.baseline.level) == (0.1, 0.8)
    assert [point.learning_rate for point in found.points if point.d == found.d] == [0.1]
