"""Fastfood, tile by tile, in a form that is low rank by construction: ΔW = G · A(θ)."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakValueDictionary

import numpy as np
import torch
import torch.nn.functional as F

from .allocation import Tiling, Window, global_windows, own_windows, shares, tiling
from .base import Shapes, Spec, TensorProjection, samples
from .dense import DenseTensor
from .hadamard import fwht, hadamard
from .randomness import normal_rows, signs_and_permutations, words

BLOCK_SIZE = 64

OFFSETS = 4096
"""At how many rows a window into G may begin: fewer for large blocks, so that G has at most 2^18 numbers for it."""

STORED = 16
"""Coordinates up to which a norm or bias keeps its rows of P: one small product takes the place of ten operations."""


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
    """The tiles of one tensor: row chunk r, column block b, and in each tile the slots 0 to depth − 1.

    Args:
        rows, cols: of the tensor.
        cut: how it is cut into tiles and slots.
        gaussian: G, shared by all tensors.
        starts: first row of G of every chunk.
        windows: of θ, for every slot.
        before: B, `int8[slots, n]`.
        permutation: Π, `int64[slots, n]`.
        after: B' times the slot's scale, `float32[slots, n]`.
    """

    def __init__(
        self,
        rows: int,
        cols: int,
        cut: Tiling,
        gaussian: Gaussian,
        starts: Sequence[int],
        windows: Sequence[Window],
        before: np.ndarray,
        permutation: np.ndarray,
        after: np.ndarray,
    ) -> None:
        self.rows, self.cols, self.cut, self.gaussian, self.starts = rows, cols, cut, gaussian, starts
        self.n = before.shape[1]
        first, counts = np.array(windows).T
        column = np.arange(counts.max())
        inside = column < counts[:, None]
        # Beyond the end of a window B is zero, and any coordinate will do.
        index = first[:, None] + np.where(inside, column, 0)
        before = np.where(inside, before[:, : len(column)], 0).astype(np.float32)
        self._only = slice(*(index[0, [0, -1]] + [0, 1]).tolist()) if len(set(windows)) == 1 else None
        state = (index, before, permutation, after.astype(np.float32), np.array(starts))
        self._state = {torch.device("cpu"): tuple(torch.from_numpy(array) for array in state)}

    def state(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Coordinates, B, Π and scaled B' of the slots, and the first rows of G, on `device`."""
        if device not in self._state:
            with torch.inference_mode(False):
                self._state[device] = tuple(t.to(device) for t in self._state[torch.device("cpu")])
        return self._state[device]

    def mixed(self, theta: torch.Tensor) -> torch.Tensor:
        """u = scale · B' Π (1/√n) H B θ of every slot: `[..., d] -> [..., chunks, blocks, depth, n]`."""
        index, before, permutation, after, _ = self.state(theta.device)
        with torch.autocast(theta.device.type, enabled=False):
            theta = theta.float()
            theta = theta[..., index] if self._only is None else theta[..., self._only].unsqueeze(-2)
            u = fwht(theta * before, self.n)  # [..., slots, n]
            u = u.gather(-1, permutation.expand_as(u)) * after
        return u.unflatten(-2, (self.cut.chunks, self.cut.blocks, self.cut.depth))

    def banded(self, theta: torch.Tensor) -> torch.Tensor:
        """U of every tile, slot j on its j-th cyclic diagonal: `[..., d] -> [..., chunks, blocks, n, n]`."""
        u = self.mixed(theta).mT  # [..., n, depth]
        row, slot = torch.arange(self.n, device=u.device), torch.arange(self.cut.depth, device=u.device)
        column = ((row[:, None] + slot) % self.n).expand_as(u)
        return u.new_zeros(*u.shape[:-1], self.n).scatter(-1, column, u)

    def factor(self, theta: torch.Tensor) -> torch.Tensor:
        """A(θ) = U H, the low-rank factor of every row chunk: `[..., d] -> [..., chunks, n, cols]`."""
        if self.cut.depth == 1:
            u = self.mixed(theta).squeeze(-2)
            h = hadamard(self.n, min(self.n, self.cols), u)  # [n, ≤ n]
            a = u.transpose(-1, -2).unsqueeze(-1) * h.unsqueeze(1)  # [..., chunks, n, blocks, ≤ n]
        else:
            u = self.banded(theta)
            a = (u @ hadamard(self.n, min(self.n, self.cols), u)).transpose(-3, -2)
        return a.flatten(-2)[..., : self.cols]

    def basis(self, theta: torch.Tensor, chunk: int) -> torch.Tensor:
        """The rows of G that a row chunk uses: `[height, n]`."""
        start = self.starts[chunk]
        return self.gaussian.on(theta.device)[start : start + min(self.cut.height, self.rows - chunk * self.cut.height)]

    def factors(self, theta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The offset as a product, `[d] -> [rows, k], [k, cols]` with k = chunks · n."""
        left = torch.block_diag(*(self.basis(theta, r) for r in range(self.cut.chunks)))
        return left, self.factor(theta).flatten(0, 1)

    def slab(self, theta: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        height = self.cut.height
        with torch.autocast(theta.device.type, enabled=False):
            a = self.factor(theta)
            parts = []
            for r in range(start // height, -(-stop // height)):
                rows = self.basis(theta, r)[max(start - r * height, 0) : stop - r * height]
                parts.append(rows @ a[..., r, :, :])
            return torch.cat(parts, -2)

    def linear(self, x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        each = theta.dim() > 1
        if each:  # sums with the signs of H cancel, so they want more than half precision; there is no backward pass
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        z = self._products(x, theta) if each else [F.linear(x, a) for a in self.factor(theta).to(x.dtype)]
        return torch.cat([F.linear(part, self.basis(theta, r).to(x.dtype)) for r, part in enumerate(z)], -1)

    def _products(self, x: torch.Tensor, theta: torch.Tensor) -> list[torch.Tensor]:
        """x A(θ)ᵀ of every row chunk, `[batch, ..., n]`, each sample with its own θ, without any A(θ).

        A is U times H, and only U depends on θ: x H serves all samples.
        """
        h = F.pad(x, (0, self.cut.blocks * self.n - self.cols)).reshape(len(x), -1, self.cut.blocks, self.n)
        h = fwht(h)  # [batch, tokens, blocks, n]
        if self.cut.depth == 1:
            u = self.mixed(theta).to(x.dtype).squeeze(-2)  # [batch, chunks, blocks, n]
            z = [(h * u[:, r, None]).sum(-2) for r in range(self.cut.chunks)]
        else:
            u = self.banded(theta).to(x.dtype)  # [batch, chunks, blocks, n, n]
            z = [torch.einsum("stbi,sboi->sto", h, u[:, r]) for r in range(self.cut.chunks)]
        return [part.view(*x.shape[:-1], self.n) for part in z]

    def gather(self, index: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        *_, starts = self.state(theta.device)
        chunk = index // self.cut.height
        with torch.autocast(theta.device.type, enabled=False):
            place = (*samples(theta, index), chunk)
            g = F.embedding(index % self.cut.height + starts[chunk], self.gaussian.on(theta.device))
            if self.cut.depth == 1:
                u = g.unsqueeze(-2) * self.mixed(theta).squeeze(-2)[place]  # [..., blocks, n]
            elif theta.dim() == 1 and self.cut.chunks < self.n:  # less than a copy of U for every index
                u = torch.einsum("...i,cbij->...cbj", g, self.banded(theta))
                u = u.take_along_dim(chunk[..., None, None, None], -3).squeeze(-3)
            else:
                u = torch.einsum("...i,...bij->...bj", g, self.banded(theta)[place])
            return fwht(u).flatten(-2)[..., : self.cols]


def build_fastfood(spec: Spec, shapes: Shapes) -> dict[str, TensorProjection]:
    """Fastfood projections for the tensors named in `shapes`, each of which mixes coordinates of its own.

    Raises:
        ValueError: there are fewer weights than coordinates, so that some would move nothing.
    """
    return _build(spec, shapes, False)


def build_global(spec: Spec, shapes: Shapes) -> dict[str, TensorProjection]:
    """Fastfood projections that cut θ once for the whole model; with n ≥ d, every tensor mixes all of it.

    The paper's (Aghajanyan et al. 2020, section 3.1).

    Raises:
        ValueError: see `build_fastfood`.
    """
    return _build(spec, shapes, True)


@torch.inference_mode(False)
def _build(spec: Spec, shapes: Shapes, whole: bool) -> dict[str, TensorProjection]:
    n = spec.block_size
    share = shares(spec.d, shapes)
    cuts = {name: tiling(shape, share[name][1], n) for name, shape in shapes.items()}
    weights = {name: cuts[name].weights(shape, n) for name, shape in shapes.items()}
    if whole:
        windows = global_windows(spec.d, weights, n)
    else:
        windows = {name: own_windows(share[name], weights[name], n) for name in shapes}
    moved = np.zeros(spec.d)  # weights that each coordinate moves
    for name in shapes:
        for (start, count), weight in zip(windows[name], weights[name], strict=True):
            moved[start : start + count] += weight

    places = min(OFFSETS, max(1, 2**18 // n))
    starts = {name: [int(w % places) for w in words(spec.seed, "window", name, cuts[name].chunks)] for name in shapes}
    height = max(max(starts[name]) + cuts[name].height for name in shapes)
    gaussian = _gaussian(spec.seed, n, height)
    result: dict[str, TensorProjection] = {}
    for name, shape in shapes.items():
        signs, permutation = signs_and_permutations(spec.seed, name, len(windows[name]), n)
        if spec.scale == "isometric":
            scale = np.array([1 / np.sqrt(moved[start : start + count].mean()) for start, count in windows[name]])
        else:
            mixed = np.array(windows[name])[:, 1].reshape(-1, cuts[name].depth).sum(1)  # coordinates in each tile
            scale = spec.unit * shape.natural / np.sqrt(mixed).repeat(cuts[name].depth)
        after = signs[:, 1] * (scale / np.sqrt(n))[:, None]
        (first, count), *more = windows[name]
        stored = shape.cols == 1 and count <= STORED and not more
        used = [(0, count)] if stored else windows[name]
        projection: TensorProjection = FastfoodTensor(
            shape.rows, shape.cols, cuts[name], gaussian, starts[name], used, signs[:, 0], permutation, after
        )
        if stored:
            columns = projection.materialise(torch.eye(count, device="cpu")).squeeze(-1)
            projection = DenseTensor(shape.rows, shape.cols, columns.T, first)
        result[name] = projection
    return result
