"""Scores against d: the grid, the monotone fit, where it crosses the target, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import isotonic_regression

RESAMPLES = 1000
DRAWN = 0.93
"""Share of the draws within an interval of 90 %: percentiles of isotonic fits cover too little where a curve is flat
(docs/measure.md has the simulations)."""

TINY = 1e-12
"""Below the resolution of any score: rounding of sums."""


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


@dataclass(frozen=True)
class Runs:
    """What was found at one d, or of full fine-tuning.

    Args:
        scores: one per seed; of those runs that count.
        collapsed: how many others there were.
        right: which examples each run has right, `[scores, examples]`, where known.
    """

    scores: Sequence[float]
    collapsed: int = 0
    right: np.ndarray | None = None


def monotone(levels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Isotonic regression of scores over d, weighted by the number of seeds."""
    return isotonic_regression(levels, weights=counts).x


def crossing(grid: Sequence[int], dims: Sequence[int], fit: np.ndarray, target: float | np.ndarray) -> np.ndarray:
    """Index in `grid` of the least d whose fitted score reaches the target; `len(grid)` if none does.

    Between measured dimensions the fit is linear in log d, above them it stays as it is; nothing is known below them.

    Args:
        grid, dims: all dimensions, and those measured.
        fit: `[..., dims]`.
        target: `[...]`.
    """
    places, measured = np.log(grid), np.log(dims)
    weights = np.stack([np.interp(places, measured, unit) for unit in np.eye(len(dims))])
    values = np.where(places < measured[0], -np.inf, fit @ weights)
    reached = values >= np.asarray(target)[..., None] - TINY
    return np.where(reached.any(-1), reached.argmax(-1), len(grid))


