"""Scores against d: the grid, the monotone fit, where it crosses the target, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression
from scipy.stats import sem

Scores = Mapping[int, Sequence[float]]
"""The scores found at each d, one per seed."""

RESAMPLES = 1000


def grid(low: int = 100, high: int = 1_000_000, points: int = 64) -> list[int]:
    """Dimensions on a log scale, `⌊logspace⌋`.

    The defaults are the grid that nearly all values of Table 1 of Aghajanyan et al. (2020) lie on; neighbours differ by
    16 %, which is the resolution of a result.

    Raises:
        ValueError: the bounds or the number of points make no grid.
    """
    if not 1 <= low < high or points < 2:
        raise ValueError(f"A grid needs 1 <= low < high and 2 points or more, got low={low}, high={high}, {points}.")
    return sorted({int(value + 1e-9) for value in np.logspace(np.log10(low), np.log10(high), points)})


def monotone(dims: Sequence[int], means: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Isotonic regression of the mean scores over d, weighted by the number of seeds: `[len(dims)]`."""
    return isotonic_regression(means, weights=counts).x


def crossing(grid: Sequence[int], dims: Sequence[int], fit: np.ndarray, target: float) -> int:
    """Index in `grid` of the least d whose fitted score reaches the target; `len(grid)` if none does.

    Between measured dimensions the fit is linear in log d, above them it stays as it is; nothing is known below them.
    """
    values = np.where(np.array(grid) < dims[0], -np.inf, np.interp(np.log(grid), np.log(dims), fit))
    reached = np.nonzero(values >= target - 1e-12)[0]
    return int(reached[0]) if len(reached) else len(grid)


@dataclass(frozen=True)
class Curve:
    """Scores against d, and full fine-tuning beside them.

    Args:
        grid: all dimensions in question, ascending.
        scores: those found, one per seed, at each measured d.
        baseline: scores of full fine-tuning, one per seed.
        share, floor: the target is `floor + share · (mean baseline − floor)`.
    """

    grid: Sequence[int]
    scores: Scores
    baseline: Sequence[float]
    share: float = 0.9
    floor: float = 0.0

    @property
    def dims(self) -> list[int]:
        """The measured dimensions."""
        return sorted(self.scores)

    @property
    def counts(self) -> np.ndarray:
        """Seeds of each measured dimension."""
        return np.array([len(self.scores[d]) for d in self.dims])

    @property
    def target(self) -> float:
        """The score to reach."""
        return self.floor + self.share * (float(np.mean(self.baseline)) - self.floor)

    def fit(self) -> np.ndarray:
        """The monotone fit at the measured dimensions."""
        return monotone(self.dims, np.array([np.mean(self.scores[d]) for d in self.dims]), self.counts)

    def index(self) -> int:
        """Where in the grid the fit reaches the target; `len(grid)` if it does not."""
        return crossing(self.grid, self.dims, self.fit(), self.target)

    def interval(self, level: float = 0.9, seed: int = 0) -> tuple[int, int]:
        """A bootstrap interval of `index`.

        Scores are drawn anew around the fit from the residuals of all dimensions together (few seeds at each say little
        about their own spread), the baseline's mean from Student's t, and each draw is fitted again. What lies between
        the greatest measured d below the target and the least that reaches it belongs to the interval.
        """
        rng = np.random.default_rng(seed)
        spread = _residuals([self.scores[d] for d in self.dims])
        noise = np.stack([rng.choice(spread, (RESAMPLES, n)).mean(1) for n in self.counts], 1)
        n = len(self.baseline)
        own = sem(self.baseline) * rng.standard_t(n - 1, RESAMPLES) if n > 1 else np.zeros(RESAMPLES)
        fit, counts = self.fit(), self.counts
        found = [
            crossing(self.grid, self.dims, monotone(self.dims, fit + row, counts), self.target + self.share * shift)
            for row, shift in zip(noise, own, strict=True)
        ]
        smallest = self.grid.index(self.dims[0])
        found = [0 if place == smallest else place for place in found]  # reached there: nothing is known below
        low, high = np.quantile([*found, self.index()], [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
        below = int(np.searchsorted(fit, self.target - 1e-12))
        places = [self.grid.index(d) for d in self.dims] + [len(self.grid)]
        first = places[below - 1] + 1 if below else 0
        return min(int(low), first), max(int(high), places[below])


def _residuals(groups: Sequence[Sequence[float]]) -> np.ndarray:
    """Deviations from each group's mean, widened for the degree of freedom that the mean took; never empty."""
    parts = [
        (np.asarray(group) - np.mean(group)) * np.sqrt(len(group) / (len(group) - 1))
        for group in groups
        if len(group) > 1
    ]
    return np.concatenate(parts) if parts else np.zeros(1)
