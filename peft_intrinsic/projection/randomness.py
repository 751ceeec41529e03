"""The random stream behind every projection: counter-based, keyed by name, the same on every platform.

Only the raw output of numpy's Philox bit generator is used (its stream is guaranteed, NEP 19), so neither a torch
version nor a device can change an adapter. The exact definition is in the README beside this file.
"""

from __future__ import annotations

import hashlib

import numpy as np
from scipy.special import ndtri

ALGORITHM_VERSION = 1
"""Changes whenever the same configuration would give another projection."""

GRID = 2.0**-16
"""Normals are put on the odd multiples of half of this, far coarser than what mathematics libraries differ by."""


def words(seed: int, purpose: str, name: str, count: int) -> np.ndarray:
    """The first `count` 64-bit words of the stream that belongs to (seed, purpose, name).

    Returns:
        `uint64[count]`: raw output of Philox4x64-10 under a key of 128 bits taken from SHA-256.
    """
    label = f"peft-intrinsic/1/{seed}/{purpose}/{name}"  # 1 whatever ALGORITHM_VERSION is: old adapters keep theirs
    key = np.frombuffer(hashlib.sha256(label.encode()).digest()[:16], dtype="<u8")
    return np.random.Philox(key=key.astype(np.uint64)).random_raw(count)


def _half_steps(raw: np.ndarray) -> np.ndarray:
    """Normals as odd integers, in units of half of `GRID`: never zero, never infinite."""
    uniform = ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return 2 * np.floor(ndtri(uniform) / GRID).astype(np.int64) + 1


def normals(raw: np.ndarray) -> np.ndarray:
    """Standard normal numbers from raw words, by the inverse distribution function, on the grid.

    Args:
        raw: `uint64[...]`.

    Returns:
        `float64[...]`, each an odd multiple of half of `GRID`.
    """
    return _half_steps(raw) * (GRID / 2)


def normal_rows(seed: int, purpose: str, name: str, rows: int, width: int) -> np.ndarray:
    """Normal rows, each scaled to the length √width, so that every weight gets a row of P of the same norm.

    Row k depends on (seed, purpose, name, width, k) alone: asking for more rows changes none of the first.

    Returns:
        `float32[rows, width]`.
    """
    steps = _half_steps(words(seed, purpose, f"{name}/{width}", rows * width)).reshape(rows, width)
    length = np.sqrt(np.square(steps).sum(axis=1, keepdims=True))  # of integers: the sum is exact
    return (steps * (np.sqrt(width) / length)).astype(np.float32)


def signs_and_permutations(seed: int, name: str, count: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The signs B and B' and the permutation Π of `count` blocks of order n, from one tensor's stream.

    Block t takes n + ⌈2n/64⌉ words: n sort keys (Π is their stable argsort), then sign bits, lowest first (1 means −1):
    n for B, n for B'.

    Returns:
        `int8[count, 2, n]` of ±1 and `int64[count, n]`.
    """
    size = n + -(-2 * n // 64)
    raw = words(seed, "block", f"{name}/{n}", count * size).reshape(count, size)
    permutation = np.argsort(raw[:, :n], axis=1, kind="stable")
    bits = np.unpackbits(raw[:, n:].astype("<u8").view(np.uint8), axis=1, bitorder="little")[:, : 2 * n]
    return (1 - 2 * bits.astype(np.int8)).reshape(count, 2, n), permutation
