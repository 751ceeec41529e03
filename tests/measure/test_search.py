"""The search on curves whose d90 is known, a few of those in benchmarks/simulations.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers.steps import build_search
from simulations import simulate

from peft_intrinsic.measure import grid
from peft_intrinsic.measure.evidence import TUNING
from peft_intrinsic.measure.plan import Plan
from peft_intrinsic.measure.search import Search

GRID = tuple(grid())


def run_search(score, at_once=1, dims=GRID, **plan) -> tuple[Search, str, list]:
    asked: list = []

    def evaluate(wanted):
        asked.extend(wanted)
        return [0.9 if d is None else score(d, seed) for d, seed, _ in wanted]

    search = build_search(evaluate, Plan(dims, **plan), slots=3 * at_once)
    return search, search.run(), asked


def step(at: int):
    return lambda d, seed: 0.9 if d >= GRID[at] else 0.2


@pytest.mark.parametrize("at", [0, 1, 7, 31, 40, 62, 63])
@pytest.mark.parametrize("at_once", [1, 5])
def test_step_is_located_exactly_without_repeated_trials(at, at_once):
    search, stopped, asked = run_search(step(at), at_once=at_once)
    curve = search.evidence.build_curve()
    assert curve.find_index() == at
    assert curve.estimate_interval() == (at, at)
    assert len(asked) == len(set(asked)) == len(search.evidence.trials)
    first = "the target is reached at the smallest dimension"
    assert stopped == (first if at == 0 else "the interval spans at most two steps of the grid")


def test_search_does_not_measure_far_above_the_crossing():
    _, _, asked = run_search(step(10))
    assert max(d for d, _, _ in asked if d) <= GRID[27]


def test_plateau_just_below_the_target_does_not_reach_it():
    search, _, _ = run_search(lambda d, seed: 0.95 if d >= GRID[50] else 0.8099 if d >= GRID[20] else 0.3)
    assert search.evidence.build_curve().find_index() == 50


def test_targets_outside_the_grid_end_the_search():
    search, stopped, asked = run_search(lambda d, seed: 0.5)
    assert search.evidence.build_curve().estimate_interval() == (64, 64)
    assert len(asked) <= 3 + 8 + 3 * 8
    assert stopped == "the target is not reached at the largest dimensions"
    search, stopped, _ = run_search(lambda d, seed: 0.85)
    assert search.evidence.build_curve().find_index() == 0
    assert stopped == "the target is reached at the smallest dimension"


def test_gain_is_relative_to_the_majority_class():
    """0.6 + 0.9 · (0.9 − 0.6) = 0.87 instead of 0.81."""
    found = lambda d, seed: 0.88 if d >= GRID[30] else 0.82  # noqa: E731
    search, _, _ = run_search(found, majority=0.6, relative_to="gain")
    assert search.evidence.build_curve().target == pytest.approx(0.87)
    assert search.evidence.build_curve().find_index() == 30
    assert search.evidence.build_curve("score").find_index() == 0  # the same trials


def test_search_stops_at_its_budget_of_trials_and_of_minutes(monkeypatch):
    search, stopped, asked = run_search(step(31), trials=20)
    assert (stopped, len(asked)) == ("the budget of 20 trials is spent", 20)
    low, high = search.evidence.build_curve().estimate_interval()
    assert low <= 31 <= high
    _, stopped, asked = run_search(step(31), minutes=0.0)
    assert (stopped, asked) == ("the budget of 0 minutes is spent", [])


def test_sweep_measures_the_whole_grid():
    _, stopped, asked = run_search(step(3), sweep=True, at_once=4)
    assert stopped == "the whole grid was measured"
    assert sorted({d for d, _, _ in asked if d}) == list(GRID)
    assert len(asked) == 3 + 3 * 64
    _, _, asked = run_search(step(3), sweep=True, learning_rates=("auto", "auto"))
    seeds = [seed for d, seed, _ in asked if d]
    assert TUNING not in seeds[seeds.index(0) :]  # between two d of the scan no learning rates are tried


def test_progress_reports_the_trials_left_at_most():
    shown: list = []
    build_search(
        lambda wanted: [0.9 if d is None or d >= GRID[31] else 0.2 for d, _, _ in wanted],
        Plan(GRID, trials=40),
        progress=lambda doing, left: shown.append((doing, left)),
    ).run()
    assert shown[0] == ("full fine-tuning", 40)
    assert [left for _, left in shown] == sorted((left for _, left in shown), reverse=True)
    assert shown[1][0] == "scan at d = 100"
    shown.clear()
    build_search(
        lambda wanted: [0.9] * len(wanted), Plan(GRID, sweep=True), progress=lambda *row: shown.append(row)
    ).run()
    assert [left for _, left in shown] == [3 * 64, *range(3 * 64, 0, -3)]


def search_rates(optimum, rates, seen):
    """Each factor of 4 from the best learning rate costs 0.1; one above 1 diverges."""

    def evaluate(wanted):
        seen.extend(wanted)
        found = []
        for d, _, rate in wanted:
            level = 0.9 if d is None or d >= GRID[31] else 0.2
            found.append(math.nan if rate > 1 else level - 0.1 * abs(math.log(rate / optimum(d), 4)))
        return found

    search = build_search(evaluate, Plan(GRID, learning_rates=rates))
    search.run()
    return search.evidence


@pytest.mark.parametrize("rates", [((1e-3, 4e-3, 4.0), (1e-3, 4e-3, 1.6e-2)), ("auto", "auto")])
def test_learning_rate_is_chosen_at_each_d_of_the_scan(rates):
    """The best one falls with d. The seed that chooses does not count otherwise, and full fine-tuning has as many to
    choose from."""
    seen: list = []
    evidence = search_rates(lambda d: 1e-3 if d is None else 1.6e-2 if d < 500 else 4e-3, rates, seen)
    near = 1.0 if rates[0] != "auto" else 1.6
    assert evidence.get_rate(None) == pytest.approx(1e-3, rel=near)
    assert evidence.get_rate(100) == pytest.approx(1.6e-2, rel=near)
    assert evidence.get_rate(GRID[31]) == pytest.approx(4e-3, rel=near)
    assert evidence.build_curve().find_index() == 31
    assert {seed for d, seed, rate in seen if rate != evidence.get_rate(d)} == {TUNING}
    assert TUNING not in evidence.get_seeds(None)
    assert not evidence.is_at_edge(None) or rates[0] != "auto"
    assert len(seen) <= 60


def test_middle_of_equal_learning_rates_is_chosen():
    """Also, no further ones are tried."""
    search = build_search(lambda wanted: [0.9] * len(wanted), Plan(GRID, learning_rates=("auto", "auto")))
    search.run()
    assert search.evidence.get_tuning_scores(100) == {5e-5: 0.9, 2e-4: 0.9, 8e-4: 0.9}
    assert search.evidence.choose_rate(100) == 2e-4


def test_parallel_slots_try_learning_rates_of_several_dims_in_one_round():
    rounds: list = []

    def evaluate(wanted):
        rounds.append(wanted)
        return [0.9 if d is None or d >= GRID[31] else 0.2 for d, *_ in wanted]

    build_search(evaluate, Plan(GRID, baseline=(0.9,), learning_rates=("auto", "auto")), slots=6).run()
    assert [(d, seed) for d, seed, _ in rounds[0]] == [(GRID[0], TUNING)] * 3 + [(GRID[9], TUNING)] * 3


def test_list_of_learning_rates_is_continued_while_the_best_is_an_end():
    """Also below a learning rate that was best at a smaller d, where higher ones diverge."""
    seen: list = []
    evidence = search_rates(lambda d: 1e-2 if d and d < 200 else 1e-4, ((1e-4, 1e-3, 1e-2), (1e-4, 1e-3, 1e-2)), seen)
    assert (evidence.get_rate(100), evidence.get_rate(GRID[31])) == (1e-2, 1e-4)

    def diverges(wanted):
        return [math.nan if d and d > 100 and rate > 2e-4 else step(31)(d or 10**6, 0) for d, _, rate in wanted]

    search = build_search(diverges, Plan(GRID, learning_rates=((1e-4, 4e-4, 1.6e-3), (1e-4, 4e-4, 1.6e-3))))
    search.run()
    assert search.evidence.build_curve().find_index() == 31


def test_search_accepts_scores_of_zero():
    search = build_search(
        lambda wanted: [0.5 if d is None else 0.0 for d, _, _ in wanted],
        Plan(GRID, learning_rates="auto", majority=0.0),
    )
    search.run()
    assert search.evidence.build_curve().estimate_interval() == (64, 64)


@pytest.mark.parametrize("at_once", [1, 7])
@pytest.mark.parametrize("trials", range(4, 24))
def test_no_budget_is_exceeded(trials, at_once):
    _, stopped, asked = run_search(step(31), trials=trials, at_once=at_once)
    assert len(asked) <= trials
    assert stopped.startswith("the budget of") or len(asked) < trials


def test_full_fine_tuning_that_learns_nothing_tries_higher_learning_rates():
    search = build_search(
        lambda wanted: [0.9 if rate > 1e-3 else 0.5 for _, _, rate in wanted],
        Plan(GRID, learning_rates=("auto", "auto"), majority=0.5),
    )
    search._measure_baseline()
    assert search.evidence.get_rate(None) > 1e-3


def test_search_repeats_the_scan_where_every_run_was_at_a_learning_rate_that_no_longer_counts():
    """At 2e-4 the tuning seed learns, and the runs of all d up to 8 collapse. Then another learning rate counts."""

    def score(d, seed, rate):
        collapses = rate == 2e-4 and seed != TUNING and d <= 8
        return 0.4 if collapses else 0.7 + 0.05 * math.log2(d)

    search = build_search(
        lambda wanted: [0.98 if d is None else score(d, seed, rate) for d, seed, rate in wanted],
        Plan((1, 2, 4, 8, 16, 32), learning_rates="auto", majority=0.5, baseline_seeds=3),
    )
    search.run()
    points = search.evidence.build_curve().points
    assert search.grid[search.evidence.build_curve().find_index()] == 16
    assert {search.evidence.get_rate(d) for d in points} == {8e-4}
    assert not any(runs.collapsed for runs in points.values())


def test_learning_rates_that_all_diverge_raise():
    with pytest.raises(ValueError, match=r"no finite score for d=None at any of the learning rates \[2.0, 3.0\]"):
        search_rates(lambda d: 1e-3, ((2.0, 3.0), (1e-3, 2e-3)), [])


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_collapsed_runs_are_counted_but_not_aggregated(share):
    rng = np.random.default_rng(0)
    search, _, _ = run_search(lambda d, seed: 0.5 if rng.random() < share else step(31)(d, seed), majority=0.5)
    evidence = search.evidence
    curve = evidence.build_curve()
    above = [runs for d, runs in curve.points.items() if d >= GRID[31]]
    assert curve.find_index() == 31
    assert (sum(runs.collapsed for runs in above) > 0) == (share > 0)
    assert {score for runs in above for score in runs.scores} == {0.9}


def test_full_fine_tuning_gets_seeds_as_far_as_they_narrow_the_interval():
    """If it varies it gets more, else three; a given number is unchanged."""

    def run(spread, **plan):
        rng = np.random.default_rng(0)

        def evaluate(wanted):
            noise = rng.normal(size=len(wanted))
            return [
                0.9 + spread * x if d is None else 0.7 + 0.2 / (1 + math.exp(8 - math.log(d))) + 0.002 * x
                for (d, _, _), x in zip(wanted, noise, strict=True)
            ]

        search = build_search(evaluate, Plan(GRID, **plan))
        search.run()
        return len(search.evidence.get_seeds(None))

    assert run(0.0) == 3
    assert run(0.05) >= 12
    assert run(0.05, baseline_seeds=4) == 4


KINDS = [("logistic", 40), ("mrpc", 20), ("collapse both", 30), ("dip", 30), ("rate falls, auto", 20)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "curves"), KINDS)
def test_intervals_cover_and_searches_are_short(kind, curves):
    """With few curves, two more than one in ten may miss."""
    rows = [simulate(kind, number) for number in range(curves)]
    assert sum(not row["covered"] for row in rows) <= 0.1 * curves + 2
    assert not any(row["wrongly not reached"] for row in rows)
    if kind == "logistic":  # not because it is wide
        assert np.median([row["steps"] for row in rows]) <= 4
        assert np.mean([row["trials"] for row in rows]) <= 55  # of a budget of 60
