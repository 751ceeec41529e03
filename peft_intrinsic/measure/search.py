"""Which d to try next: bracket, bisect, and then look around the crossing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from .curve import Curve

AROUND = (0, -1, 1, -2, 2, -4, 4, -7, 7)
"""Grid steps from the crossing at which the fit is supported."""

Trial = tuple[int, int]
"""(d, seed)"""

Evaluate = Callable[[Sequence[Trial]], Sequence[float]]
"""Scores of trials that are independent of each other, so that an engine may run them at once."""


class Spent(Exception):
    """The budget is spent; the message says which."""


class Search:
    """Finds the least d of a grid that reaches a share of full fine-tuning.

    Args:
        evaluate: runs trials.
        grid: dimensions, ascending.
        baseline: scores of full fine-tuning, one per seed.
        share, floor: the target is `floor + share · (mean baseline − floor)`.
        seeds: of each d. A seed sets P and the order of the data.
        trials, minutes: the budget; None is no limit.
        start: of the minutes, on the clock of `time.monotonic`; None is now.
        at_once: dimensions that are tried in one round of the bisection, where that many trials run side by side.
        progress: called before each round with the lowest and the highest d in question, and about how many trials are
            left.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        grid: Sequence[int],
        baseline: Sequence[float],
        share: float = 0.9,
        floor: float = 0.0,
        seeds: Sequence[int] = (0, 1, 2),
        trials: int | None = None,
        minutes: float | None = None,
        progress: Callable[[int, int, int], None] = lambda low, high, left: None,
        at_once: int = 1,
        start: float | None = None,
    ) -> None:
        self.at_once = max(at_once, 1)
        self.evaluate, self.grid, self.seeds = evaluate, list(grid), tuple(seeds)
        self.trials, self.minutes, self.progress = trials, minutes, progress
        self.curve = Curve(self.grid, {}, list(baseline), share, floor)
        self.scores: dict[int, list[float]] = self.curve.scores  # type: ignore[assignment]
        self.start = time.monotonic() if start is None else start

    def run(self, sweep: bool = False) -> str:
        """Search, or measure the whole grid. Fills `curve`, and says why it stopped."""
        try:
            return self._sweep() if sweep else self._search()
        except Spent as spent:
            return str(spent)

    def _measure(self, indexes: Sequence[int], low: int, high: int, after: int | None = None) -> list[int]:
        """Every seed of the dimensions that were not measured yet, the first ones if the budget allows no more.

        Returns those of the indexes that are measured now.

        `after` is how many dimensions will follow once the grid between low and high has been bisected.
        """
        dims = [self.grid[i] for i in indexes if self.grid[i] not in self.scores]
        wanted = [(d, seed) for d in dims for seed in self.seeds]
        if not wanted:
            return list(indexes)
        if self.trials is not None:
            left = self.trials - sum(map(len, self.scores.values()))
            wanted = wanted[: left // len(self.seeds) * len(self.seeds)]
            if not wanted:
                raise Spent(f"the budget of {self.trials} trials is spent")
        halvings = math.log(max(high - low, 1), self.at_once + 1)
        left = len(dims) if after is None else after + math.ceil(halvings) * self.at_once
        self.progress(self.grid[low], self.grid[high], left * len(self.seeds))
        part = len(wanted) if self.minutes is None else self.at_once * len(self.seeds)
        for first in range(0, len(wanted), part):
            if self.minutes is not None and time.monotonic() - self.start > 60 * self.minutes:
                raise Spent(f"the budget of {self.minutes:g} minutes is spent")
            some = wanted[first : first + part]
            for (d, _), score in zip(some, self.evaluate(some), strict=True):
                self.scores.setdefault(d, []).append(float(score))
        return [i for i in indexes if self.grid[i] in self.scores]

    def _reaches(self, index: int) -> bool:
        found = self.scores[self.grid[index]]
        return sum(found) / len(found) >= self.curve.target

    def _sweep(self) -> str:
        last = len(self.grid) - 1
        for i in range(0, last + 1, self.at_once):
            self._measure(range(i, min(i + self.at_once, last + 1)), i, last, last - i)
        return "the whole grid was measured"

    def _search(self) -> str:
        low, high = 0, len(self.grid) - 1
        support = len(AROUND) - 1
        self._measure([high] if self.at_once == 1 else [low, high], low, high, support)
        if not self._reaches(high):  # by chance, or because more numbers did worse there: look a little lower
            tops = self._measure([high - step for step in (2, 4, 7) if high > step], low, high)
            high = max((i for i in tops if self._reaches(i)), default=low)
            if high == low:
                if self.curve.interval()[0] == len(self.grid):
                    return "the target is not reached at the largest dimensions"
                high = len(self.grid) - 1  # undecided: that it is reached somewhere is not excluded
        self._measure([low], low, high, support)
        while high - low > 1 and not self._reaches(low):
            parts = self.at_once + 1
            middle = (low + high) / 2
            between = {low + (high - low) * part // parts for part in range(1, parts)} - {low}
            tried = self._measure(sorted(between, key=lambda i: abs(i - middle)), low, high, support)
            high = min((i for i in tried if self._reaches(i)), default=high)
            low = max(i for i in (low, *tried) if i < high)
        # These decisions were made on noisy means: support the fit on both sides of where it crosses, and look again.
        last, index = len(self.grid) - 1, -1
        while index != (index := self.curve.index()):
            near = dict.fromkeys(min(max(index + step, 0), last) for step in AROUND)
            self._measure(list(near), min(near), max(near))
        if index > last:
            return "the monotone fit does not reach the target"
        if index == 0:
            return "the target is reached at the smallest dimension"
        return "the bracket is one step of the grid"
