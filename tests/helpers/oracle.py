"""Independent definitions of the random stream (integers) and of P (dense, float64), written for clarity alone."""

import json
from fractions import Fraction
from functools import lru_cache
from hashlib import sha256
from math import ceil, floor, sqrt
from statistics import NormalDist

import numpy as np
import scipy.linalg
import torch
from safetensors import safe_open

from peft_intrinsic.projection import Shape, TensorProjection, ValueBias

TOLERANCE = {
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
}  # relative RMS error by dtype
MASK = 2**64 - 1


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def columns(projection: TensorProjection, d: int) -> torch.Tensor:
    """P, the offsets of all unit vectors: `[d, rows, cols]`."""
    return torch.cat([projection.materialize(units) for units in torch.eye(d).split(64)])


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


def natural(shape: Shape) -> float:
    """c of a tensor."""
    factor = {"matrix": 1, "embedding": 1, "norm": 8, "bias": 8, "head": 8}[shape.kind]
    return factor / sqrt(shape.rows if shape.kind in ("norm", "bias") else shape.cols)


def allocate(d: int, shapes: dict[str, Shape]) -> dict[str, tuple[int, int]]:
    """First coordinate of every tensor, and how many it has."""
    names = sorted(shapes)
    amount: dict[str, Fraction] = {}
    while True:  # equal parts of what the tensors that are full have left
        open_ = [name for name in names if name not in amount]
        parts = {name: 16 if shapes[name].kind == "head" else 1 for name in open_}
        part = Fraction(d - sum(amount.values()), max(1, sum(parts.values())))
        small = [name for name in open_ if shapes[name].size < part * parts[name]]
        if not small:
            break
        amount |= {name: Fraction(shapes[name].size) for name in small}
    result, end = {}, Fraction(0)
    for name in names:
        start, end = end, end + (amount[name] if name in amount else part * parts[name])
        result[name] = floor(start), max(1, floor(end) - floor(start))
    return result


