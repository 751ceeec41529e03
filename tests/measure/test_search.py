"""The search on curves whose d90 is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import sem, t
from sklearn.isotonic import IsotonicRegression

from peft_intrinsic.measure import grid
from peft_intrinsic.measure.curve import Curve, crossing, monotone
from peft_intrinsic.measure.search import Search

GRID = grid()
BASELINE = [0.9, 0.9, 0.9]  # target .81


def searched(score, baseline=BASELINE, **options) -> tuple[Search, str, list[tuple[int, int]]]:
    asked: list[tuple[int, int]] = []

    def evaluate(wanted):
        asked.extend(wanted)
        return [score(d, seed) for d, seed in wanted]

    search = Search(evaluate, GRID, baseline, **options)
    return search, search.run(sweep=options.pop("sweep", False)), asked


def test_grid_holds_the_values_of_the_paper_s_table():
    """Table 1 of Aghajanyan et al. 2020; 1000 is the one value that is on no such grid."""
    table = {1608, 8030, 1861, 9295, 1037, 1200, 2493, 1389, 896, 207, 774, 322}
    assert len(GRID) == 64
    assert table <= set(GRID)
    assert grid(2, 5, 4) == [2, 3, 5]
    with pytest.raises(ValueError, match="low=5, high=2"):
        grid(5, 2)


def test_monotone_fit_against_scikit_learn():
    rng = np.random.default_rng(0)
    for _ in range(50):
        n = int(rng.integers(2, 15))
        means, counts = rng.normal(size=n) + np.arange(n) / 4, rng.integers(1, 5, n)
        expected = IsotonicRegression().fit_transform(np.arange(n), means, sample_weight=counts)
        np.testing.assert_allclose(monotone(list(range(n)), means, counts), expected, atol=1e-12)


def test_the_spread_of_three_baselines_is_student_s():
    """A score known at every d: the interval is that of the target, from scipy's t distribution."""
    baseline = [0.85, 0.9, 0.95]
    low, high = Curve(GRID, {d: [i / 63] * 2 for i, d in enumerate(GRID)}, baseline).interval()
    ends = 0.9 * np.array(t.interval(0.9, 2, np.mean(baseline), sem(baseline)))
    assert abs(low - 63 * ends[0]) <= 2
    assert abs(high - min(63 * ends[1], 64)) <= 2


def test_crossing_between_measured_dimensions():
    """Linear in log d: from 10 to 1000 the score of 0.5 is reached at 100."""
    dims = [1, 10, 50, 99, 101, 1000, 2000]
    assert crossing(dims, [10, 1000], np.array([0.0, 1.0]), 0.5) == 4
    assert crossing(dims, [10, 1000], np.array([0.0, 1.0]), 1.5) == len(dims)
    assert crossing(dims, [10, 1000], np.array([0.6, 1.0]), 0.5) == 1  # nothing is known of 1


@pytest.mark.parametrize("at", [0, 1, 7, 31, 40, 62, 63])
def test_a_step_is_found_exactly(at):
    search, stopped, asked = searched(lambda d, seed: 0.9 if d >= GRID[at] else 0.2)
    assert search.curve.index() == at
    assert search.curve.interval() == (at, at)
    assert len(asked) == len(set(asked))
    assert stopped == (
        "the target is reached at the smallest dimension" if at == 0 else "the bracket is one step of the grid"
    )


def test_a_plateau_just_below_the_target_does_not_count():
    search, _, _ = searched(lambda d, seed: 0.95 if d >= GRID[50] else 0.8099 if d >= GRID[20] else 0.3)
    assert search.curve.index() == 50


def test_never_and_always():
    search, stopped, asked = searched(lambda d, seed: 0.5)
    assert (search.curve.index(), len(asked)) == (64, 12)
    assert search.curve.interval() == (64, 64)
    assert stopped == "the target is not reached at the largest dimensions"
    search, stopped, asked = searched(lambda d, seed: 0.85)
    assert search.curve.index() == 0
    assert stopped == "the target is reached at the smallest dimension"


def test_gain_over_a_floor():
    """.6 + .9 · (.9 − .6) = .87 instead of .81."""
    search, _, _ = searched(lambda d, seed: 0.88 if d >= GRID[30] else 0.82, floor=0.6)
    assert search.curve.target == pytest.approx(0.87)
    assert search.curve.index() == 30


def test_budgets():
    search, stopped, asked = searched(lambda d, seed: 0.9 if d >= GRID[31] else 0.2, trials=10)
    assert stopped == "the budget of 10 trials is spent"
    assert len(asked) == 9  # 63, 0, 31
    assert 0 < search.curve.index() <= 31
    assert search.curve.interval() == (1, 31)
    search, stopped, asked = searched(lambda d, seed: 0.9 if d >= GRID[31] else 0.2, trials=3)
    assert (search.curve.index(), search.curve.interval()) == (63, (0, 63))
    _, stopped, asked = searched(lambda d, seed: 0.9, minutes=0.0)
    assert (stopped, asked) == ("the budget of 0 minutes is spent", [])