@dataclass(frozen=True)
class Curve:
    """Scores against d, and full fine-tuning beside them.

    Args:
        grid: all dimensions in question, ascending.
        points: what was found at each measured d.
        baseline: what was found of full fine-tuning.
        share, floor: the target is `floor + share · (baseline − floor)`.
        center: of the seeds of one d and of full fine-tuning.
    """

    grid: Sequence[int]
    points: Mapping[int, Runs]
    baseline: Runs
    share: float = 0.9
    floor: float = 0.0
    center: Literal["median", "mean"] = "median"

    @property
    def dims(self) -> list[int]:
        """The measured dimensions."""
        return sorted(self.points)

    def level(self, runs: Runs) -> float:
        """What stands for the seeds."""
        return float(self._center(np.asarray(runs.scores)))

    def _center(self, scores: np.ndarray) -> np.ndarray:
        return np.median(scores, -1) if self.center == "median" else np.mean(scores, -1)

    @property
    def target(self) -> float:
        """The score to reach."""
        return self.floor + self.share * (self.level(self.baseline) - self.floor)

    def residuals(self) -> np.ndarray:
        """Deviations of single runs, of all d together, widened for the degree of freedom of a mean; never empty."""
        groups = [np.asarray(runs.scores) for runs in self.points.values() if len(runs.scores) > 1]
        parts = [(group - group.mean()) * math.sqrt(len(group) / (len(group) - 1)) for group in groups]
        return np.concatenate(parts) if parts else np.zeros(1)

    def fit(self) -> tuple[list[int], np.ndarray, np.ndarray]:
        """The monotone fit: dimensions, fitted scores, seeds of each.

        Scores may fall again at large d, where a learning rate fails: what lies beyond the peak of a fit that rises and
        then falls is left out, where that explains the scores better than chance would.
        """
        dims = self.dims
        counts = np.array([len(self.points[d].scores) for d in dims], dtype=float)
        levels = np.array([self.level(self.points[d]) for d in dims])

        def misfit(fitted: np.ndarray) -> float:
            return float((counts * (fitted - levels) ** 2).sum())

        kept = len(dims)
        spread = float(self.residuals().var())
        best = misfit(monotone(levels, counts)) - 4 * math.log(kept + 1) * spread
        single = all(len(self.points[d].scores) == 1 for d in dims)  # nothing tells a peak from chance
        for peak in range(0 if single else len(dims) - 1, 0, -1):
            falling = -monotone(-levels[peak:], counts[peak:])
            both = np.concatenate([monotone(levels[:peak], counts[:peak]), falling])
            if misfit(both) < best - TINY:
                best, kept = misfit(both), peak
        return dims[:kept], monotone(levels[:kept], counts[:kept]), counts[:kept]

    def index(self, shift: float = 0.0) -> int:
        """Where in the grid the fit reaches the target, or a shifted one; `len(grid)` if it does not."""
        dims, fit, _ = self.fit()
        return int(crossing(self.grid, dims, fit, self.target + shift))

    def tie(self, resolution: float) -> tuple[int, int]:
        """Between which indexes the fit is within `resolution` of the target: a decision there is one of chance."""
        return self.index(-resolution), self.index(resolution)

    def interval(self, seed: int = 0, resamples: int = RESAMPLES, sampling: bool = True) -> tuple[int, int]:
        """A bootstrap interval of `index`, 90 %.

        Scores are drawn anew around the fit from the residuals of all dimensions together (few seeds at each say little
        about their own spread), the baseline's level from Student's t, and the examples of the held-out data with
        replacement, the same for all runs, where it is known which ones each has right. Each draw is fitted again. What
        lies between the greatest measured d below the target and the least that reaches it belongs to the interval.
        Without `sampling` the held-out examples stay as they are: what more trials can narrow.
        """
        rng = np.random.default_rng(seed)
        dims, fit, counts = self.fit()
        spread = self.residuals()
        noise = np.stack([self._center(rng.choice(spread, (resamples, int(count)))) for count in counts], 1)
        sampled = self._sampled(dims, rng, resamples) if sampling else np.zeros((resamples, 1 + len(dims)))
        noise = noise + sampled[:, 1:]
        student = rng.standard_t(max(len(self.baseline.scores) - 1, 1), resamples)  # of one seed, times 0
        own = self.uncertainty() * student + sampled[:, 0]
        drawn = np.stack([monotone(fit + row, counts) for row in noise])
        found = crossing(self.grid, dims, drawn, self.target + self.share * own)
        places = [*np.searchsorted(self.grid, dims), len(self.grid)]
        found[found == places[0]] = 0  # reached there: nothing is known below
        ends = [(1 - DRAWN) / 2, (1 + DRAWN) / 2]
        low, high = np.quantile([*found, self.index()], ends, method="inverted_cdf")
        below = int(np.searchsorted(fit, self.target - TINY))
        first = np.searchsorted(self.grid, dims[below - 1], "right") if below else 0
        return min(int(low), int(first)), max(int(high), int(places[below]))

    def uncertainty(self) -> float:
        """Standard error of the baseline's level; 0 where there is one seed."""
        scores = self.baseline.scores
        if len(scores) < 2:
            return 0.0
        # Of three Gaussian values the median varies 1.16 times as much as the mean, of many √(π/2) times.
        wider = 1.0 if self.center == "mean" or len(scores) < 3 else 1.16 if len(scores) < 5 else math.sqrt(math.pi / 2)
        return wider * float(np.std(scores, ddof=1)) / math.sqrt(len(scores))

    def _sampled(self, dims: Sequence[int], rng: np.random.Generator, resamples: int) -> np.ndarray:
        """What other held-out examples would change, `[resamples, 1 + dims]`, of full fine-tuning and of each d."""
        groups = [self.baseline, *(self.points[d] for d in dims)]
        known = [runs.right.mean(0) for runs in groups if runs.right is not None]
        if not known or len({len(row) for row in known}) > 1:
            return np.zeros((resamples, len(groups)))
        examples = len(known[0])
        means = [np.zeros(examples) if runs.right is None else runs.right.mean(0) for runs in groups]
        table = np.stack(means, 1)
        drawn = []
        for start in range(0, resamples, 20):  # a draw has a number for each example
            counts = rng.multinomial(examples, np.full(examples, 1 / examples), min(20, resamples - start))
            drawn.append((counts / examples - 1 / examples) @ table)
        return np.concatenate(drawn)