def fastfood(
    d: int, seed: int, n: int, scale: str, shapes: dict[str, Shape], limit: int = 16384, whole: bool = False
) -> dict[str, np.ndarray]:
    """P, column by column: `float64[d, rows, cols]` for each name. `limit` is the height of a row chunk."""
    allocated = allocate(d, shapes)
    slots, starts = [], {}
    for name in sorted(shapes):
        rows, cols = shapes[name][:2]
        first, count = allocated[name]
        height = min(limit, rows, n * rows * cols // count)
        depth = min(n, ceil(Fraction(count * height, rows * n * max(1, cols // n))))
        tops = range(0, rows, height)
        starts[name] = [word % min(4096, max(1, 2**18 // n)) for word in words(seed, "window", name, len(tops))]
        corners = [(i, top, left, j) for i, top in enumerate(tops) for left in range(0, cols, n) for j in range(depth)]
        slices, done, last = ceil(Fraction(count, n)), 0, -1
        cuts = [floor(Fraction(k * count, slices)) for k in range(slices + 1)]
        for s, ((i, top, left, j), block) in enumerate(zip(corners, blocks(seed, name, len(corners), n), strict=True)):
            part = np.s_[top : min(top + height, rows), left : min(left + n, cols)]
            weights = (part[0].stop - top) * (part[1].stop - left)
            last = k = sorted([slices - len(corners) + s, slices * done // (rows * cols * depth), last + 1])[1]
            done += weights
            slots.append((name, i, part, weights, j, block, first + cuts[k], first + cuts[k + 1]))
    if whole:
        count = ceil(Fraction(d, n))
        ends, load = [floor(Fraction(k * d, count)) for k in range(count + 1)], [0] * count
        for s, (*rest, _, _) in enumerate(slots):
            k = load.index(min(load))
            load[k] += rest[3]
            slots[s] = (*rest, ends[k], ends[k + 1])

    moved = np.zeros(d)
    mixed: dict[tuple, int] = {}
    for name, _, part, weights, _, _, low, high in slots:
        moved[low:high] += weights
        mixed[name, str(part)] = mixed.get((name, str(part)), 0) + high - low
    h = hadamard(n)
    height = max(max(starts[name]) + min(limit, shapes[name].rows) for name in shapes)
    g = normal_rows(seed, "gaussian", "", height, n)
    result = {name: np.zeros((d, shape.rows, shape.cols)) for name, shape in shapes.items()}
    for name, chunk, part, _, j, (signs, order, after), low, high in slots:
        if scale == "isometric":
            s = 1 / sqrt(moved[low:high].mean())
        else:
            s = 512 / sqrt(sqrt(d)) * natural(shapes[name]) / sqrt(mixed[name, str(part)])
        top, bottom, right = starts[name][chunk], part[0].stop - part[0].start, part[1].stop - part[1].start
        for i in range(high - low):
            u = h[:, i][order] * after * (signs[i] / sqrt(n))
            banded = u[:, None] * np.roll(h[:, :right], -j, axis=0)  # U H: row i is u[i] times row i + j of H
            result[name][low + i][part] += s * g[top : top + bottom] @ banded
    return result


def dense(d: int, seed: int, scale: str, shapes: dict[str, Shape]) -> dict[str, np.ndarray]:
    """P of the dense projection: `float64[d, rows, cols]` for each name."""
    total = sum(shape.rows * shape.cols for shape in shapes.values())
    result = {}
    for name, shape in shapes.items():
        p = normal_rows(seed, "dense", name, shape.size, d).T.reshape(d, shape.rows, shape.cols)
        result[name] = p * (1 / sqrt(total) if scale == "isometric" else 512 / sqrt(sqrt(d)) * natural(shape) / sqrt(d))
    return result


def trajectory(d: int, scale: str, shapes: dict[str, Shape], path: str) -> dict[str, np.ndarray]:
    """P of a subspace file: `float64[d, rows, cols]` for each name."""
    with safe_open(path, "np") as file:
        about = file.metadata()
        directions = {name: file.get_tensor(name).astype(float) for name in shapes}
    groups = json.loads(about["groups"])
    room = [len(group["singular_values"]) for group in groups]
    counts, i = [0] * len(groups), 0
    while sum(counts) < d:  # one coordinate for each group in turn
        counts[i] += counts[i] < room[i]
        i = (i + 1) % len(groups)
    result = {}
    for group, count, end in zip(groups, counts, np.cumsum(counts), strict=True):
        length = 1 if scale == "isometric" else 64 * group["singular_values"][0] / sqrt(int(about["snapshots"]))
        for name in group["parameters"]:
            rows, cols, _, transposed = shapes[name]
            part = directions[name][:count]
            result[name] = np.zeros((d, rows, cols))
            result[name][end - count : end] = length * (part.swapaxes(1, 2) if transposed else part)
    return result


def value_bias(
    d: int, seed: int, scale: str, shapes: dict[str, Shape], values: dict[str, ValueBias]
) -> dict[str, np.ndarray]:
    """P of biases of value projections, or of their weights: `float64[d, rows, cols]`. QR by Gram and Schmidt."""
    allocated = allocate(d, {name: Shape(values[name].size, 1, "bias") for name in shapes})
    shared = [sum(first <= i < first + count for first, count in allocated.values()) for i in range(d)]
    result = {}
    for name, shape in shapes.items():
        first, count = allocated[name]
        low, n, folded, read_map, measure = values[name]
        matrix, (size, a) = read_map(), measure()
        gram = matrix.T @ matrix
        gram = gram * (n / np.trace(gram)) + np.eye(n) / 1024
        bias = name.removesuffix(".weight") + ".bias" if folded else name
        columns = np.array([normal(word) for word in words(seed, "frame", bias, count * n)]).reshape(count, n).T
        for power in range(9):
            columns = gram_schmidt(gram @ columns if power else columns)
        p = np.zeros((d, shape.rows if folded else shape.size))
        for i in range(count):
            length = 1 / sqrt(shared[first + i]) if scale == "isometric" else 200 * size * sqrt(n / count)
            p[first + i, low : low + n] = length * columns[:, i]
        if a is not None:
            p = np.einsum("dr,c->drc", p, a / sqrt(a @ a) if scale == "isometric" else a)
        result[name] = p.reshape(d, shape.rows, shape.cols)
    return result


def gram_schmidt(columns: np.ndarray) -> np.ndarray:
    result = np.zeros_like(columns)
    for i in range(columns.shape[1]):
        rest = columns[:, i]
        for _ in range(2):  # again, against rounding
            rest = rest - result @ (result.T @ rest)
        result[:, i] = rest / np.linalg.norm(rest)
    return result
