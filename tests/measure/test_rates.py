"""Which learning rate counts, for scores whose sums are computed by hand."""

from __future__ import annotations

import math

import pytest
from helpers.steps import build_search

from peft_intrinsic.measure.evidence import TUNING, Evidence
from peft_intrinsic.measure.plan import Plan
from peft_intrinsic.measure.search import Search

DIGITS = {
    22: {5e-5: 0.216, 2e-4: 0.352, 8e-4: 0.352, 3.2e-3: 0.280},
    43: {5e-5: 0.492, 2e-4: 0.688, 8e-4: 0.678, 3.2e-3: 0.638},
    95: {5e-5: 0.704, 2e-4: 0.810, 8e-4: 0.850, 3.2e-3: 0.854, 1.28e-2: 0.668},
    209: {8e-4: 0.914, 3.2e-3: 0.904, 1.28e-2: 0.922, 5.12e-2: 0.888},
}
"""Scores of a network on digits (benchmarks/digits_width.py), one seed."""


def evidence(
    tried: dict[int, dict[float, float]], *more: tuple[int, int, float, float], majority: float | None = None
) -> Evidence:
    trials = [(d, TUNING, rate, score) for d, scores in tried.items() for rate, score in scores.items()]
    rows = {
        str(i): {"d": d, "seed": seed, "learning_rate": rate, "score": score}
        for i, (d, seed, rate, score) in enumerate([*trials, *more])
    }
    return Evidence(Plan((10, 1000), baseline=0.98, learning_rates="auto", majority=majority), rows)


@pytest.mark.parametrize(("d", "rate"), [(22, 8e-4), (43, 2e-4), (95, 8e-4), (209, 8e-4)])
def test_learning_rates_of_two_smaller_dims_count(d, rate):
    """At 209 the learning rate 8e-4 loses 0.008 + 0.004 + 0.010, 3.2e-3 loses 0.018 + 0 + 0.050, and 1.28e-2, the best
    of 209 alone, 0 + 0.186 + 0.050 (that of the nearest at 43). At 43, 2e-4 loses nothing. At 95, 8e-4 loses
    0.004 + 0.010, 2e-4 loses 0.044, 3.2e-3 loses 0.050 + 0.072. At 22 two are equal, and the upper one is chosen."""
    assert evidence(DIGITS).choose_rate(d) == rate


def test_learning_rates_of_larger_dims_do_not_count():
    assert [evidence({at: DIGITS[at] for at in DIGITS if at <= d}).choose_rate(d) for d in DIGITS] == [
        evidence(DIGITS).choose_rate(d) for d in DIGITS
    ]


def test_between_two_dims_the_least_loss_at_both_decides():
    """2e-4 is best at 100 and loses 0.09 at 400; 8e-4 loses 0.03 at 100 and is best at 400. Its loss is the least."""
    tried = {100: {2e-4: 0.63, 8e-4: 0.60}, 400: {2e-4: 0.71, 8e-4: 0.80}}
    assert [evidence(tried).get_rate(d) for d in (50, 100, 101, 399, 400, 900)] == [2e-4, 2e-4, 8e-4, 8e-4, 8e-4, 8e-4]


def test_learning_rate_of_a_measured_d_is_unchanged():
    tried = {100: {2e-4: 0.63, 8e-4: 0.60}, 400: {2e-4: 0.71, 8e-4: 0.80}}
    assert evidence(tried, (200, 0, 2e-4, 0.7)).get_rate(200) == 2e-4


def test_diverged_learning_rate_has_the_loss_of_the_worst():
    """8e-4 loses nothing at 400 and, diverged, 0.3 as the worst at 100; 2e-4 loses 0.2 and nothing."""
    tried = {100: {5e-5: 0.3, 2e-4: 0.6, 8e-4: math.nan}, 400: {2e-4: 0.6, 8e-4: 0.8}}
    assert evidence(tried).choose_rate(400) == 2e-4
    assert evidence({400: tried[400]}).choose_rate(400) == 8e-4


def test_no_learning_rate_is_chosen_where_all_diverged():
    tried = {100: {2e-4: 0.6}, 400: {2e-4: math.nan, 8e-4: math.nan}}
    assert evidence(tried).choose_rate(400) is None
    assert evidence(tried).get_rate(400) == 2e-4


HIGHER = {400: {2e-4: 0.78, 8e-4: 0.80}}
"""8e-4 is better by 0.02 on one seed; the majority-class baseline has 0.5."""


@pytest.mark.parametrize(("collapsed", "runs", "rate"), [(0, 9, 8e-4), (3, 9, 2e-4), (1, 39, 8e-4)])
def test_learning_rate_at_which_runs_collapse_is_expected_to_score_less(collapsed, runs, rate):
    """With the tuning run, 3 of 10 runs at 8e-4 score 0.3 less, so it loses 0.09; 1 of 40 loses 0.0075, which is less
    than the 0.02 of 2e-4."""
    more = [(450 + i, 0, 8e-4, 0.5 if i < collapsed else 0.8) for i in range(runs)]
    found = evidence(HIGHER, *more, majority=0.5)
    assert found.get_collapsed_fraction(400, 8e-4) == pytest.approx(collapsed / (runs + 1))
    assert (found.choose_rate(400), found.get_rate(430)) == (rate, rate)


