"""Fastfood as a low-rank product, tile by tile: ΔW = G · A(θ)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from weakref import WeakValueDictionary

import numpy as np
import torch
import torch.nn.functional as F

from .allocation import Slice, Tiling, allocate, make_tiling, slice_model, slice_tensor
from .base import DeviceCopies, Shapes, Spec, TensorProjection, full_precision, index_samples
from .dense import DenseTensor
from .hadamard import fwht, hadamard
from .randomness import normal_rows, signs_and_permutations, words

BLOCK_SIZE = 64

OFFSETS = 4096
"""Number of rows of G at which a chunk may start. It is smaller for large blocks: at most 2^18 entries of G."""

STORED = 16
"""Most coordinates of a norm or bias whose rows of P are stored: one small product replaces ten operations."""


_ALIVE: WeakValueDictionary[tuple[int, int, int], DeviceCopies] = WeakValueDictionary()
"""G of the existing adapters, by (seed, n, rows)."""


def _share_gaussian(seed: int, n: int, rows: int) -> DeviceCopies:
    """Return G, `float32[rows, n]`, for all tensors of the adapters with this seed."""
    if (gaussian := _ALIVE.get((seed, n, rows))) is None:
        gaussian = DeviceCopies(torch.from_numpy(normal_rows(seed, "gaussian", "", rows, n)))
    return _ALIVE.setdefault((seed, n, rows), gaussian)


class FastfoodTensor(TensorProjection):
    """The tiles of one parameter: row chunk r, column block b, and in each tile the slots 0 to depth − 1.

    Args:
        rows, cols: shape of the parameter's matrix view.
        tiling: its tiles and slots.
        gaussian: G, shared by all tensors.
        starts: first row of G of every chunk.
        slices: slice of θ of every slot.
        before: B, `int8[slots, n]`.
        permutation: Π, `int64[slots, n]`.
        after: B' times the slot's scale, `float32[slots, n]`.
    """

    def __init__(
        self,
        rows: int,
        cols: int,
        tiling: Tiling,
        gaussian: DeviceCopies,
        starts: Sequence[int],
        slices: Sequence[Slice],
        before: np.ndarray,
        permutation: np.ndarray,
        after: np.ndarray,
    ) -> None:
        self.rows, self.cols, self.tiling, self.gaussian, self.starts = rows, cols, tiling, gaussian, starts
        self.n = before.shape[1]
        first, counts = np.array(slices).T
        column = np.arange(counts.max())
        inside = column < counts[:, None]
        # Beyond the end of a slice B is zero, so any coordinate will do.
        index = first[:, None] + np.where(inside, column, 0)
        before = np.where(inside, before[:, : len(column)], 0).astype(np.float32)
        self._only = slice(*(index[0, [0, -1]] + [0, 1]).tolist()) if len(set(slices)) == 1 else None
        state = (index, before, permutation, after.astype(np.float32), np.array(starts))
        self._state = DeviceCopies(*map(torch.from_numpy, state))

    def mix(self, theta: torch.Tensor) -> torch.Tensor:
        """Compute u = scale · B' Π (1/√n) H B θ of every slot: `[..., d] -> [..., chunks, blocks, depth, n]`."""
        index, before, permutation, after, _ = self._state.on(theta.device)
        with full_precision(theta.device):
            theta = theta.float()
            theta = theta[..., index] if self._only is None else theta[..., self._only].unsqueeze(-2)
            u = fwht(theta * before, self.n)  # [..., slots, n]
            u = u.gather(-1, permutation.expand_as(u)) * after
        return u.unflatten(-2, (self.tiling.chunks, self.tiling.blocks, self.tiling.depth))

    def band(self, theta: torch.Tensor) -> torch.Tensor:
        """Compute U of every tile, slot j on its j-th cyclic diagonal: `[..., d] -> [..., chunks, blocks, n, n]`."""
        u = self.mix(theta).mT  # [..., n, depth]
        row, slot = torch.arange(self.n, device=u.device), torch.arange(self.tiling.depth, device=u.device)
        column = ((row[:, None] + slot) % self.n).expand_as(u)
        return u.new_zeros(*u.shape[:-1], self.n).scatter(-1, column, u)

    def factor(self, theta: torch.Tensor) -> torch.Tensor:
        """Compute A(θ) = U H, the low-rank factor of every row chunk: `[..., d] -> [..., chunks, n, cols]`."""
        if self.tiling.depth == 1:
            u = self.mix(theta).squeeze(-2)
            h = hadamard(self.n, min(self.n, self.cols), u)  # [n, ≤ n]
            a = u.transpose(-1, -2).unsqueeze(-1) * h.unsqueeze(1)  # [..., chunks, n, blocks, ≤ n]
        else:
            u = self.band(theta)
            a = (u @ hadamard(self.n, min(self.n, self.cols), u)).transpose(-3, -2)
        return a.flatten(-2)[..., : self.cols]

    def basis(self, theta: torch.Tensor, chunk: int) -> torch.Tensor:
        """Return the rows of G that a row chunk uses: `[height, n]`."""
        start, height = self.starts[chunk], self.tiling.height
        return self.gaussian.on(theta.device)[0][start : start + min(height, self.rows - chunk * height)]

    def factors(self, theta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the offset as a product, `[d] -> [rows, k], [k, cols]` with k = chunks · n."""
        left = torch.block_diag(*(self.basis(theta, r) for r in range(self.tiling.chunks)))
        return left, self.factor(theta).flatten(0, 1)

    def slab(self, theta: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        height = self.tiling.height
        with full_precision(theta.device):
            a = self.factor(theta)
            parts = []
            for r in range(start // height, -(-stop // height)):
                rows = self.basis(theta, r)[max(start - r * height, 0) : stop - r * height]
                parts.append(rows @ a[..., r, :, :])
            return torch.cat(parts, -2)

    def linear(self, x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        if theta.dim() > 1:  # sums with the signs of H cancel, which half precision rounds too much
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            z = self._multiply_samples(x, theta)
        else:
            z = [F.linear(x, a) for a in self.factor(theta).to(x.dtype)]
        return torch.cat([F.linear(part, self.basis(theta, r).to(x.dtype)) for r, part in enumerate(z)], -1)

    def _multiply_samples(self, x: torch.Tensor, theta: torch.Tensor) -> list[torch.Tensor]:
        """Compute x A(θ)ᵀ of every row chunk, `[batch, ..., n]`, each sample with its own θ, without any A(θ).

        A is U times H, and only U depends on θ, so all samples use the same x H.
        """
        h = F.pad(x, (0, self.tiling.blocks * self.n - self.cols)).reshape(len(x), -1, self.tiling.blocks, self.n)
        h = fwht(h)  # [batch, tokens, blocks, n]
        if self.tiling.depth == 1:
            u = self.mix(theta).to(x.dtype).squeeze(-2)  # [batch, chunks, blocks, n]
            z = [(h * u[:, r, None]).sum(-2) for r in range(self.tiling.chunks)]
        else:
            u = self.band(theta).to(x.dtype)  # [batch, chunks, blocks, n, n]
            z = [torch.einsum("stbi,sboi->sto", h, u[:, r]) for r in range(self.tiling.chunks)]
        return [part.view(*x.shape[:-1], self.n) for part in z]

    def gather(self, index: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        *_, starts = self._state.on(theta.device)
        chunk = index // self.tiling.height
        with full_precision(theta.device):
            g = F.embedding(index % self.tiling.height + starts[chunk], self.gaussian.on(theta.device)[0])
            of_chunk = (*index_samples(theta, index), chunk)
            if self.tiling.depth == 1:
                u = g.unsqueeze(-2) * self.mix(theta).squeeze(-2)[of_chunk]  # [..., blocks, n]
            elif theta.dim() == 1 and self.tiling.chunks < self.n:  # smaller than a copy of U for every index
                u = torch.einsum("...i,cbij->...cbj", g, self.band(theta))
                u = u.take_along_dim(chunk[..., None, None, None], -3).squeeze(-3)
            else:
                u = torch.einsum("...i,...bij->...bj", g, self.band(theta)[of_chunk])
            return fwht(u).flatten(-2)[..., : self.cols]


def build_fastfood(
    spec: Spec, shapes: Shapes, coordinates: Mapping[str, Slice] | None = None
) -> dict[str, TensorProjection]:
    """Build a Fastfood projection for each parameter in `shapes`, each with its own coordinates of θ.

    Args:
        spec: of the projection.
        shapes: matrix views of the parameters.
        coordinates: those of each parameter, where other parameters have a part of θ too.

    Raises:
        ValueError: d exceeds the number of weights.
    """
    return _build(spec, shapes, coordinates or allocate(spec.d, shapes), False)


def build_global(spec: Spec, shapes: Shapes) -> dict[str, TensorProjection]:
    """Build Fastfood projections that cut θ once for the whole model (Aghajanyan et al. 2020, section 3.1).

    With n ≥ d, every parameter mixes all of θ.

    Raises:
        ValueError: d exceeds the number of weights.
    """
    return _build(spec, shapes, allocate(spec.d, shapes), True)


@torch.inference_mode(False)
def _build(spec: Spec, shapes: Shapes, coordinates: Mapping[str, Slice], whole: bool) -> dict[str, TensorProjection]:
    n = spec.block_size
    tilings = {name: make_tiling(shape, coordinates[name][1], n) for name, shape in shapes.items()}
    weights = {name: tilings[name].weights(shape, n) for name, shape in shapes.items()}
    if whole:
        slices = slice_model(spec.d, weights, n)
    else:
        slices = {name: slice_tensor(coordinates[name], weights[name], n) for name in shapes}
    affected = np.zeros(spec.d)  # weights that each coordinate affects
    for name in shapes:
        for (start, count), weight in zip(slices[name], weights[name], strict=True):
            affected[start : start + count] += weight

    offsets = min(OFFSETS, max(1, 2**18 // n))
    streams = {name: words(spec.seed, "window", name, tilings[name].chunks) for name in shapes}
    starts = {name: [int(word % offsets) for word in stream] for name, stream in streams.items()}
    gaussian = _share_gaussian(spec.seed, n, max(max(starts[name]) + tilings[name].height for name in shapes))
    result: dict[str, TensorProjection] = {}
    for name, shape in shapes.items():
        signs, permutation = signs_and_permutations(spec.seed, name, len(slices[name]), n)
        if spec.scale == "isometric":
            scale = np.array([1 / np.sqrt(affected[start : start + count].mean()) for start, count in slices[name]])
        else:
            mixed = np.array(slices[name])[:, 1].reshape(-1, tilings[name].depth).sum(1)  # coordinates in each tile
            scale = spec.theta_scale * shape.entry_scale / np.sqrt(mixed).repeat(tilings[name].depth)
        after = signs[:, 1] * (scale / np.sqrt(n))[:, None]
        (first, count), *more = slices[name]
        stored = shape.cols == 1 and count <= STORED and not more
        used = [(0, count)] if stored else slices[name]
        projection: TensorProjection = FastfoodTensor(
            shape.rows, shape.cols, tilings[name], gaussian, starts[name], used, signs[:, 0], permutation, after
        )
        if stored:
            columns = projection.materialize(torch.eye(count, device="cpu")).squeeze(-1)
            projection = DenseTensor(shape.rows, shape.cols, columns.T, first)
        result[name] = projection
    return result
