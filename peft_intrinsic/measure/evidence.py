"""What trials say: chosen learning rates, collapsed runs, the curve. Nothing runs here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

from .curve import TINY, Curve, Runs
from .engine import Trial
from .plan import Plan

TUNING = 10_000
"""The seed on which learning rates are tried: its scores choose, so they do not count."""


class Evidence:
    """The trials of one run, in the light of a plan.

    Args:
        found: scores of trials, NaN for one without a finite score.
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
        """Scores of the learning rates that were tried at a d, or (None) of full fine-tuning."""
        rows = {rate: score for (at, seed, rate), score in self.found.items() if (at, seed) == (d, TUNING)}
        return {rate: rows[rate] for rate in sorted(rate for rate in rows if rate is not None)}

    def tuned(self, d: int | None) -> float | None:
        """The best of them, of equally good ones the middle; None where none was tried, or all diverged."""
        finite = {rate: score for rate, score in self.tried(d).items() if math.isfinite(score)}
        best = [rate for rate, score in finite.items() if score >= max(finite.values()) - TINY]
        return best[len(best) // 2] if best else None

    def rate(self, d: int | None) -> float | None:
        """The learning rate that counts: the one of a list; chosen there; measured there; chosen at the nearest d."""
        if self.plan.rates is None:
            return None
        listed = self.plan.rates[d is not None]
        if listed != "auto" and len(listed) == 1:
            return listed[0]
        if d is None or self.tried(d):
            return self.tuned(d)
        measured = [rate for at, seed, rate in self.found if at == d and seed != TUNING]
        if measured:
            return max(sorted(set(measured), key=lambda rate: rate or 0.0), key=measured.count)
        places = sorted({at for at, seed, _ in self.found if at and seed == TUNING and self.tuned(at)})
        return self.tuned(min(places, key=lambda at: abs(math.log(at / d)))) if places else None

    def at_edge(self, d: int | None) -> bool:
        """Whether the best of several rates is the lowest or the highest of them."""
        tried, best = list(self.tried(d)), self.tuned(d)
        return len(tried) > 1 and best in (tried[0], tried[-1])

    def seeds(self, d: int | None) -> list[int]:
        """Those that ran at the rate that counts."""
        rate = self.rate(d)
        return sorted(seed for at, seed, used in self.found if at == d and used == rate and seed != TUNING)

    def collapsed(self, score: float) -> bool:
        """Whether a run is no better than the trivial answer, or diverged."""
        return not math.isfinite(score) or (self.least is not None and score <= self.least + 1e-9)

    def runs(self, d: int | None) -> Runs:
        """Of a d, or of full fine-tuning. Where all collapsed, the trivial answer stands for them."""
        if d is None and self.plan.baseline is not None:
            return Runs(self.plan.baseline)
        trials: list[Trial] = [(d, seed, self.rate(d)) for seed in self.seeds(d)]
        failed = [trial for trial in trials if self.collapsed(self.found[trial])]
        instead = self.least or 0.0
        kept = [trial for trial in trials if trial not in failed]
        right = np.stack([self.right[t] for t in kept]) if kept and all(t in self.right for t in kept) else None
        scores = [self.found[trial] for trial in kept]
        if self.plan.center == "mean":  # of all: a collapsed run counts as what it is
            scores += [self.found[t] if math.isfinite(self.found[t]) else instead for t in failed]
            right = None if failed else right
        return Runs(scores or ([instead] if failed else []), len(failed), right)

    def curve(self, of: Literal["score", "gain"] | None = None) -> Curve:
        """The curve by one definition of the target, or the plan's."""
        dims = sorted({d for d, seed, _ in self.found if d and seed != TUNING})
        points = {d: runs for d in dims if d in self.plan.dims and (runs := self.runs(d)).scores}
        floor = float(self.least or 0.0) if (of or self.plan.of) == "gain" else 0.0
        return Curve(self.plan.dims, points, self.runs(None), self.plan.target, floor, self.plan.center)
