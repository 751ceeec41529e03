"""Scores against d: the grid, the monotone fit, its crossing of the target, and the interval of that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import isotonic_regression

RESAMPLES = 1000
INSIDE = 0.93
"""Fraction of the resamples inside a 90 % interval: percentiles of isotonic fits cover too little where a curve is flat
(docs/d90_protocol.md has the simulations)."""

TINY = 1e-12
"""Tolerance for the rounding of sums, below the resolution of any score."""


def grid(low: int = 100, high: int = 1_000_000, points: int = 64) -> list[int]:
    """Build a grid of d on a log scale, `⌊logspace⌋`.

    The defaults are the grid of nearly all values in Table 1 of Aghajanyan et al. (2020). Neighbors differ by 16 %,
    which is the resolution of a result.

    Args:
        low, high: Least and greatest d.
        points: Number of d; rounding merges some of a narrow grid.

    Raises:
        ValueError: The bounds or the number of points make no grid.

    Example:
        ```python
        grid(10, 1000, 5)  # [10, 31, 100, 316, 1000]
        ```
    """
    if not 1 <= low < high or points < 2:
        raise ValueError(f"A grid needs 1 <= low < high and 2 points or more, got low={low}, high={high}, {points}.")
    return sorted({int(value + 1e-9) for value in np.logspace(np.log10(low), np.log10(high), points)})


@dataclass(frozen=True)
class Runs:
    """Runs at one d, or of full fine-tuning.

    Args:
        scores: Score of each run that counts.
        collapsed: Number of runs that collapsed.
        correct: Which predictions of each run are correct, `[scores, examples]`, where known.
    """

    scores: Sequence[float]
    collapsed: int = 0
    correct: np.ndarray | None = None


def fit_monotone(levels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Fit scores by isotonic regression over d, weighted by the number of seeds."""
    return isotonic_regression(levels, weights=counts).x


def find_crossing(grid: Sequence[int], dims: Sequence[int], fit: np.ndarray, target: float | np.ndarray) -> np.ndarray:
    """Find the index in `grid` of the least d whose fit, `[..., dims]`, reaches the target, `[...]`; else `len(grid)`.

    Between measured d the fit is linear in log d. Above them it is constant, and below them it is unknown.
    """
    positions, measured = np.log(grid), np.log(dims)
    weights = np.stack([np.interp(positions, measured, row) for row in np.eye(len(dims))])
    values = np.where(positions < measured[0], -np.inf, fit @ weights)
    reached = values >= np.asarray(target)[..., None] - TINY
    return np.where(reached.any(-1), reached.argmax(-1), len(grid))


