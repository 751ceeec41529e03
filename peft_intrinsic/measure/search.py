"""Which trial runs next: scan from below, bracket, and then the trials that narrow the interval most."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import t as student

from ..trials.engine import Trial
from ..trials.runner import Row
from .curve import Curve
from .evidence import TUNING, Evidence

AROUND = (0, -1, 1, -2, 2, -4, 4, -7, 7)
"""Grid steps from the crossing at which the fit is supported."""

RESERVE = 7
"""Dimensions around the crossing for which seeds of full fine-tuning leave room in the budget."""

RunTrials = Callable[[Sequence[Trial]], Sequence[Row]]
"""Runs trials that are independent of each other, so that an engine may run them at once. Returns their rows."""


class Spent(Exception):
    """The budget is spent; the message says which."""


class Search:
    """Finds the least d of a grid that reaches a fraction of full fine-tuning. New rows are added to the evidence.

    Args:
        slots: Number of trials that run in parallel. Several d are then tried in one round.
        progress: Called before each round with what is done and the number of trials left: at most, or for a sweep
            without the learning rates still to be tried.
        start: Start of the time budget, on the clock of `time.monotonic`; None is now.
    """

    def __init__(
        self,
        run: RunTrials,
        evidence: Evidence,
        slots: int = 1,
        progress: Callable[[str, int], None] = lambda doing, left: None,
        start: float | None = None,
    ) -> None:
        self.run_trials, self.evidence, self.slots, self.progress = run, evidence, slots, progress
        self.plan = evidence.plan
        self.at_once = max(slots // self.plan.seeds, 1)
        self.grid, self.last = self.plan.dims, len(self.plan.dims) - 1
        self.start = time.monotonic() if start is None else start
        self.doing = ""

    def run(self, check_baseline: Callable[[], None] = lambda: None) -> str:
        """Search, or measure the whole grid. Returns why it stopped.

        `check_baseline` is called after the first seeds of full fine-tuning.
        """
        try:
            self._measure_baseline()
            check_baseline()
            return self._sweep() if self.plan.sweep else self._search()
        except Spent as spent:
            return str(spent)

    def _measure_baseline(self) -> None:
        """Choose the learning rate of full fine-tuning, and run the first seeds."""
        if self.plan.baseline is not None:
            return
        self.doing = "full fine-tuning"
        self._tune([None], None)
        first = self.plan.baseline_seeds or (3 if self.plan.seeds > 1 else 1)
        rates = [self.evidence.get_rate(None)]
        for rate in rates:
            self._run([(None, seed, rate) for seed in range(first)])
            if (better := self.evidence.choose_rate(None)) not in (None, *rates):
                rates.append(better)  # runs at the last one collapsed
        for seed in range(first, 2 * first):  # one run that did not collapse says nothing of the spread
            if self.plan.baseline_seeds is None and self.plan.seeds > 1 and self._count_baseline() == 1:
                self._run([(None, seed, self.evidence.get_rate(None))])

    def _run(self, trials: Sequence[Trial]) -> None:
        """Run trials that are not in view yet; the first of them if the budget allows no more."""
        new = [trial for trial in dict.fromkeys(trials) if trial not in self.evidence.trials]
        if not new:
            return
        budget, minutes = self.plan.budget, self.plan.minutes
        left = None if budget is None else budget - len(self.evidence.trials)
        if left is not None and left < 1:
            raise Spent(f"the budget of {budget} trials is spent")
        self.progress(self.doing, self._count_left() if left is None else left)
        size = self.slots if minutes is not None else len(new)
        for i in range(0, len(new[:left]), size):
            if minutes is not None and time.monotonic() - self.start > 60 * minutes:
                raise Spent(f"the budget of {minutes:g} minutes is spent")
            round_ = new[:left][i : i + size]
            for trial, row in zip(round_, self.run_trials(round_), strict=True):
                self.evidence.add(trial, row)
        if left is not None and len(new) > left:
            raise Spent(f"the budget of {budget} trials is spent")

    def _count_left(self) -> int:
        """Count the trials of a sweep that are left, without learning rates still to be tried."""
        counted = sum(d in self.grid and seed < self.plan.seeds for d, seed, _ in self.evidence.trials)
        return max(self.plan.seeds * len(self.grid) - counted, 0)

    def _measure(self, indexes: Sequence[int], seeds: int | None = None) -> None:
        """Run as many seeds of these dimensions, by default as planned."""
        dims = [self.grid[i] for i in indexes]
        self._run([(d, seed, self.evidence.get_rate(d)) for d in dims for seed in range(seeds or self.plan.seeds)])

    def _find_index(self, d: int) -> int:
        """Find the index of the least d of the grid that is as great. A d of an earlier grid may lie between."""
        return int(np.searchsorted(self.grid, d))

    def _reaches(self, index: int) -> bool:
        curve = self.evidence.build_curve()
        runs = curve.points.get(self.grid[index])
        return runs is not None and curve.aggregate(runs) >= curve.target

    def _sweep(self) -> str:
        self.doing = "the whole grid"
        near, scan = None, self.plan.scan
        for i in range(0, len(scan), self.at_once):
            near = self._tune([self.grid[j] for j in scan[i : i + self.at_once]], near)
        for i in range(0, self.last + 1, self.at_once):
            self._measure(range(i, min(i + self.at_once, self.last + 1)))
        return "the whole grid was measured"

    def _search(self) -> str:
        low, high = self._find_known()
        if high is None:
            low, high = self._scan(low)
            self._add_baseline_seeds()
            if high:
                self._measure([low])
        elif self.plan.learning_rates and any(self.evidence.get_rate(d) is None for d in self.grid[low : high + 1]):
            self._tune(
                [self.grid[low], self.grid[high]], None
            )  # learning rates were tried outside of this grid, or others
        self._bracket(low, high)
        self._narrow()
        curve = self.evidence.build_curve()
        index = curve.find_index()
        if index == 0:
            return "the target is reached at the smallest dimension"
        if index > self.last:
            return "the target is not reached at the largest dimensions"
        low, high = curve.estimate_interval()
        single = all(len(self.evidence.get_seeds(d)) == 1 for d in curve.dims)
        if high - low > 2 and not single:
            return "what is left of the interval is the sampling of the held-out examples"
        return f"the {'bracket' if single else 'interval'} spans at most two steps of the grid"

    def _find_known(self) -> tuple[int, int | None]:
        """Find the bracket in trials of an earlier plan: the last index below the target, or 0; the next, or None."""
        curve = self.evidence.build_curve()
        reached = {d: curve.aggregate(runs) >= curve.target for d, runs in curve.points.items()}
        high = min((d for d in reached if reached[d]), default=math.inf)
        below = [d for d in reached if d < high]
        low = int(np.searchsorted(self.grid, below[-1], "right")) - 1 if below else 0
        return low, self._find_index(int(high)) if high in self.grid[:1] or (below and high < math.inf) else None

    def _tune(self, dims: Sequence[int | None], near: float | None) -> float | None:
        """Try learning rates at several d, further ones while the best is an end. Returns the last, to start from."""
        first = {d: self.evidence.list_tuning_trials(d, near) for d in dims}
        self._run([trial for trials in first.values() for trial in trials])
        for d in dims:
            while first[d] and (rate := self.evidence.find_next_rate(d)) is not None:
                self._run([(d, TUNING, rate)])
            if d is None and first[d] and self.evidence.choose_rate(d) is None:
                tried = list(self.evidence.get_tuning_scores(d))
                raise ValueError(
                    f"fit returned no finite score for d=None at any of the learning rates {tried}. Try others "
                    "(--full-learning-rates)."
                )
        return self.evidence.choose_rate(dims[-1]) or near

    def _scan(self, low: int) -> tuple[int, int | None]:
        """Scan from below until a d reaches the target. Returns the last that does not (or `low`), and that one."""
        near, scan = None, [i for i in self.plan.scan if i >= low]
        for start in range(0, len(scan), self.at_once):
            indexes = scan[start : start + self.at_once]
            self.doing = f"scan at d = {self.grid[indexes[0]]}"
            near = self._tune([self.grid[i] for i in indexes], near)
            if not self.evidence.get_tuning_scores(self.grid[indexes[0]]):
                self._measure(indexes, seeds=1)
            target = self.evidence.build_curve().target
            for i in indexes:
                tried = self.evidence.get_tuning_scores(self.grid[i])
                if self.evidence.get_tuned_score(self.grid[i]) >= target if tried else self._reaches(i):
                    self._measure([i])
                    if self._reaches(i):
                        return low, i
                low = i
        return low, None

    def _add_baseline_seeds(self) -> None:
        """Run seeds of full fine-tuning while they narrow the interval more than trials around the crossing will."""
        reserve = RESERVE * self.plan.seeds
        curve = self.evidence.build_curve()
        slope = 0.0  # per step of the grid, between the two greatest measured d
        if len(curve.dims) > 1:
            (first, low), (second, high) = (
                (self._find_index(d), curve.aggregate(curve.points[d])) for d in curve.dims[-2:]
            )
            slope = max((high - low) / max(second - first, 1), 0.0)
        while self._may_add_baseline() and len(self.evidence.trials) + reserve < (self.plan.budget or math.inf):
            full, around = self._estimate_gains(reserve)
            curve = self.evidence.build_curve()
            width = curve.share * curve.estimate_error() * _quantile(len(curve.baseline.scores))
            if full <= around or width <= slope:  # less than a step of the grid
                break
            self._add_baseline()

    def _count_baseline(self) -> int:
        """Count the runs of full fine-tuning that did not collapse."""
        return len(self.evidence.get_seeds(None)) - self.evidence.get_runs(None).collapsed

    def _may_add_baseline(self) -> bool:
        return self.plan.baseline is None and self.plan.baseline_seeds is None and self._count_baseline() > 1

    def _add_baseline(self) -> None:
        self.doing = "more seeds of full fine-tuning"
        done = len(self.evidence.get_seeds(None))
        self._run([(None, done + i, self.evidence.get_rate(None)) for i in range(self.at_once)])

    def _estimate_gains(self, around: int) -> tuple[float, float]:
        """Estimate by how much a trial lowers the squared half width of the interval of the score.

        Returns the values for full fine-tuning, and for the curve, which `around` trials determine at the crossing.
        """
        curve = self.evidence.build_curve()
        seeds = len(curve.baseline.scores)
        single = (curve.share * curve.estimate_error()) ** 2 * seeds
        full = single * (_quantile(seeds) ** 2 / seeds - _quantile(seeds + 1) ** 2 / (seeds + 1))
        rest = (1.645**2) * float(curve.pool_residuals().var()) * (math.pi / 2 if curve.center == "median" else 1.0)
        return full, rest * (1 / around - 1 / (around + self.plan.seeds)) / self.plan.seeds

    def _bracket(self, low: int, high: int | None) -> None:
        """Bisect to two steps of the grid; if no d reached the target, run seeds at the best of the scan."""
        if high is None:
            rates = self.plan.rates_for(self.grid[0])
            if rates and all(self.evidence.get_rate(self.grid[i]) is None for i in self.plan.scan):
                raise ValueError(f"fit returned no finite score at any d and learning rate of {rates}.")
            self.doing = "no d of the scan reached the target: its best"
            points = self.evidence.build_curve().points
            scores = {
                i: self.evidence.get_tuned_score(self.grid[i]) for i in self.plan.scan if self.grid[i] not in points
            }
            scores |= {self._find_index(d): self.evidence.build_curve().aggregate(runs) for d, runs in points.items()}
            return self._measure(sorted(scores, key=scores.__getitem__)[-3:])
        while high - low > 2 and not self._reaches(low):
            self.doing = f"{self.grid[low]} ≤ d ≤ {self.grid[high]}"
            parts = self.at_once + 1
            between = sorted({low + (high - low) * part // parts for part in range(1, parts)} - {low})
            self._measure(between)
            high = min((i for i in between if self._reaches(i)), default=high)
            low = max((i for i in (low, *between) if i < high), default=low)
        return None

    def _narrow(self) -> None:
        """Run trials around the crossing, beyond the measured d if the interval extends there, and further seeds."""
        step = max(round(self.last / (len(self.plan.scan) - 1)), 1)
        while True:
            curve = self.evidence.build_curve()
            if not curve.points:  # too many runs collapsed at the learning rate that counted: another one does now
                self._bracket(*self._scan(0))
                continue
            index, measured = curve.find_index(), [self._find_index(d) for d in curve.dims]
            low, high = curve.estimate_interval(resamples=200, sampling=False)
            if low > self.last and curve.dims[-1] >= self.grid[-1]:
                return
            if index > self.last:
                index = self._find_index(curve.fit()[0][-1])
            steps = dict.fromkeys(min(max(index + step, 0), self.last) for step in AROUND)
            near = [i for i in steps if len(self.evidence.get_seeds(self.grid[i])) < self.plan.seeds]
            support = [i for i in near if abs(i - index) <= (2 if high - low > 2 else 4)]
            self.doing = f"d = {self.grid[min(low, self.last)]} to {self.grid[min(high, self.last)]}"
            if high - low <= 2 and not support:
                return
            if high > measured[-1] < self.last:
                self._measure([min(measured[-1] + step, self.last)])
            elif low < measured[0]:
                self._measure([max(measured[0] - step, 0)])
            elif support:
                self._measure(support[: self.at_once])
            else:
                self._improve(curve, index, near)

    def _improve(self, curve: Curve, index: int, near: list[int]) -> None:
        """Run another seed: of full fine-tuning, or of the d near the crossing with the fewest."""
        window = range(max(index - 4, 0), min(index + 5, self.last + 1))
        done = {i: len(self.evidence.get_seeds(self.grid[i])) for i in window}
        full, around = self._estimate_gains(max(sum(done.values()), 1))
        if self._may_add_baseline() and full > around:
            self._add_baseline()
        elif near:
            self._measure(near[: self.at_once])
        else:
            close = sorted((i for i in window if abs(i - index) <= 2), key=lambda i: (done[i], abs(i - index)))
            for i in close[: self.at_once]:
                self._measure([i], done[i] + 1)


def _quantile(seeds: int) -> float:
    """95 % quantile of Student's t."""
    return float(student.ppf(0.95, seeds - 1))
