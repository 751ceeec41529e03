"""A view of stored trials: chosen learning rates, collapsed runs, the curve. Nothing is trained here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Literal

import numpy as np

from ..trials.engine import Trial
from ..trials.runner import Row, unpack_correct
from .curve import TINY, Curve, Runs
from .plan import AUTO, Plan

BELOW = 2
"""Number of smaller d whose learning rates help to choose that of a d."""

TOLERATED = 0.1
"""Fraction of collapsed runs above which a learning rate is chosen only if no other has fewer."""

FACTOR, WIDENED = 4.0, 4
"""Learning rates of `"auto"`: the ratio of neighbors, and the greatest number of further ones."""

TUNING = 10_000
"""Seed on which learning rates are tried. Its scores choose, so they do not count."""


def is_collapsed(score: float | None, floor: float | None) -> bool:
    """Check whether a run diverged, or is no better than the majority-class baseline."""
    return score is None or not math.isfinite(score) or (floor is not None and score <= floor + 1e-9)


class Evidence:
    """View of the rows of a store that belong to a plan.

    Args:
        plan: The plan.
        rows: Rows of the store by key. They are read, never copied.
        count: Number of rows to view, in order; `add` views others. None views all.

    Attributes:
        trials: Rows in view by trial.
        floor: Score of the majority-class baseline, or else of the untrained model; None where unknown.
    """

    def __init__(self, plan: Plan, rows: Mapping[str, Row] | None = None, count: int | None = None) -> None:
        self.plan = plan
        self.trials: dict[Trial, Row] = {}
        stored = list((rows or {}).values())
        untrained = [row["score"] for row in stored if row["d"] == 0]
        self.floor: float | None = plan.majority if plan.majority is not None or not untrained else untrained[0]
        for row in islice(stored, count):
            self.add((row["d"], row["seed"], row["learning_rate"]), row)

    def add(self, trial: Trial, row: Row) -> None:
        """View the row of a trial, if the plan includes it."""
        if trial[0] == 0 and self.floor is None:
            self.floor = row["score"]
        if self.plan.includes(trial[0], trial[2]):
            self.trials[trial] = row

    def get_score(self, trial: Trial) -> float:
        """Get the score of a trial; NaN if it diverged."""
        score = self.trials[trial]["score"]
        return math.nan if score is None else score

    def get_tuning_scores(self, d: int | None) -> dict[float, float]:
        """Get the scores of the learning rates tried at d, or (None) for full fine-tuning; NaN if one diverged."""
        trials = [trial for trial in self.trials if trial[:2] == (d, TUNING) and trial[2]]
        return {
            float(trial[2] or 0): self.get_score(trial) for trial in sorted(trials, key=lambda trial: trial[2] or 0)
        }

    def choose_rate(self, d: int | None) -> float | None:
        """Choose the learning rate with the least loss at d and `BELOW` smaller d; the middle of equally good ones.

        One seed alone often prefers the worse of two that are nearly as good, and the best learning rate changes little
        from one d to the next. Where no run learned, it is the middle one. None if none was tried, or all diverged.
        """
        below = [] if d is None else [at for at in self.get_tuned_dims() if at < d][-BELOW:]
        rates = [rate for rate, score in self.get_tuning_scores(d).items() if math.isfinite(score)]
        return self._pick(rates, [*below, d]) if self._learns(d) or not rates else rates[len(rates) // 2]

    def get_tuned_dims(self) -> list[int]:
        """Get the d at which learning rates were tried, and one did not diverge."""
        tried = {d for d, seed, _ in self.trials if d and seed == TUNING}
        return sorted(d for d in tried if any(map(math.isfinite, self.get_tuning_scores(d).values())))

    def _pick(self, rates: Sequence[float], dims: Sequence[int | None]) -> float | None:
        stable = [rate for rate in rates if self.get_collapsed_fraction(dims[-1], rate) <= TOLERATED]
        losses = {rate: sum(self._estimate_loss(d, rate) for d in dims) for rate in stable or rates}
        best = sorted(rate for rate, loss in losses.items() if loss <= min(losses.values()) + TINY)
        return best[len(best) // 2] if best else None

    def _estimate_loss(self, d: int | None, rate: float) -> float:
        """Estimate the difference to the best score of d, at a learning rate or the nearest that was tried.

        Runs that collapse, or did not learn, have the score of the majority-class baseline. One that diverged at d has
        the worst score.
        """
        tried = self.get_tuning_scores(d)
        if self.floor is not None:
            for other in tried:
                idle = math.isfinite(tried[other]) and not self._has_learned((d, TUNING, other))
                tried[other] = self.floor if idle else tried[other]
        finite = [score for score in tried.values() if math.isfinite(score)]
        score = tried[min(tried, key=lambda other: abs(math.log(other / rate)))]
        worst = min(finite)
        score = score if math.isfinite(score) else worst
        floor = worst if self.floor is None else min(self.floor, score)
        return max(finite) - score + self.get_collapsed_fraction(d, rate) * (score - floor)

    def get_collapsed_fraction(self, d: int | None, rate: float) -> float:
        """Get the fraction of collapsed runs at a learning rate, over all seeds and all d of the subspace.

        The d start with the least at which a run did not collapse: below it any learning rate may fail.
        """
        runs = [trial for trial in self.trials if (trial[0] is None, trial[2]) == (d is None, rate)]
        collapsed = {trial: self.is_collapsed(trial) for trial in runs}
        learned = min((trial[0] or 0 for trial in runs if not collapsed[trial]), default=math.inf)
        counted = [collapsed[trial] for trial in runs if (trial[0] or 0) >= learned]
        return sum(counted) / len(counted) if counted else float(bool(runs))

    def get_tuned_score(self, d: int | None) -> float:
        """Get the score at the chosen learning rate; minus infinity if there is none."""
        rate = self.choose_rate(d)
        return -math.inf if rate is None else self.get_tuning_scores(d)[rate]

    def get_rate(self, d: int | None) -> float | None:
        """Get the learning rate that counts at d, or (None) for full fine-tuning: the best of those measured.

        At d it is the measured one, unless another that was tried there is better; else the one chosen there; else,
        between two d at which learning rates were tried, the one with the least loss at both.
        """
        rates = self.plan.rates_for(d)
        if rates is None:
            return None
        if rates != "auto" and len(rates) == 1:
            return rates[0]
        chosen, tried = self.choose_rate(d), self.get_tuning_scores(d)
        measured = [rate for at, seed, rate in self.trials if at == d and seed != TUNING and rate]
        if d is not None and measured:
            most = max(sorted(set(measured)), key=measured.count)
            # The scores of smaller d may have changed since.
            if chosen is None or (most in tried and self._estimate_loss(d, chosen) >= self._estimate_loss(d, most)):
                return most
        if d is None and measured:
            return self._pick([rate for rate in tried if rate in measured], [None]) or chosen
        if chosen is not None or d is None:
            return chosen
        below, above = ([at for at in self.get_tuned_dims() if (at < d) == side] for side in (True, False))
        near = [*below[-1:], *above[:1]]
        if len(near) < 2:
            return self.choose_rate(near[0]) if near else None
        return self._pick([rate for at in near if (rate := self.choose_rate(at)) is not None], near)

    def list_tuning_trials(self, d: int | None, near: float | None) -> list[Trial]:
        """List the trials of the first learning rates at d, around the best of a neighboring d if there is one."""
        listed = self.plan.rates_for(d)
        if listed is None or (listed != "auto" and len(listed) == 1):
            return []
        rates = sorted(AUTO[d is not None] if listed == "auto" else listed)
        if near is not None and listed == "auto":
            rates = [_round(near * FACTOR**i) for i in (-1, 0, 1)]
        elif near is not None:
            rates = rates[max(rates.index(near) - 1, 0) : rates.index(near) + 2]
        return [(d, TUNING, rate) for rate in rates]

    def find_next_rate(self, d: int | None) -> float | None:
        """Find the next learning rate to try; None if the best has neighbors, or there are no more.

        Where no run learned, higher ones follow, but not if a smaller d has tried these in vain.
        """
        tried, best = self.get_tuning_scores(d), self.choose_rate(d)
        low, high = min(tried), max(tried)
        learned = self._learns(d) or any(not self._learns(at) for at in self.get_tuned_dims() if d and at < d)
        lower = best in (None, low) and (learned or best is None)
        if not lower and best != high and learned:
            return None
        listed = self.plan.rates_for(d)
        if listed == "auto":
            return None if len(tried) > 2 + WIDENED else _round(low / FACTOR if lower else high * FACTOR)
        left = [rate for rate in sorted(listed or ()) if (rate < low if lower else rate > high)]
        return left[-1 if lower else 0] if left else None

    def is_at_edge(self, d: int | None) -> bool:
        """Check whether the best of several learning rates is the lowest or highest of the list, or of those tried."""
        rates = self.plan.rates_for(d)
        known = sorted(rates) if rates and rates != "auto" else list(self.get_tuning_scores(d))
        return len(known) > 1 and self.get_rate(d) in (known[0], known[-1])

    def get_seeds(self, d: int | None) -> list[int]:
        """Get the seeds that ran at the learning rate that counts."""
        rate = self.get_rate(d)
        return sorted(seed for at, seed, used in self.trials if at == d and used == rate and seed != TUNING)

    def is_collapsed(self, trial: Trial) -> bool:
        """Check whether a trial diverged, or is no better than the majority-class baseline."""
        return is_collapsed(self.trials[trial]["score"], self.floor)

    def _has_learned(self, trial: Trial) -> bool:
        """Whether a trial is better than the majority class, where known by two standard errors of its accuracy.

        Runs on the first plateau differ from that class by chance, and the luckiest is not the best learning rate.
        """
        row, floor = self.trials[trial], self.floor
        if floor is not None and row.get("right") is not None:
            floor += 2 * math.sqrt(max(floor * (1 - floor), 0.0) / row["examples"])
        return not is_collapsed(row["score"], floor)

    def _learns(self, d: int | None) -> bool:
        """Whether a run learned at one of the learning rates tried at d."""
        return any(self._has_learned((d, TUNING, rate)) for rate in self.get_tuning_scores(d))

    def get_runs(self, d: int | None) -> Runs:
        """Get the runs that count at d, or (None) for full fine-tuning.

        If all collapsed, they count; one that diverged has the score of the majority-class baseline.
        """
        if d is None and self.plan.baseline is not None:
            return Runs(self.plan.baseline)
        rate = self.get_rate(d)
        trials: list[Trial] = [(d, seed, rate) for seed in self.get_seeds(d)]
        counted = [trial for trial in trials if not self.is_collapsed(trial)]
        collapsed = len(trials) - len(counted)
        if self.plan.center == "mean" or not counted:
            counted = trials
        scores = [score if math.isfinite(score := self.get_score(trial)) else self.floor or 0.0 for trial in counted]
        correct = [bits for trial in counted if (bits := unpack_correct(self.trials[trial])) is not None]
        return Runs(scores, collapsed, np.stack(correct) if correct else None)

    def build_curve(self, relative_to: Literal["score", "gain"] | None = None) -> Curve:
        """Build the curve, with the target relative to the score or the gain; by default as planned."""
        dims = sorted({d for d, seed, _ in self.trials if d and seed != TUNING})
        first, last = self.plan.dims[0], self.plan.dims[-1]
        points = {d: runs for d in dims if first <= d <= last and (runs := self.get_runs(d)).scores}
        floor = float(self.floor or 0.0) if (relative_to or self.plan.relative_to) == "gain" else 0.0
        return Curve(self.plan.dims, points, self.get_runs(None), self.plan.target, floor, self.plan.center)


def _round(rate: float) -> float:
    return float(f"{rate:.6g}")
