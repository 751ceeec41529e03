"""Counter-based random numbers of all projections, keyed by name, the same on every platform.

Only the raw output of numpy's Philox bit generator is used, which NEP 19 guarantees. So no version of torch and no
device changes an adapter. This folder's README.md has the exact definition.
"""

from __future__ import annotations

import hashlib

import numpy as np
from scipy.special import ndtri

ALGORITHM_VERSION = 1
"""Version of P. It changes whenever the same configuration would give another P."""

GRID = 2.0**-16
"""Normals are rounded to odd multiples of half of this, far coarser than the differences of mathematics libraries."""


def words(seed: int, purpose: str, name: str, count: int) -> np.ndarray:
    """Return the first `count` 64-bit words of the stream of (seed, purpose, name).

    Returns:
        `uint64[count]`: raw output of Philox4x64-10 under a key of 128 bits taken from SHA-256.
    """
    label = f"peft-intrinsic/1/{seed}/{purpose}/{name}"  # 1 for every ALGORITHM_VERSION, for old adapters
    key = np.frombuffer(hashlib.sha256(label.encode()).digest()[:16], dtype="<u8")
    return np.random.Philox(key=key.astype(np.uint64)).random_raw(count)


def _half_steps(raw: np.ndarray) -> np.ndarray:
    """Convert words to normals as odd multiples of half of `GRID`: never zero, never infinite."""
    uniform = ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return 2 * np.floor(ndtri(uniform) / GRID).astype(np.int64) + 1


def normals(raw: np.ndarray) -> np.ndarray:
    """Convert words `uint64[...]` to standard normals `float64[...]`, each an odd multiple of half of `GRID`."""
    return _half_steps(raw) * (GRID / 2)


def normal_rows(seed: int, purpose: str, name: str, rows: int, width: int) -> np.ndarray:
    """Return normal rows scaled to length √width, so that all rows of P have the same norm.

    Row k depends on (seed, purpose, name, width, k) alone, not on the number of rows.

    Returns:
        `float32[rows, width]`.
    """
    steps = _half_steps(words(seed, purpose, f"{name}/{width}", rows * width)).reshape(rows, width)
    length = np.sqrt(np.square(steps).sum(axis=1, keepdims=True))  # of integers: the sum is exact
    return (steps * (np.sqrt(width) / length)).astype(np.float32)


def signs_and_permutations(seed: int, name: str, count: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the signs B and B' and the permutation Π of `count` blocks of order n, from one tensor's stream.

    Block t uses n + ⌈2n/64⌉ words. The first n are sort keys, whose stable argsort is Π. The others hold sign bits,
    lowest first, 1 for −1: n for B, then n for B'.

    Returns:
        `int8[count, 2, n]` of ±1 and `int64[count, n]`.
    """
    size = n + -(-2 * n // 64)
    raw = words(seed, "block", f"{name}/{n}", count * size).reshape(count, size)
    permutation = np.argsort(raw[:, :n], axis=1, kind="stable")
    bits = np.unpackbits(raw[:, n:].astype("<u8").view(np.uint8), axis=1, bitorder="little")[:, : 2 * n]
    return (1 - 2 * bits.astype(np.int8)).reshape(count, 2, n), permutation