@dataclass(frozen=True)
class Curve:
    """Scores against d, and those of full fine-tuning.

    Args:
        grid: All d, ascending.
        points: Runs at each measured d.
        baseline: Runs of full fine-tuning.
        share, floor: The target is `floor + share · (baseline − floor)`.
        center: Aggregate over the seeds of one d, and of full fine-tuning.
    """

    grid: Sequence[int]
    points: Mapping[int, Runs]
    baseline: Runs
    share: float = 0.9
    floor: float = 0.0
    center: Literal["median", "mean"] = "median"

    @property
    def dims(self) -> list[int]:
        """The measured d."""
        return sorted(self.points)

    def aggregate(self, runs: Runs) -> float:
        """Aggregate the scores of runs over seeds."""
        return float(self._aggregate(np.asarray(runs.scores)))

    def _aggregate(self, scores: np.ndarray) -> np.ndarray:
        return np.median(scores, -1) if self.center == "median" else np.mean(scores, -1)

    @property
    def target(self) -> float:
        """The score to reach."""
        return self.floor + self.share * (self.aggregate(self.baseline) - self.floor)

    def pool_residuals(self) -> np.ndarray:
        """Pool the deviations of runs from the mean of their d, scaled by its degree of freedom; never empty."""
        groups = [np.asarray(runs.scores) for runs in self.points.values() if len(runs.scores) > 1]
        parts = [(group - group.mean()) * math.sqrt(len(group) / (len(group) - 1)) for group in groups]
        return np.concatenate(parts) if parts else np.zeros(1)

    def fit(self) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Fit the scores monotonically. Returns the d, their fitted scores, and their numbers of seeds.

        Scores may fall again at large d, where a learning rate fails. If a fit that rises and then falls explains the
        scores better than chance would, the d beyond its peak are left out.
        """
        dims = self.dims
        counts = np.array([len(self.points[d].scores) for d in dims], dtype=float)
        scores = np.array([self.aggregate(self.points[d]) for d in dims])

        def misfit(fitted: np.ndarray) -> float:
            return float((counts * (fitted - scores) ** 2).sum())

        count = len(dims)
        spread = float(self.pool_residuals().var())
        best = misfit(fit_monotone(scores, counts)) - 4 * math.log(count + 1) * spread
        single = all(len(self.points[d].scores) == 1 for d in dims)  # a peak may be chance
        for peak in range(0 if single else len(dims) - 1, 0, -1):
            falling = -fit_monotone(-scores[peak:], counts[peak:])
            both = np.concatenate([fit_monotone(scores[:peak], counts[:peak]), falling])
            if misfit(both) < best - TINY:
                best, count = misfit(both), peak
        return dims[:count], fit_monotone(scores[:count], counts[:count]), counts[:count]

    def find_index(self, shift: float = 0.0) -> int:
        """Find the index in the grid where the fit reaches the target plus `shift`; `len(grid)` if it does not."""
        dims, fit, _ = self.fit()
        return int(find_crossing(self.grid, dims, fit, self.target + shift))

    def find_tie(self, resolution: float) -> tuple[int, int]:
        """Find the indexes between which the fit is within `resolution` of the target, so that chance decides."""
        return self.find_index(-resolution), self.find_index(resolution)

    def estimate_interval(self, seed: int = 0, resamples: int = RESAMPLES, sampling: bool = True) -> tuple[int, int]:
        """Estimate a 90 % bootstrap interval of `find_index`.

        Each resample has scores around the fit with residuals pooled over all d (few seeds at each say little about
        their own spread), a baseline from Student's t, and, where correct predictions are known, held-out examples with
        replacement, the same for all runs. It is fitted again. The indexes between the greatest measured d below the
        target and the least that reaches it always belong to the interval. Without `sampling` the held-out examples are
        fixed: more trials can narrow such an interval.
        """
        rng = np.random.default_rng(seed)
        dims, fit, counts = self.fit()
        spread = self.pool_residuals()
        noise = np.stack([self._aggregate(rng.choice(spread, (resamples, int(count)))) for count in counts], 1)
        sampled = self._sample_examples(dims, rng, resamples) if sampling else np.zeros((resamples, 1 + len(dims)))
        noise = noise + sampled[:, 1:]
        student = rng.standard_t(max(len(self.baseline.scores) - 1, 1), resamples)  # times 0 for one seed
        own = self.estimate_error() * student + sampled[:, 0]
        fits = np.stack([fit_monotone(fit + row, counts) for row in noise])
        crossings = find_crossing(self.grid, dims, fits, self.target + self.share * own)
        measured = [*np.searchsorted(self.grid, dims), len(self.grid)]
        crossings[crossings == measured[0]] = 0  # reached there: smaller d are unknown
        ends = [(1 - INSIDE) / 2, (1 + INSIDE) / 2]
        low, high = np.quantile([*crossings, self.find_index()], ends, method="inverted_cdf")
        below = int(np.searchsorted(fit, self.target - TINY))
        first = np.searchsorted(self.grid, dims[below - 1], "right") if below else 0
        return min(int(low), int(first)), max(int(high), int(measured[below]))

    def estimate_error(self) -> float:
        """Estimate the standard error of the aggregate of full fine-tuning; 0 for one seed."""
        scores = self.baseline.scores
        if len(scores) < 2:
            return 0.0
        # The median of three Gaussian values varies 1.16 times as much as the mean, of many √(π/2) times.
        wider = 1.0 if self.center == "mean" or len(scores) < 3 else 1.16 if len(scores) < 5 else math.sqrt(math.pi / 2)
        return wider * float(np.std(scores, ddof=1)) / math.sqrt(len(scores))

    def _sample_examples(self, dims: Sequence[int], rng: np.random.Generator, resamples: int) -> np.ndarray:
        """Resample held-out examples. Returns changes of score, `[resamples, 1 + dims]`, full fine-tuning first."""
        groups = [self.baseline, *(self.points[d] for d in dims)]
        known = [runs.correct.mean(0) for runs in groups if runs.correct is not None]
        if not known or len({len(row) for row in known}) > 1:
            return np.zeros((resamples, len(groups)))
        examples = len(known[0])
        means = [np.zeros(examples) if runs.correct is None else runs.correct.mean(0) for runs in groups]
        table = np.stack(means, 1)
        changes = []
        for start in range(0, resamples, 20):  # a resample has a count for each example
            counts = rng.multinomial(examples, np.full(examples, 1 / examples), min(20, resamples - start))
            changes.append((counts / examples - 1 / examples) @ table)
        return np.concatenate(changes)