def test_progress_says_how_many_trials_are_left():
    """An estimate, never less than nothing, that ends at the last round's own number."""
    told = []
    done = []

    def evaluate(wanted):
        done.append(len(wanted))
        return [0.9 if d >= GRID[31] else 0.2 for d, _ in wanted]

    Search(evaluate, GRID, BASELINE, progress=lambda *news: told.append(news)).run()
    assert [low <= GRID[31] <= high or low == GRID[31] for low, high, _ in told] == [True] * len(told)
    assert told[-1][2] == done[-1]
    total = sum(done)
    assert abs(told[0][2] - total) <= 0.25 * total


def test_sweep_measures_the_whole_grid():
    asked = []
    search = Search(lambda wanted: [asked.append(t) or 0.9 for t in wanted], GRID, BASELINE)
    assert search.run(sweep=True) == "the whole grid was measured"
    assert sorted({d for d, _ in asked}) == GRID
    assert len(asked) == 3 * 64


def noisy(number: int) -> tuple[bool, int]:
    """One random logistic curve: whether the interval covers the truth, and how many trials were run."""
    rng = np.random.default_rng(number)
    center, width = rng.uniform(np.log(300), np.log(300_000)), rng.uniform(0.3, 1.5)
    spread, start, end = rng.uniform(0.003, 0.02), rng.uniform(0.5, 0.7), rng.uniform(0.8, 0.95)

    def truth(d: float) -> float:
        return start + (end - start) / (1 + np.exp(-(np.log(d) - center) / width))

    full = end + 0.005
    least = next((i for i, d in enumerate(GRID) if truth(d) >= 0.9 * full), len(GRID))
    search, _, asked = searched(
        lambda d, seed: truth(d) + spread * rng.normal(), [full + spread * rng.normal() for _ in range(3)]
    )
    low, high = search.curve.interval()
    return low <= least <= high, len(asked)


def test_intervals_cover_and_searches_are_short():
    """200 noisy curves: a 90 % interval must cover in 85 % at least, with a third of the grid's trials at most."""
    covered, trials = zip(*(noisy(number) for number in range(200)), strict=True)
    assert np.mean(covered) >= 0.85
    assert max(trials) <= 3 * 64 / 3
    # Not by being vacuous: a curve with the least noise has a narrow interval.
    search, _, _ = searched(lambda d, seed: 0.9 / (1 + np.exp(-(np.log(d) - 8))) + 1e-4 * seed)
    low, high = search.curve.interval()
    assert high - low <= 1


def plateau(number: int) -> bool:
    """A step to a plateau little above the target, and full fine-tuning that is less certain than the curve."""
    rng = np.random.default_rng(number)
    level = rng.uniform(0.812, 0.825)
    search, _, _ = searched(
        lambda d, seed: (level if d >= GRID[30] else 0.5) + 0.003 * rng.normal(),
        [0.9 + 0.02 * rng.normal() for _ in range(3)],
    )
    low, high = search.curve.interval()
    return low <= 30 <= high


def test_an_interval_covers_where_the_largest_dimensions_are_near_the_target():
    assert np.mean([plateau(number) for number in range(100)]) >= 0.85


def test_a_crossing_below_what_was_measured_is_not_excluded():
    """The largest dimensions fail by less than full fine-tuning is uncertain."""
    curve = Curve(GRID, {d: [0.8, 0.801, 0.799] for d in GRID[-8:]}, [0.87, 0.9, 0.93])
    assert (curve.index(), curve.interval()) == (64, (0, 64))


def test_interval_without_repeated_seeds_is_the_bracket():
    curve = Curve(GRID, {100: [0.1], GRID[20]: [0.7], GRID[30]: [0.85], 1_000_000: [0.9]}, [0.9])
    assert 20 < curve.index() < 30
    assert curve.interval() == (21, 30)


def test_more_numbers_that_do_worse_at_the_end():
    """The largest d alone is below the target: the search looks lower before it gives up."""
    search, stopped, _ = searched(lambda d, seed: 0.8 if d == GRID[-1] else 0.88 if d >= GRID[25] else 0.3)
    assert search.curve.index() == 25
    assert stopped == "the bracket is one step of the grid"


def test_a_budget_cuts_a_round_short():
    def score(d, seed):
        return 0.9 if d >= GRID[31] else 0.2

    search, stopped, asked = searched(score, trials=30, at_once=10)
    assert (len(asked), stopped) == (30, "the budget of 30 trials is spent")
    low, high = search.curve.interval()
    assert low <= 31 <= high <= low + 12


@pytest.mark.parametrize("at_once", [2, 5])
@pytest.mark.parametrize("at", [0, 1, 31, 62, 63])
def test_several_dimensions_at_once_find_the_same_in_fewer_rounds(at_once, at):
    rounds = []

    def evaluate(wanted):
        rounds.append(len(wanted))
        return [0.9 if d >= GRID[at] else 0.2 for d, _ in wanted]

    search = Search(evaluate, GRID, BASELINE, at_once=at_once)
    search.run()
    assert search.curve.index() == at
    assert len(rounds) <= 1 + np.ceil(np.log(63) / np.log(at_once + 1)) + 2
