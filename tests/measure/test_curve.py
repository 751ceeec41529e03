"""The fit over d, its crossing of the target, and its interval."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm, sem, t
from sklearn.isotonic import IsotonicRegression

from peft_intrinsic.measure import grid
from peft_intrinsic.measure.curve import INSIDE, Curve, Runs, find_crossing, fit_monotone

GRID = grid()


def curve(scores, baseline, grid=GRID, **options) -> Curve:
    return Curve(grid, {d: Runs(found) for d, found in scores.items()}, Runs(baseline), **options)


def test_grid_holds_the_values_of_table_1_of_the_paper():
    """Table 1 of Aghajanyan et al. 2020, without 1000, which is on no such grid."""
    table = {1608, 8030, 1861, 9295, 1037, 1200, 2493, 1389, 896, 207, 774, 322}
    assert len(GRID) == 64
    assert table <= set(GRID)
    assert grid(2, 5, 4) == [2, 3, 5]
    with pytest.raises(ValueError, match="low=5, high=2"):
        grid(5, 2)


def test_monotone_fit_equals_scikit_learn():
    rng = np.random.default_rng(0)
    for _ in range(50):
        n = int(rng.integers(2, 15))
        means, counts = rng.normal(size=n) + np.arange(n) / 4, rng.integers(1, 5, n).astype(float)
        expected = IsotonicRegression().fit_transform(np.arange(n), means, sample_weight=counts)
        np.testing.assert_allclose(fit_monotone(means, counts), expected, atol=1e-12)


def test_crossing_is_interpolated_in_log_d():
    """From 10 to 1000 the score 0.5 is reached at 100."""
    dims = [1, 10, 50, 99, 101, 1000, 2000]
    assert find_crossing(dims, [10, 1000], np.array([0.0, 1.0]), 0.5) == 4
    assert find_crossing(dims, [10, 1000], np.array([0.0, 1.0]), 1.5) == len(dims)
    assert find_crossing(dims, [10, 1000], np.array([0.6, 1.0]), 0.5) == 1  # 1 is below the measured dims


@pytest.mark.parametrize("center", ["median", "mean"])
def test_interval_of_an_exact_curve_is_student_s_t(center):
    """The only uncertainty is that of three seeds of full fine-tuning."""
    baseline = [0.85, 0.9, 0.95]
    found = curve({d: [i / 63] * 2 for i, d in enumerate(GRID)}, baseline, center=center).estimate_interval()
    wider = 1.16 if center == "median" else 1.0
    ends = 0.9 * np.array(t.interval(INSIDE, 2, np.mean(baseline), wider * sem(baseline)))
    assert abs(found[0] - 63 * ends[0]) <= 2
    assert abs(found[1] - min(63 * ends[1], 64)) <= 2


def test_standard_error_of_the_median_equals_simulation():
    drawn = np.random.default_rng(0).normal(size=(2000, 20))
    whole = [Curve(GRID, {}, Runs(list(row))).estimate_error() for row in drawn[:200]]
    assert np.mean(whole) == pytest.approx(np.std(np.median(drawn, 1)), rel=0.08)
    plain = [Curve(GRID, {}, Runs(list(row)), center="mean").estimate_error() for row in drawn[:200]]
    assert np.mean(plain) == pytest.approx(20**-0.5, rel=0.05)


def test_sampling_of_examples_widens_the_interval_as_a_binomial_does():
    """Noiseless runs, each with more correct predictions than at smaller d. The only uncertainty is the sampling."""
    examples, dims = 1000, list(range(10, 74))
    rng = np.random.default_rng(0)
    rank = rng.permutation(examples)
    right = {d: np.stack([rank < 500 + 5 * (d - 10)] * 2).astype(np.uint8) for d in dims}
    points = {d: Runs([float(rows[0].mean())] * 2, 0, rows) for d, rows in right.items()}
    base = np.stack([rank < 750] * 3).astype(np.uint8)
    found = Curve(dims, points, Runs([0.75] * 3, 0, base))
    assert found.target == pytest.approx(0.675)
    low, high = found.estimate_interval()
    # At the crossing 0.9 · 750 predictions are correct: the difference of two means over the same examples.
    single = base[0] * 0.9 - right[45][0]
    half = norm.ppf((1 + INSIDE) / 2) * single.std() / examples**0.5 / 0.005
    assert high - low == pytest.approx(2 * half, abs=2)
    blind = Curve(dims, {d: Runs(runs.scores) for d, runs in points.items()}, Runs([0.75] * 3))
    assert blind.estimate_interval() == (35, 35)


def test_runs_without_correct_predictions_leave_the_sampling_of_others():
    """They are those of a d at which all collapsed."""
    rng = np.random.default_rng(0)
    right = {d: (rng.random((2, 400)) < 0.5 + 0.05 * i).astype(np.uint8) for i, d in enumerate((10, 20, 40, 80, 160))}
    points = {d: Runs(list(map(float, rows.mean(1))), 0, rows) for d, rows in right.items()}
    base = (rng.random((3, 400)) < 0.7).astype(np.uint8)
    whole = Curve(list(range(5, 200)), points, Runs([0.7] * 3, 0, base))
    some = Curve(whole.grid, {5: Runs([0.4, 0.4]), **points}, whole.baseline)
    assert some.estimate_interval() == pytest.approx(whole.estimate_interval(), abs=8)
    assert (
        some.estimate_interval(sampling=False)[1] - some.estimate_interval(sampling=False)[0]
        < some.estimate_interval()[1] - some.estimate_interval()[0]
    )


def test_scores_that_fall_again_do_not_hide_the_crossing():
    """Isotonic regression alone would pool the peak with the fall, and never reach the target."""
    rising = {d: [0.5 + 0.01 * i, 0.51 + 0.01 * i] for i, d in enumerate(GRID[:40])}
    falling = {d: [0.5, 0.51] for d in GRID[40:]}
    found = curve({**rising, **falling}, [0.9] * 3)
    assert found.find_index() == 31  # 0.505 + .01 · 31 = .815
    assert found.fit()[0] == GRID[:40]
    noise = np.random.default_rng(0).normal(size=(64, 3)) * 0.02
    level = curve({d: list(0.8 + 0.0005 * i + noise[i]) for i, d in enumerate(GRID)}, [0.9] * 3)
    assert len(level.fit()[0]) > 55  # noise alone makes no peak


def test_tie_spans_the_dims_within_one_example_of_the_target():
    shelf = curve(
        {100: [0.4], 1000: [0.8095], 10_000: [0.8105], 100_000: [0.9]}, [0.9] * 3, [100, 1000, 10_000, 100_000]
    )
    assert shelf.find_index() == 2
    assert shelf.find_tie(0.001) == (1, 3)
    assert shelf.find_tie(0.0001) == (2, 2)


def test_interval_includes_dims_below_the_measured_ones():
    """The largest d miss the target by less than the standard error of full fine-tuning."""
    found = curve({d: [0.8, 0.801, 0.799] for d in GRID[-8:]}, [0.87, 0.9, 0.93])
    assert (found.find_index(), found.estimate_interval()) == (64, (0, 64))


def test_interval_without_repeated_seeds_is_the_bracket():
    found = curve({100: [0.1], GRID[20]: [0.7], GRID[30]: [0.85], 1_000_000: [0.9]}, [0.9])
    assert 20 < found.find_index() < 30
    assert found.estimate_interval() == (21, 30)
