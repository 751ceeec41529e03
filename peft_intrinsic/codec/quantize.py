"""Rounding numbers to a few values: optimal k-means on a line, values in half precision."""

from __future__ import annotations

import kmeans1d
import numpy as np

LEVELS = 256
"""The most values that a packed adapter may use."""


def halves(values: np.ndarray) -> tuple[int, np.ndarray]:
    """Numbers as float16 times a common power of two, which puts the largest into [1, 2): any unit keeps 11 bits.

    Args:
        values: `float[k]`.

    Returns:
        The exponent, and `float16[k]`.

    Raises:
        ValueError: the numbers are outside what an exponent of a signed byte reaches.
    """
    largest = float(np.abs(values).max(initial=0))
    exponent = int(np.frexp(largest)[1]) - 1 if largest else 0
    if np.float16(np.ldexp(largest, -exponent)) == 2:  # rounded up
        exponent += 1
    if not -128 <= exponent < 128:
        raise ValueError(f"The largest number is {largest:g}, outside of what can be packed (2^-128 to 2^128).")
    return exponent, np.ldexp(values.astype(np.float64), -exponent).astype(np.float16)


def whole(exponent: int, values: np.ndarray) -> np.ndarray:
    """What `halves` took apart: `float16[k] -> float32[k]`."""
    return np.ldexp(values.astype(np.float64), exponent).astype(np.float32)


def check_levels(levels: int) -> int:
    """Raises ValueError where so many values cannot be had."""
    if not isinstance(levels, (int, np.integer)) or not 1 <= levels <= LEVELS:
        raise ValueError(f"levels must be a whole number from 1 to {LEVELS}, got {levels!r}.")
    return levels


def codebook(theta: np.ndarray, levels: int) -> np.ndarray:
    """The values, at most `levels` of them, that lose least of θ in the square: exact one-dimensional k-means.

    Args:
        theta: `float[N]`.
        levels: 1 to `LEVELS`.

    Returns:
        `float32[L]`, rising, each of them one that `halves` keeps.

    Raises:
        ValueError: `levels` is out of range.
    """
    distinct = np.unique(theta.astype(np.float64))
    if len(distinct) > check_levels(levels):
        distinct = np.unique(kmeans1d.cluster(theta.astype(np.float64), levels).centroids)
    return np.unique(whole(*halves(distinct)) + np.float32(0))  # one zero, not two


def nearest(theta: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The index of the nearest of some rising values: `float[N], float[L] -> int32[N]`."""
    middles = (values[1:].astype(np.float64) + values[:-1]) / 2
    return np.searchsorted(middles, theta.astype(np.float64)).astype(np.int32)


def rounded(theta: np.ndarray, levels: int) -> np.ndarray:
    """θ in at most `levels` values: `float32[N]`."""
    values = codebook(theta, levels)
    return values[nearest(theta, values)]
