"""Fastfood, tile by tile, in a form that is low rank by construction: ΔW = G · A(θ)."""

from __future__ import annotations

import heapq
from weakref import WeakValueDictionary

import numpy as np
import torch
import torch.nn.functional as F

from .base import Shapes, Spec, TensorProjection, natural_size, samples
from .hadamard import fwht, hadamard
from .randomness import normal_rows, signs_and_permutations

ROWS = 16384
"""R: tensors with more rows are cut into chunks of this height, each with its own signs and permutations."""

DEFAULT_BLOCK_SIZE = 64


class Gaussian:
    """G, `float32[rows, n]`: one for all tensors of a projection, with one copy for each device."""

    def __init__(self, seed: int, n: int, rows: int) -> None:
        matrix = torch.from_numpy(normal_rows(seed, "gaussian", "", rows, n))
        self._copies = {matrix.device: matrix}

    def on(self, device: torch.device) -> torch.Tensor:
        """G on `device`."""
        if device not in self._copies:
            with torch.inference_mode(False):
                self._copies[device] = next(iter(self._copies.values())).to(device)
        return self._copies[device]


_ALIVE: WeakValueDictionary[tuple[int, int, int], Gaussian] = WeakValueDictionary()
"""G of the adapters that exist, by (seed, n, rows): adapters of one seed share it."""


def _gaussian(seed: int, n: int, rows: int) -> Gaussian:
    found = _ALIVE.get((seed, n, rows))
    if found is None:
        found = _ALIVE[seed, n, rows] = Gaussian(seed, n, rows)
    return found


