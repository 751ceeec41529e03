"""A task whose d90 is known, the first d of the grid from 100 on; and searches of which every score is given."""

from __future__ import annotations

from peft_intrinsic.measure import grid
from peft_intrinsic.measure.evidence import Evidence
from peft_intrinsic.measure.plan import Plan
from peft_intrinsic.measure.search import Search

DIMS = grid(10, 1000, 20)


def step(d, seed, *rate) -> float:
    return 0.8 if d is None or d >= 100 else 0.4


def build_search(score_trials, plan: Plan, **options) -> Search:
    """A search whose trials have the scores that a function of their list returns."""
    return Search(lambda trials: [{"score": score} for score in score_trials(trials)], Evidence(plan), **options)
