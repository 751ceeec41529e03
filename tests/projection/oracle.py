"""Independent definitions of the random stream (integers) and of P (dense, float64), written for clarity alone."""

from fractions import Fraction
from functools import lru_cache
from hashlib import sha256
from math import floor, sqrt
from statistics import NormalDist

import numpy as np
import scipy.linalg
import torch

TOLERANCE = {
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
}  # relative RMS error by dtype
MASK = 2**64 - 1


def error(actual: torch.Tensor, expected: np.ndarray) -> float:
    """Relative RMS error."""
    actual = actual.detach().double().numpy()
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def philox(counter: int, key: tuple[int, int]) -> list[int]:
    """One block of Philox4x64-10 (Salmon et al. 2011)."""
    c0, c1, c2, c3 = (counter >> 64 * i & MASK for i in range(4))
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * 0xD2E7470EE14C6C93, c2 * 0xCA5A826395121157
        c0, c1, c2, c3 = b >> 64 ^ c1 ^ k0, b & MASK, a >> 64 ^ c3 ^ k1, a & MASK
        k0, k1 = k0 + 0x9E3779B97F4A7C15 & MASK, k1 + 0xBB67AE8584CAA73B & MASK
    return [c0, c1, c2, c3]


@lru_cache(maxsize=64)
def words(seed: int, purpose: str, name: str, count: int) -> list[int]:
    digest = sha256(f"peft-intrinsic/1/{seed}/{purpose}/{name}".encode()).digest()
    key = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")
    return [word for block in range(-(-count // 4)) for word in philox(block + 1, key)][:count]


def normal(word: int) -> float:
    """An odd multiple of 2⁻¹⁷."""
    return (2 * floor(NormalDist().inv_cdf(float(Fraction(2 * (word >> 12) + 1, 2**53))) * 2**16) + 1) / 2**17


def normal_rows(seed: int, purpose: str, name: str, rows: int, width: int) -> np.ndarray:
    z = np.array([normal(word) for word in words(seed, purpose, f"{name}/{width}", rows * width)]).reshape(rows, width)
    return z * (sqrt(width) / np.linalg.norm(z, axis=1, keepdims=True))


def blocks(seed: int, name: str, count: int, n: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Signs before, permutation and signs after of every block."""
    result = []
    size = n + -(-2 * n // 64)
    raw = words(seed, "block", f"{name}/{n}", count * size)
    for t in range(count):
        block = raw[t * size : (t + 1) * size]
        bits = sum(word << 64 * i for i, word in enumerate(block[n:]))
        signs = [-1 if bits >> i & 1 else 1 for i in range(2 * n)]
        result.append((signs[:n], sorted(range(n), key=block.__getitem__), signs[n:]))
    return result


@lru_cache(maxsize=4)
def hadamard(n: int) -> np.ndarray:
    return scipy.linalg.hadamard(n, dtype=np.int8)


def fan_in(rows: int, cols: int) -> int:
    return rows if cols == 1 else cols


def fastfood(
    d: int, seed: int, n: int, scale: str, shapes: dict[str, tuple[int, int]], limit: int = 16384
) -> dict[str, np.ndarray]:
    """P, column by column: `float64[d, rows, cols]` for each name. `limit` is the height of a row chunk."""
    count = -(-d // n)
    width = -(-d // count)
    tiles, load, moved = [], [0] * count, [0] * count
    for name in sorted(shapes):
        rows, cols = shapes[name]
        corners = [(top, left) for top in range(0, rows, limit) for left in range(0, cols, n)]
        for (top, left), (signs, order, after) in zip(corners, blocks(seed, name, len(corners), n), strict=True):
            part = np.s_[top : min(top + limit, rows), left : min(left + n, cols)]
            height, columns = part[0].stop - top, part[1].stop - left
            k = load.index(min(load))
            load[k] += columns
            moved[k] += height * columns
            tiles.append((name, part, height, columns, signs, order, after, k))

    h = hadamard(n)
    g = normal_rows(seed, "gaussian", "", min(limit, max(rows for rows, _ in shapes.values())), n)
    result = {name: np.zeros((d, *shape)) for name, shape in shapes.items()}
    for name, part, height, columns, signs, order, after, k in tiles:
        s = 1 / sqrt(moved[k]) if scale == "isometric" else 1 / sqrt(fan_in(*shapes[name]) * width)
        right = h[:, :columns].astype(float)
        for i in range(min(width, d - k * width)):
            u = h[:, i][order] * after * (signs[i] / sqrt(n))
            result[name][k * width + i][part] = s * (g[:height] * u) @ right
    return result


def dense(d: int, seed: int, scale: str, shapes: dict[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    """P of the dense projection: `float64[d, rows, cols]` for each name."""
    total = sum(rows * cols for rows, cols in shapes.values())
    result = {}
    for name, (rows, cols) in shapes.items():
        p = normal_rows(seed, "dense", name, rows * cols, d).T.reshape(d, rows, cols)
        result[name] = p / sqrt(total if scale == "isometric" else fan_in(rows, cols) * d)
    return result
