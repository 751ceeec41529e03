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
"""Normals are rounded to this grid, far coarser than the last-digit differences between mathematics libraries."""


def words(seed: int, purpose: str, name: str, count: int) -> np.ndarray:
    """The first `count` 64-bit words of the stream that belongs to (seed, purpose, name).

    Returns:
        `uint64[count]`: raw output of Philox4x64-10 under a key of 128 bits taken from SHA-256.
    """
    label = f"peft-intrinsic/{ALGORITHM_VERSION}/{seed}/{purpose}/{name}"
    key = np.frombuffer(hashlib.sha256(label.encode()).digest()[:16], dtype="<u8")
    return np.random.Philox(key=key.astype(np.uint64)).random_raw(count)


def normals(raw: np.ndarray) -> np.ndarray:
    """Standard normal numbers from raw words, by the inverse distribution function, rounded to `GRID`.

    Args:
        raw: `uint64[...]`.

    Returns:
        `float64[...]`, each an exact multiple of `GRID`.
    """
    uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return np.rint(ndtri(uniform) / GRID) * GRID


def normal_rows(seed: int, purpose: str, name: str, rows: int, width: int) -> np.ndarray:
    """Normal rows, each scaled to the length √width, so that every weight gets a row of P of the same norm.

    Row k depends on (seed, purpose, name, width, k) alone: asking for more rows changes none of the first.

    Returns:
        `float32[rows, width]`.
    """
    drawn = normals(words(seed, purpose, f"{name}/{width}", rows * width)).reshape(rows, width)
    length = np.sqrt(np.square(drawn / GRID).sum(axis=1, keepdims=True))  # of integers: the sum is exact
    return (drawn / GRID * (np.sqrt(width) / length)).astype(np.float32)


def signs_and_permutations(seed: int, name: str, count: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """B and Π of `count` Fastfood blocks of order n, from one tensor's stream.

    Block t takes n + ⌈n/64⌉ words: n sort keys (Π is their stable argsort), then its sign bits, lowest bit first
    (1 means −1).

    Returns:
        `int8[count, n]` of ±1 and `int64[count, n]`.
    """
    sign_words = -(-n // 64)
    raw = words(seed, "block", f"{name}/{n}", count * (n + sign_words)).reshape(count, n + sign_words)
    permutation = np.argsort(raw[:, :n], axis=1, kind="stable")
    bits = np.unpackbits(raw[:, n:].astype("<u8").view(np.uint8), axis=1, bitorder="little")[:, :n]
    return (1 - 2 * bits.astype(np.int8)), permutation
