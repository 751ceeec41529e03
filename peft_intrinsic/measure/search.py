"""Which trial to run next: scan from below, bracket, and then where the interval is widest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence

import numpy as np
from scipy.stats import t as student

from ..trials.engine import Trial
from .curve import Curve
from .evidence import Evidence
from .plan import Plan
from .rates import choose, first

AROUND = (0, -1, 1, -2, 2, -4, 4, -7, 7)
"""Grid steps from the crossing at which the fit is supported."""

RESERVE = 7
"""Dimensions around the crossing for which seeds of full fine-tuning leave room in the budget."""

Evaluate = Callable[[Sequence[Trial]], Sequence[float]]
"""Scores of trials that are independent of each other, so that an engine may run them at once; NaN if it diverged."""


class Spent(Exception):
    """The budget is spent; the message says which."""


class Search:
    """Finds the least d of a grid that reaches a share of full fine-tuning.

    Args:
        evaluate: runs trials.
        plan: what is asked.
        found: scores of trials that are there; filled.
        least, right: see `Evidence`.
        slots: trials that run side by side; several d are then tried in one round.
        progress: called before each round with what is done, and how many trials are left: at most, or of a sweep
            beside the rates that are still to be tried.
        start: of the minutes, on the clock of `time.monotonic`; None is now.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        plan: Plan,
        found: MutableMapping[Trial, float] | None = None,
        least: float | None = None,
        right: Mapping[Trial, np.ndarray] | None = None,
        slots: int = 1,
        progress: Callable[[str, int], None] = lambda what, left: None,
        start: float | None = None,
    ) -> None:
        self.evaluate, self.plan, self.slots, self.progress = evaluate, plan, slots, progress
        self.at_once = max(slots // plan.seeds, 1)
        self.found: MutableMapping[Trial, float] = {} if found is None else found
        self.evidence = Evidence(self.found, plan, least, right)
        self.grid, self.last = plan.dims, len(plan.dims) - 1
        self.start = time.monotonic() if start is None else start
        self.doing = ""

    def run(self, begun: Callable[[], None] = lambda: None) -> str:
        """Search, or measure the whole grid. Fills `found`, and says why it stopped.

        Args:
            begun: called after the first seeds of full fine-tuning.
        """
        try:
            self._full()
            begun()
            return self._sweep() if self.plan.sweep else self._search()
        except Spent as spent:
            return str(spent)

    def _full(self) -> None:
        """Full fine-tuning: its learning rate, and the first seeds."""
        if self.plan.baseline is not None:
            return
        self.doing = "full fine-tuning"
        self._choose(None)
        first = self.plan.baseline_seeds or (3 if self.plan.seeds > 1 else 1)
        rates = [self.evidence.rate(None)]
        for rate in rates:
            self._ask([(None, seed, rate) for seed in range(first)])
            if (better := self.evidence.tuned(None)) not in (None, *rates):
                rates.append(better)  # runs at the last one collapsed
        for seed in range(first, 2 * first):  # two at least that did not collapse: one says nothing of the spread
            if self.plan.baseline_seeds is None and self.plan.seeds > 1 and self._sound() == 1:
                self._ask([(None, seed, self.evidence.rate(None))])

    def _ask(self, wanted: Sequence[Trial]) -> None:
        """Run trials that were not run yet, the first ones if the budget allows no more."""
        new = [trial for trial in dict.fromkeys(wanted) if trial not in self.found]
        if not new:
            return
        left = None if self.plan.budget is None else self.plan.budget - len(self.found)
        if left is not None and left < 1:
            raise Spent(f"the budget of {self.plan.budget} trials is spent")
        self.progress(self.doing, self._rest() if left is None else left)
        some = self.slots if self.plan.minutes is not None else len(new)
        for place in range(0, len(new[:left]), some):
            if self.plan.minutes is not None and time.monotonic() - self.start > 60 * self.plan.minutes:
                raise Spent(f"the budget of {self.plan.minutes:g} minutes is spent")
            round_ = new[:left][place : place + some]
            self.found.update(zip(round_, map(float, self.evaluate(round_)), strict=True))
        if left is not None and len(new) > left:
            raise Spent(f"the budget of {self.plan.budget} trials is spent")

    def _rest(self) -> int:
        """Trials of a sweep that are left, beside rates that are still to be tried."""
        counted = sum(d in self.grid and seed < self.plan.seeds for d, seed, _ in self.found)
        return max(self.plan.seeds * len(self.grid) - counted, 0)

    def _choose(self, d: int | None, near: float | None = None) -> None:
        choose(self.evidence, self._ask, d, near)

    def _measure(self, indexes: Sequence[int], seeds: int | None = None) -> None:
        """As many seeds of these dimensions as are wanted."""
        dims = [self.grid[i] for i in indexes]
        self._ask([(d, seed, self.evidence.rate(d)) for d in dims for seed in range(seeds or self.plan.seeds)])

    def _place(self, d: int) -> int:
        """Index of the least d of the grid that is as great: of an earlier grid, d may lie between."""
        return int(np.searchsorted(self.grid, d))

    def _reaches(self, index: int) -> bool:
        curve = self.evidence.curve()
        runs = curve.points.get(self.grid[index])
        return runs is not None and curve.level(runs) >= curve.target

    def _sweep(self) -> str:
        self.doing = "the whole grid"
        near = None
        for i in range(0, len(self.plan.coarse), self.at_once):
            near = self._tune(self.plan.coarse[i : i + self.at_once], near)
        for i in range(0, self.last + 1, self.at_once):
            self._measure(range(i, min(i + self.at_once, self.last + 1)))
        return "the whole grid was measured"

    def _search(self) -> str:
        low, high = self._known()
        if high is None:
            low, high = self._scan(low)
            self._spend()
            if high:
                self._measure([low])
        elif self.plan.learning_rates and any(self.evidence.rate(d) is None for d in self.grid[low : high + 1]):
            self._tune([low, high], None)  # rates were tried outside of this grid, or not these
        self._bracket(low, high)
        self._narrow()
        curve = self.evidence.curve()
        index = curve.index()
        if index == 0:
            return "the target is reached at the smallest dimension"
        if index > self.last:
            return "the target is not reached at the largest dimensions"
        low, high = curve.interval()
        single = all(len(self.evidence.seeds(d)) == 1 for d in curve.dims)
        if high - low > 2 and not single:
            return "what is left of the interval is the sampling of the held-out examples"
        return f"the {'bracket' if single else 'interval'} spans at most two steps of the grid"

    def _known(self) -> tuple[int, int | None]:
        """What trials of an earlier question say: the greatest place that did not reach the target below the least that
        did (or the first of all), and that one; None where no d, or every d, reached it."""
        curve = self.evidence.curve()
        reached = {d: curve.level(runs) >= curve.target for d, runs in curve.points.items()}
        high = min((d for d in reached if reached[d]), default=math.inf)
        below = [d for d in reached if d < high]
        low = int(np.searchsorted(self.grid, below[-1], "right")) - 1 if below else 0
        return low, self._place(int(high)) if high in self.grid[:1] or (below and high < math.inf) else None

    def _tune(self, some: Sequence[int], near: float | None) -> float | None:
        """Choose learning rates at several places; gives the one that is near for the next."""
        self._ask([trial for place in some for trial in first(self.evidence, self.grid[place], near)])
        for place in some:
            self._choose(self.grid[place], near)
        return self.evidence.tuned(self.grid[some[-1]]) or near

    def _scan(self, low: int) -> tuple[int, int | None]:
        """From below, until a d reaches the target: the last that did not (or `low`), and that one."""
        near, coarse = None, [place for place in self.plan.coarse if place >= low]
        for i in range(0, len(coarse), self.at_once):
            some = coarse[i : i + self.at_once]
            self.doing = f"scan at d = {self.grid[some[0]]}"
            near = self._tune(some, near)
            if not self.evidence.tried(self.grid[some[0]]):
                self._measure(some, seeds=1)
            target = self.evidence.curve().target
            for place in some:
                tried = self.evidence.tried(self.grid[place])
                if self.evidence.best(self.grid[place]) >= target if tried else self._reaches(place):
                    self._measure([place])
                    if self._reaches(place):
                        return low, place
                low = place
        return low, None

    def _spend(self) -> None:
        """Seeds of full fine-tuning, as long as they narrow the interval more than trials around the crossing will."""
        reserve = RESERVE * self.plan.seeds
        curve = self.evidence.curve()
        slope = 0.0  # of one step of the grid, between the two greatest measured d
        if len(curve.dims) > 1:
            (first, low), (second, high) = ((self._place(d), curve.level(curve.points[d])) for d in curve.dims[-2:])
            slope = max((high - low) / max(second - first, 1), 0.0)
        while self._may_add() and len(self.found) + reserve < (self.plan.budget or math.inf):
            full, around = self._gains(reserve)
            curve = self.evidence.curve()
            width = curve.share * curve.uncertainty() * _quantile(len(curve.baseline.scores))
            if full <= around or width <= slope:  # a step of the grid
                break
            self._add_full()

    def _sound(self) -> int:
        runs = self.evidence.runs(None)
        return len(self.evidence.seeds(None)) - runs.collapsed

    def _may_add(self) -> bool:
        return self.plan.baseline is None and self.plan.baseline_seeds is None and self._sound() > 1

    def _add_full(self) -> None:
        self.doing = "more seeds of full fine-tuning"
        done = len(self.evidence.seeds(None))
        self._ask([(None, done + i, self.evidence.rate(None)) for i in range(self.at_once)])

    def _gains(self, around: int) -> tuple[float, float]:
        """By how much one more trial lowers the square of the interval's half width, in the score's units: of full
        fine-tuning, and of the curve where `around` trials determine it."""
        curve = self.evidence.curve()
        seeds = len(curve.baseline.scores)
        single = (curve.share * curve.uncertainty()) ** 2 * seeds
        full = single * (_quantile(seeds) ** 2 / seeds - _quantile(seeds + 1) ** 2 / (seeds + 1))
        rest = (1.645**2) * float(curve.residuals().var()) * (math.pi / 2 if curve.center == "median" else 1.0)
        return full, rest * (1 / around - 1 / (around + self.plan.seeds)) / self.plan.seeds

    def _bracket(self, low: int, high: int | None) -> None:
        """Bisect to two steps of the grid; where nothing reached the target, look at the best of the scan again."""
        if high is None:
            if (
                not any(self.evidence.rate(self.grid[i]) is not None for i in self.plan.coarse)
                and self.plan.learning_rates
            ):
                raise ValueError(
                    f"fit returned no finite score at any d and learning rate of {self.plan.learning_rates[1]}."
                )
            self.doing = "nothing reached the target: the best of the scan"
            points = self.evidence.curve().points
            level = {i: self.evidence.best(self.grid[i]) for i in self.plan.coarse if self.grid[i] not in points}
            level |= {self._place(d): self.evidence.curve().level(runs) for d, runs in points.items()}
            return self._measure(sorted(level, key=level.__getitem__)[-3:])
        while high - low > 2 and not self._reaches(low):
            self.doing = f"{self.grid[low]} ≤ d ≤ {self.grid[high]}"
            parts = self.at_once + 1
            between = sorted({low + (high - low) * part // parts for part in range(1, parts)} - {low})
            self._measure(between)
            high = min((i for i in between if self._reaches(i)), default=high)
            low = max((i for i in (low, *between) if i < high), default=low)
        return None

    def _narrow(self) -> None:
        """Support the fit around its crossing, look beyond what was measured where the interval does, add seeds."""
        step = max(round(self.last / (len(self.plan.coarse) - 1)), 1)
        while True:
            curve = self.evidence.curve()
            index, places = curve.index(), [self._place(d) for d in curve.dims]
            low, high = curve.interval(resamples=200, sampling=False)
            if low > self.last and curve.dims[-1] >= self.grid[-1]:
                return
            if index > self.last:
                index = self._place(curve.fit()[0][-1])
            steps = dict.fromkeys(min(max(index + step, 0), self.last) for step in AROUND)
            near = [i for i in steps if len(self.evidence.seeds(self.grid[i])) < self.plan.seeds]
            support = [i for i in near if abs(i - index) <= (2 if high - low > 2 else 4)]
            self.doing = f"d = {self.grid[min(low, self.last)]} to {self.grid[min(high, self.last)]}"
            if high - low <= 2 and not support:
                return
            if high > places[-1] < self.last:
                self._measure([min(places[-1] + step, self.last)])
            elif low < places[0]:
                self._measure([max(places[0] - step, 0)])
            elif support:
                self._measure(support[: self.at_once])
            else:
                self._improve(curve, index, near)

    def _improve(self, curve: Curve, index: int, near: list[int]) -> None:
        window = range(max(index - 4, 0), min(index + 5, self.last + 1))
        done = {i: len(self.evidence.seeds(self.grid[i])) for i in window}
        full, around = self._gains(max(sum(done.values()), 1))
        if self._may_add() and full > around:
            self._add_full()
        elif near:
            self._measure(near[: self.at_once])
        else:
            close = sorted((i for i in window if abs(i - index) <= 2), key=lambda i: (done[i], abs(i - index)))
            for i in close[: self.at_once]:
                self._measure([i], done[i] + 1)


def _quantile(seeds: int) -> float:
    return float(student.ppf(0.95, seeds - 1))
