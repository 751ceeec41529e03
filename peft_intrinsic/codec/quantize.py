"""Quantizes θ to a few values: optimal k-means in one dimension, with values in half precision."""

from __future__ import annotations

import kmeans1d
import numpy as np

MAX_LEVELS = 256
"""Maximum number of values of θ in a packed adapter."""


def to_halves(values: np.ndarray) -> tuple[int, np.ndarray]:
    """Convert `float[k]` to an exponent and `float16[k]`, the largest in [1, 2), so that any scale has 11 bits.

    Raises:
        ValueError: the exponent does not fit into a signed byte.
    """
    largest = float(np.abs(values).max(initial=0))
    exponent = int(np.frexp(largest)[1]) - 1 if largest else 0
    if np.float16(np.ldexp(largest, -exponent)) == 2:  # rounded up
        exponent += 1
    if not -128 <= exponent < 128:
        raise ValueError(
            f"The largest parameter is {largest:g}, outside the range of a packed adapter (2^-128 to 2^128)."
        )
    return exponent, np.ldexp(values.astype(np.float64), -exponent).astype(np.float16)


def from_halves(exponent: int, values: np.ndarray) -> np.ndarray:
    """Convert the result of `to_halves` back: `float16[k]` to `float32[k]`."""
    return np.ldexp(values.astype(np.float64), exponent).astype(np.float32)


def check_levels(levels: int) -> int:
    """Return `levels`, or raise ValueError if θ cannot have so many values."""
    if not isinstance(levels, (int, np.integer)) or not 1 <= levels <= MAX_LEVELS:
        raise ValueError(f"levels must be an integer from 1 to {MAX_LEVELS}, got {levels!r}.")
    return levels


def fit_codebook(theta: np.ndarray, levels: int) -> np.ndarray:
    """Find the values with the least squared error of θ, by exact one-dimensional k-means.

    Args:
        theta: `float[N]`.
        levels: maximum number of values, 1 to `MAX_LEVELS`.

    Returns:
        Increasing `float32[L]`, unchanged by `to_halves`.

    Raises:
        ValueError: `levels` is out of range.
    """
    distinct = np.unique(theta.astype(np.float64))
    if len(distinct) > check_levels(levels):
        distinct = np.unique(kmeans1d.cluster(theta.astype(np.float64), levels).centroids)
    return np.unique(from_halves(*to_halves(distinct)) + np.float32(0))  # one zero, not two


def find_nearest(theta: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Find the index of the nearest of increasing values: `float[N], float[L] -> int32[N]`."""
    middles = (values[1:].astype(np.float64) + values[:-1]) / 2
    return np.searchsorted(middles, theta.astype(np.float64)).astype(np.int32)


def quantize(theta: np.ndarray, levels: int) -> np.ndarray:
    """Round `float[N]` to at most `levels` values: `float32[N]`."""
    values = fit_codebook(theta, levels)
    return values[find_nearest(theta, values)]