class FastfoodTensor(TensorProjection):
    """Tiles of one tensor: row chunk r and column block b give tile t = r · blocks + b.

    Args:
        rows, cols: of the tensor.
        gaussian: G, `[≥ min(rows, R), n]`, shared by all tensors.
        before: B, `float32[tiles, n]`.
        permutation: Π, `int64[tiles, n]`.
        after: B' times the tile's scale, `float32[tiles, n]`.
        slices: which slice of θ each tile mixes, `int64[tiles]`.
        count, width: how many slices θ is cut into, and the coordinates in each.
    """

    def __init__(
        self,
        rows: int,
        cols: int,
        gaussian: Gaussian,
        before: torch.Tensor,
        permutation: torch.Tensor,
        after: torch.Tensor,
        slices: torch.Tensor,
        count: int,
        width: int,
    ) -> None:
        self.rows, self.cols, self.count, self.width = rows, cols, count, width
        self.n = before.shape[1]
        self.chunks = -(-rows // ROWS)
        self.blocks = -(-cols // self.n)
        self.gaussian = gaussian
        self._state: dict[torch.device, tuple[torch.Tensor, ...]] = {
            before.device: (before, permutation, after, slices)
        }

    def state(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """B, Π, scaled B' and slices on `device`."""
        if device not in self._state:
            with torch.inference_mode(False):
                self._state[device] = tuple(t.to(device) for t in self._state[next(iter(self._state))])
        return self._state[device]

    def mixed(self, theta: torch.Tensor) -> torch.Tensor:
        """u = scale · B' Π (1/√n) H B θ of every tile: `[..., d] -> [..., chunks, blocks, n]`."""
        before, permutation, after, slices = self.state(theta.device)
        with torch.autocast(theta.device.type, enabled=False):
            theta = F.pad(theta.float(), (0, self.count * self.width - theta.shape[-1]))
            theta = F.pad(theta.unflatten(-1, (self.count, self.width)), (0, self.n - self.width))  # [..., count, n]
            u = fwht(theta[..., slices, :] * before)  # [..., tiles, n]
            u = u.gather(-1, permutation.expand_as(u)) * after
        return u.unflatten(-2, (self.chunks, self.blocks))

    def factor(self, theta: torch.Tensor) -> torch.Tensor:
        """A(θ), the low-rank factor of every row chunk: `[..., d] -> [..., chunks, n, cols]`."""
        u = self.mixed(theta)
        h = hadamard(self.n, min(self.n, self.cols), u)  # [n, ≤ n]
        a = u.transpose(-1, -2).unsqueeze(-1) * h.unsqueeze(1)  # [..., chunks, n, blocks, ≤ n]
        return a.flatten(-2)[..., : self.cols]

    def basis(self, theta: torch.Tensor, chunk: int) -> torch.Tensor:
        """The rows of G that a row chunk uses: `[height, n]`."""
        return self.gaussian.on(theta.device)[: min(ROWS, self.rows - chunk * ROWS)]

    def factors(self, theta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The offset as a product, `[d] -> [rows, k], [k, cols]` with k = chunks · n."""
        left = torch.block_diag(*(self.basis(theta, r) for r in range(self.chunks)))
        return left, self.factor(theta).flatten(0, 1)

    def slab(self, theta: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        with torch.autocast(theta.device.type, enabled=False):
            a = self.factor(theta)
            parts = []
            for r in range(start // ROWS, -(-stop // ROWS)):
                rows = self.basis(theta, r)[max(start - r * ROWS, 0) : stop - r * ROWS]
                parts.append(rows @ a[..., r, :, :])
            return torch.cat(parts, -2)

    def linear(self, x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        each = theta.dim() > 1
        if each:  # sums with the signs of H cancel, so they want more than half precision; there is no backward pass
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        z = self._products(x, theta) if each else [F.linear(x, a) for a in self.factor(theta).to(x.dtype)]
        return torch.cat([F.linear(z[r], self.basis(theta, r).to(x.dtype)) for r in range(self.chunks)], -1)

    def _products(self, x: torch.Tensor, theta: torch.Tensor) -> list[torch.Tensor]:
        """x A(θ)ᵀ of every row chunk, `[batch, ..., n]`, each sample with its own θ, without any A(θ).

        A is diagonal matrices times H, and only the diagonals depend on θ: x H serves all samples.
        """
        u = self.mixed(theta).to(x.dtype)  # [batch, chunks, blocks, n]
        h = F.pad(x, (0, self.blocks * self.n - self.cols)).reshape(len(x), -1, self.blocks, self.n)
        h = fwht(h)  # [batch, tokens, blocks, n]
        return [(h * u[:, r, None]).sum(-2).view(*x.shape[:-1], self.n) for r in range(self.chunks)]

    def gather(self, index: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        with torch.autocast(theta.device.type, enabled=False):
            place = (*samples(theta, index), index // ROWS)
            u = self.mixed(theta)[place]  # [..., blocks, n]
            g = F.embedding(index % ROWS, self.gaussian.on(theta.device))  # [..., n]
            return fwht(g.unsqueeze(-2) * u).flatten(-2)[..., : self.cols]


def _tile_widths(cols: int, chunks: int, n: int) -> list[int]:
    return [min(n, cols - start) for _ in range(chunks) for start in range(0, cols, n)]


def _tiles(rows: int, cols: int, n: int) -> int:
    return -(-rows // ROWS) * -(-cols // n)


def choose_block_size(d: int, shapes: Shapes) -> int:
    """`DEFAULT_BLOCK_SIZE`, doubled until every slice of θ has a tile."""
    n = DEFAULT_BLOCK_SIZE
    while sum(_tiles(rows, cols, n) for rows, cols in shapes.values()) < -(-d // n):
        n *= 2
    return n


@torch.inference_mode(False)
def build_fastfood(spec: Spec, shapes: Shapes) -> dict[str, TensorProjection]:
    """Fastfood projections for the tensors named in `shapes`.

    θ is cut into K = ⌈d/n⌉ slices of equal width. Tiles, in the order of the sorted names, go to the slice that has
    got the fewest columns so far.

    Raises:
        ValueError: there are fewer tiles than slices, so that some coordinates would move nothing.
    """
    n, d = spec.block_size, spec.d
    count = -(-d // n)
    width = -(-d // count)
    tiles = {name: _tiles(rows, cols, n) for name, (rows, cols) in shapes.items()}
    if sum(tiles.values()) < count:
        raise ValueError(
            f"d={d} with block_size={n} needs {count} blocks, but the targeted tensors hold only "
            f"{sum(tiles.values())}. Use a larger block_size, a smaller d, or target more tensors."
        )

    load = [(0, k) for k in range(count)]
    weights = np.zeros(count)  # weights moved by each slice
    slices: dict[str, list[int]] = {}
    for name in sorted(shapes):
        rows, cols = shapes[name]
        chunks = -(-rows // ROWS)
        slices[name] = []
        for t, columns in enumerate(_tile_widths(cols, chunks, n)):
            filled, k = heapq.heappop(load)
            heapq.heappush(load, (filled + columns, k))
            slices[name].append(k)
            weights[k] += columns * min(ROWS, rows - t // (tiles[name] // chunks) * ROWS)

    height = min(ROWS, max(rows for rows, _ in shapes.values()))
    gaussian = _gaussian(spec.seed, n, height)
    result: dict[str, TensorProjection] = {}
    for name, (rows, cols) in shapes.items():
        signs, permutation = signs_and_permutations(spec.seed, name, tiles[name], n)
        if spec.scale == "isometric":
            scale = 1 / np.sqrt(weights[slices[name]])
        else:
            scale = np.full(tiles[name], natural_size(rows, cols) / np.sqrt(width))
        result[name] = FastfoodTensor(
            rows,
            cols,
            gaussian,
            torch.from_numpy(signs[:, 0].astype(np.float32)),
            torch.from_numpy(permutation),
            torch.from_numpy((signs[:, 1] * (scale / np.sqrt(n))[:, None]).astype(np.float32)),
            torch.tensor(slices[name], device="cpu"),
            count,
            width,
        )
    return result
