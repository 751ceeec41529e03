"""What trials say: chosen learning rates, collapsed runs, the curve. Nothing runs here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from ..trials.engine import Trial
from .curve import TINY, Curve, Runs
from .plan import Plan

BELOW = 2
"""At how many d before it learning rates that were tried help to choose one."""

TOLERATED = 0.1
"""Share of collapsed runs above which a learning rate is chosen only if no other has fewer."""

DOCUMENTED = 2e-4
"""The documented learning rate: a run at it, or below, that learned nothing was rather too short (docs/tuner.md)."""

TUNING = 10_000
"""The seed on which learning rates are tried: its scores choose, so they do not count."""


def collapsed(score: float | None, least: float | None) -> bool:
    """Whether a run is no better than the trivial answer, or diverged."""
    return score is None or not math.isfinite(score) or (least is not None and score <= least + 1e-9)


def describe_collapse(
    score: float,
    least: float,
    learning_rate: float,
    metric: str = "accuracy",
    baseline: str = "majority class",
    one_class: bool = False,
) -> str:
    """Say that a run collapsed, and what to try.

    Args:
        score: of the run.
        least: of the baseline.
        learning_rate: of the run.
        metric: name of the score.
        baseline: what the run is compared with.
        one_class: whether the model predicts one class for every example.
    """
    return (
        f"Training collapsed: the model {'predicts one class for every example' if one_class else 'learned nothing'}. "
        f"Its {metric} is {score:.4f}, that of the {baseline} {least:.4f}. "
        + (
            f"Try a lower learning rate ({learning_rate / 4:g} instead of {learning_rate:g}), or a longer warm-up."
            if learning_rate > DOCUMENTED
            else "Train for more steps first, then try a learning rate of up to 4e-4 with a longer warm-up."
        )
    )


class Evidence:
    """The trials of one run, in the light of a plan.

    Args:
        found: scores of trials that the plan asks for, NaN for one without a finite score.
        plan: what is asked.
        least: score of the trivial answer: the majority class, or the untrained model. A run that is no better
            collapsed.
        right: which examples of the held-out data trials have right, where known.
    """

    def __init__(
        self,
        found: Mapping[Trial, float],
        plan: Plan,
        least: float | None = None,
        right: Mapping[Trial, np.ndarray] | None = None,
    ) -> None:
        self.found, self.plan, self.least, self.right = found, plan, least, right or {}

    def tried(self, d: int | None) -> dict[float, float]:
        """Scores of the learning rates tried at a d, or (None) of full fine-tuning; NaN of one that diverged."""
        rows = {rate: score for (at, seed, rate), score in self.found.items() if (at, seed) == (d, TUNING)}
        return {rate: rows[rate] for rate in sorted(rate for rate in rows if rate)}

    def tuned(self, d: int | None) -> float | None:
        """The learning rate with the least loss at a d and at the `BELOW` d before it where learning rates were tried;
        of equally good ones the middle; None where none was tried, or all diverged. (One seed alone often prefers the
        worse of two that are nearly as good, and the best learning rate changes little from one d to the next.)"""
        below = [] if d is None else [at for at in self.places() if at < d][-BELOW:]
        return self._least_lost([rate for rate, score in self.tried(d).items() if math.isfinite(score)], [*below, d])

    def places(self) -> list[int]:
        """The d at which rates were tried, and one did not diverge."""
        tried = {at for at, seed, _ in self.found if at and seed == TUNING}
        return sorted(at for at in tried if any(map(math.isfinite, self.tried(at).values())))

    def _least_lost(self, rates: Sequence[float], places: Sequence[int | None]) -> float | None:
        stable = [rate for rate in rates if self.collapses(places[-1], rate) <= TOLERATED]
        lost = {rate: sum(self._lost(at, rate) for at in places) for rate in stable or rates}
        best = sorted(rate for rate, much in lost.items() if much <= min(lost.values()) + TINY)
        return best[len(best) // 2] if best else None

    def _lost(self, d: int | None, rate: float) -> float:
        """By how much a learning rate, or the nearest that was tried, is expected to be behind the best of a d: its
        score there, of which as many runs as collapse at it have only the trivial answer's. One that diverged there is
        as far behind as the worst."""
        tried = self.tried(d)
        finite = [score for score in tried.values() if math.isfinite(score)]
        score = tried[min(tried, key=lambda other: abs(math.log(other / rate)))]
        worst = min(finite)
        score = score if math.isfinite(score) else worst
        trivial = worst if self.least is None else min(self.least, score)
        return max(finite) - score + self.collapses(d, rate) * (score - trivial)

    def collapses(self, d: int | None, rate: float) -> float:
        """The share of runs at a learning rate that collapsed, over all seeds, and over all d of the subspace from the
        least at which a run did not: below it there may be too few parameters for any learning rate. One where all runs
        did has the share 1."""
        full = d is None
        runs = [(at or 0, score) for (at, _, used), score in self.found.items() if (at is None, used) == (full, rate)]
        learned = min((at for at, score in runs if not self.collapsed(score)), default=math.inf)
        counted = [self.collapsed(score) for at, score in runs if at >= learned]
        return sum(counted) / len(counted) if counted else float(bool(runs))

    def best(self, d: int | None) -> float:
        """The score of that rate; minus infinity where there is none."""
        rate = self.tuned(d)
        return -math.inf if rate is None else self.tried(d)[rate]

    def rate(self, d: int | None) -> float | None:
        """The learning rate that counts: the one of a list; measured there, unless another that was tried there is
        better; chosen there; between two d at which rates were tried, the one that loses least at both. Full
        fine-tuning has the best of those that were measured."""
        if self.plan.learning_rates is None:
            return None
        listed = self.plan.learning_rates[d is not None]
        if listed != "auto" and len(listed) == 1:
            return listed[0]
        own, tried = self.tuned(d), self.tried(d)
        measured = [rate for at, seed, rate in self.found if at == d and seed != TUNING and rate]
        if d is not None and measured:
            most = max(sorted(set(measured)), key=measured.count)
            # Those below may have changed since.
            if own is None or (most in tried and self._lost(d, own) >= self._lost(d, most)):
                return most
        if d is None and measured:
            return self._least_lost([rate for rate in tried if rate in measured], [None]) or own
        if own is not None or d is None:
            return own
        below, above = ([at for at in self.places() if (at < d) == side] for side in (True, False))
        about = [*below[-1:], *above[:1]]
        if len(about) < 2:
            return self.tuned(about[0]) if about else None
        return self._least_lost([rate for at in about if (rate := self.tuned(at)) is not None], about)

    def at_edge(self, d: int | None) -> bool:
        """Whether the best of several rates is the lowest or the highest of the list, or of those tried by "auto"."""
        listed = self.plan.learning_rates and self.plan.learning_rates[d is not None]
        known = sorted(listed) if listed and listed != "auto" else list(self.tried(d))
        return len(known) > 1 and self.rate(d) in (known[0], known[-1])

    def seeds(self, d: int | None) -> list[int]:
        """Those that ran at the rate that counts."""
        rate = self.rate(d)
        return sorted(seed for at, seed, used in self.found if at == d and used == rate and seed != TUNING)

    def collapsed(self, score: float) -> bool:
        """Whether a run with this score did."""
        return collapsed(score, self.least)

    def runs(self, d: int | None) -> Runs:
        """Of a d, or of full fine-tuning. Where all collapsed they count, one without a score as the trivial answer."""
        if d is None and self.plan.baseline is not None:
            return Runs(self.plan.baseline)
        trials: list[Trial] = [(d, seed, self.rate(d)) for seed in self.seeds(d)]
        failed = [trial for trial in trials if self.collapsed(self.found[trial])]
        instead = self.least or 0.0
        kept = [trial for trial in trials if trial not in failed]
        if self.plan.center == "mean" or not kept:  # a collapsed run counts as what it is
            kept = trials
        scores = [self.found[trial] if math.isfinite(self.found[trial]) else instead for trial in kept]
        right = [self.right[trial] for trial in kept if trial in self.right]
        return Runs(scores, len(failed), np.stack(right) if right else None)

    def curve(self, relative_to: Literal["score", "gain"] | None = None) -> Curve:
        """The curve by one definition of the target, or the plan's."""
        dims = sorted({d for d, seed, _ in self.found if d and seed != TUNING})
        first, last = self.plan.dims[0], self.plan.dims[-1]
        points = {d: runs for d in dims if first <= d <= last and (runs := self.runs(d)).scores}
        floor = float(self.least or 0.0) if (relative_to or self.plan.relative_to) == "gain" else 0.0
        return Curve(self.plan.dims, points, self.runs(None), self.plan.target, floor, self.plan.center)