@pytest.mark.parametrize(("collapsed", "rate"), [(1, 8e-4), (2, 2e-4)])
def test_unstable_learning_rate_is_chosen_only_where_no_other_is_stable(collapsed, rate):
    """2 of 10 runs lose 0.06 of 0.2, but that is more than one in ten. Then 2e-4 collapses as often, and its loss
    decides."""
    tried = {400: {2e-4: 0.60, 8e-4: 0.80}}
    more = [(450 + i, 0, 8e-4, 0.5 if i < collapsed else 0.8) for i in range(9)]
    assert evidence(tried, *more, majority=0.5).choose_rate(400) == rate
    more += [(450 + i, 0, 2e-4, 0.5 if i < 2 else 0.6) for i in range(9)]
    assert evidence(tried, *more, majority=0.5).choose_rate(400) == 8e-4


def test_learning_rate_that_never_learned_is_not_stable():
    tried = {400: {5e-5: 0.5, 8e-4: 0.80}}
    more = [(450 + i, 0, 8e-4, 0.5 if i < 4 else 0.8) for i in range(9)]
    assert evidence(tried, *more, majority=0.5).choose_rate(400) == 8e-4


def test_collapses_below_the_least_d_that_learns_do_not_count():
    more = [(d, seed, 8e-4, 0.5) for d in (100, 200, 300) for seed in range(3)]
    found = evidence(HIGHER, *more, majority=0.5)
    assert found.get_collapsed_fraction(400, 8e-4) == 0
    assert found.choose_rate(400) == 8e-4


def test_diverged_runs_count_as_collapsed_without_a_majority_class():
    """2 of 3 runs at 8e-4 lose the 0.3 between it and the worst of the d: 0.2 is more than 0.1."""
    tried = {400: {5e-5: 0.5, 2e-4: 0.7, 8e-4: 0.8}}
    assert evidence(tried).choose_rate(400) == 8e-4
    assert evidence(tried, *[(450 + i, 0, 8e-4, math.nan) for i in range(2)]).choose_rate(400) == 2e-4


def test_full_fine_tuning_leaves_a_learning_rate_at_which_runs_collapse():
    """Two of the three runs at the best learning rate of one seed collapse: 3 more run at the next best."""
    seen: list = []
    high, low = 1.6e-4, 4e-5

    def evaluate(wanted):
        seen.extend(wanted)
        scores = {1e-5: 0.6, low: 0.88, high: 0.9, 6.4e-4: 0.5}
        return [
            0.2 if d else 0.5 if (rate, seed) in ((high, 0), (high, 2)) else scores[rate] for d, seed, rate in wanted
        ]

    search = build_search(evaluate, Plan((10, 1000), learning_rates="auto", majority=0.5))
    search._measure_baseline()
    assert [(seed, rate) for _, seed, rate in seen if seed != TUNING] == [(i, high) for i in range(3)] + [
        (i, low) for i in range(3)
    ]
    assert search.evidence.get_rate(None) == low
    assert search.evidence.get_runs(None).scores == [0.88] * 3


def plateau(learned: dict[float, float]) -> Search:
    """A LoRA of rank 1 on SST-2: 500 held-out sentences, whose majority class has 0.504."""
    scores = {5e-5: 0.524, 2e-4: 0.504, 8e-4: 0.504, 3.2e-3: 0.512, **learned}

    def run(trials):
        return [{"score": scores.get(rate, 0.506), "examples": 500, "right": ""} for _, _, rate in trials]

    return Search(run, Evidence(Plan((1, 2, 4), baseline=(0.8,), learning_rates="auto", majority=0.504)))


def test_scores_within_chance_of_the_majority_class_choose_no_learning_rate():
    """0.524 is 0.9 standard errors above 0.504, so higher learning rates follow until one learns."""
    search = plateau({3.2e-3: 0.74, 1.28e-2: 0.69})
    assert search._tune([1], None) == 3.2e-3
    assert list(search.evidence.get_tuning_scores(1)) == [5e-5, 2e-4, 8e-4, 3.2e-3, 1.28e-2]


def test_where_no_learning_rate_learns_the_next_d_starts_from_the_middle():
    search = plateau({})
    assert search._tune([1], None) == 3.2e-3
    assert len(search.evidence.get_tuning_scores(1)) == 7
    assert search._tune([2], 3.2e-3) == 3.2e-3
    assert list(search.evidence.get_tuning_scores(2)) == [8e-4, 3.2e-3, 1.28e-2]
