"""The report of a measurement, and the grid that it suggests."""

from __future__ import annotations

import math
import re

import pytest
from helpers.steps import DIMS, step

from peft_intrinsic.measure import grid, measure_intrinsic_dimension
from peft_intrinsic.measure.report import describe_target, format_markdown, suggest_grid


def test_report_of_one_seed_claims_no_interval(tmp_path):
    """One run of each d does not show how much runs vary."""

    def scored(d, seed):
        score = round(100 * step(d, seed)) / 100
        return {"score": score, "correct": [i < 100 * score for i in range(100)]}

    report = format_markdown(measure_intrinsic_dimension(scored, DIMS, seeds=1))
    assert "interval unknown with one seed; the bracket spans at most two steps of the grid" in report
    assert "| held-out examples | 100 |" in report
    assert "| unknown with one seed |" in report
    assert "in the interval" not in report
    assert "interval includes" not in report
    several = format_markdown(measure_intrinsic_dimension(scored, DIMS, seeds=2))
    assert "interval includes their sampling" in several
    assert "the interval spans at most two steps of the grid" in several


@pytest.mark.parametrize(
    ("score", "weights", "suggestion"),
    [
        (0.1, None, "--dims 10,10000,19 (at most as many as the model has weights)"),
        (0.1, 5000, "--dims 10,5000,17"),
        (0.1, 1000, "The target is not reached with all 1000 weights"),
        (0.85, None, "--dims 1,1000,19"),
    ],
)
def test_suggested_grid_is_wider_with_the_same_steps(score, weights, suggestion):
    """From 10 to 1000 in 13 points are 6 steps for a factor of 10, and so 16.2 for one of 500."""
    result = measure_intrinsic_dimension(lambda d, seed: 0.9 if d is None else score, grid(10, 1000, 13))
    assert suggestion in suggest_grid(result, weights)
    assert suggest_grid(result) in format_markdown(result)
    first, last, points = re.search(r"--dims (\d+),(\d+),(\d+)|$", suggest_grid(result, weights)).groups()
    if points:
        steps = math.log(int(last) / int(first)) / (int(points) - 1)
        assert steps == pytest.approx(math.log(100) / 12, rel=0.05)


@pytest.mark.parametrize("dims", [(64, 512, 2), (100, 1_000_000, 64), (8, 512, 6), (64, 16384, 33)])
def test_suggested_grid_with_larger_d_contains_the_measured_one(dims):
    result = measure_intrinsic_dimension(lambda d, seed: 0.9 if d is None else 0.1, grid(*dims))
    wider = re.search(r"--dims (\d+),(\d+),(\d+)", suggest_grid(result))
    assert wider
    assert set(grid(*map(int, wider.groups()))) > set(grid(*dims))


def test_no_grid_is_suggested_where_d_lies_inside_or_the_budget_ended():
    assert suggest_grid(measure_intrinsic_dimension(step, DIMS)) == ""
    ended = measure_intrinsic_dimension(lambda d, seed: 0.9 if d is None else 0.1, grid(10, 1000, 13), trials=7)
    assert re.fullmatch(
        r"No d above \d+ was measured. Measure with more trials or minutes \(measure --trials, .*", suggest_grid(ended)
    )


def test_score_of_full_fine_tuning_and_target_are_one_line():
    result = measure_intrinsic_dimension(step, DIMS)
    assert describe_target(result) == (
        "full fine-tuning scores 0.8000 (median of 3 seeds), the target is 0.7200 (0.9 of the score)"
    )
    single = measure_intrinsic_dimension(step, DIMS, seeds=1, majority=0.5, relative_to="gain")
    assert "0.8000 (one seed), the target is 0.7700 (0.9 of the gain)" in describe_target(single)


def test_collapsed_runs_are_counted_beside_the_target_and_advised_on_before_a_wider_grid():
    def scored(d, seed):
        return 0.8 if d is None else 0.5

    result = measure_intrinsic_dimension(scored, grid(10, 1000, 13), majority=0.5)
    runs = sum(point.seeds for point in result.points)
    line = describe_target(result)
    assert line.endswith(f"; collapsed runs: 0 of full fine-tuning, {runs} of {runs} in the subspace")
    assert suggest_grid(result).startswith("All runs in the subspace collapsed: try other learning rates (--learning-")
    assert "Measure a wider one: --dims" in suggest_grid(result)
    some = measure_intrinsic_dimension(
        lambda d, seed: 0.6 if d == 1000 else scored(d, seed), grid(10, 1000, 13), majority=0.5
    )
    assert "; collapsed runs: 0 of full fine-tuning" in describe_target(some)
    assert suggest_grid(some).startswith("d lies outside the grid")
