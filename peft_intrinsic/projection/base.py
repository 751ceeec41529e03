"""What every projection offers for one targeted tensor, seen as a matrix `[rows, cols]`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

Scale = Literal["fan_in", "isometric"]
Kind = Literal["matrix", "embedding", "norm", "bias", "head"]

UNIT = 2**9
"""What θ is counted in under `fan_in`, divided by the fourth root of d, so that one rate serves every d."""

FACTORS: dict[str, int] = {"matrix": 1, "embedding": 1, "norm": 8, "bias": 8, "head": 8}
"""How much further than its natural size a tensor of each kind moves. UNIT, FACTORS and PARTS: docs/defaults.md."""

PARTS: dict[str, int] = {"matrix": 1, "embedding": 1, "norm": 1, "bias": 1, "head": 16}
"""How many parts of θ a tensor of each kind gets."""


class Shape(NamedTuple):
    """A targeted tensor as a matrix, and its kind. A bias or norm is a column: `cols` is 1.

    `transposed`: the matrix is the tensor's transpose (Conv1D of GPT-2).
    """

    rows: int
    cols: int
    kind: Kind = "matrix"
    transposed: bool = False

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.rows * self.cols

    @property
    def natural(self) -> float:
        """c: the size of an entry, `factor / √fan-in`. A bias or norm counts its own length as the fan-in."""
        return FACTORS[self.kind] / math.sqrt(self.rows if self.kind in ("norm", "bias") else self.cols)


Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Spec:
    """What fixes a projection besides the tensors that it covers.

    Args:
        d: number of coordinates of θ.
        seed: of the random stream.
        block_size: order n of the Fastfood blocks, a power of two.
        scale: `"fan_in"` or `"isometric"` (see the README beside this file).
        factor: of all of P: the unit of λ.
        subspace: file with the directions of a learnt P.
    """

    d: int
    seed: int
    block_size: int
    scale: Scale
    factor: int = 1
    subspace: str | None = None

    @property
    def unit(self) -> float:
        """What every row of P is multiplied by under `fan_in`."""
        return UNIT * self.factor / math.sqrt(math.sqrt(self.d))


def samples(theta: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What precedes `index` when each sample has its own θ: the number of the sample, shaped to broadcast."""
    if theta.dim() == 1:
        return ()
    return (torch.arange(len(theta), device=index.device).view(-1, *[1] * (index.dim() - 1)),)


class TensorProjection(ABC):
    """The rows of P that belong to one tensor. Immutable, shared by copies of a model, nothing of it is saved.

    θ is one vector `[d]`, or one for each sample of a batch, `[batch, d]`.
    """

    rows: int
    cols: int

    @abstractmethod
    def slab(self, theta: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of the offset: `[d] -> [stop − start, cols]`; with `[batch, d]`, batch first."""

    def materialise(self, theta: torch.Tensor) -> torch.Tensor:
        """The offset itself: `[d] -> [rows, cols]`, or `[batch, d] -> [batch, rows, cols]`."""
        return self.slab(theta, 0, self.rows)

    def linear(self, x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        """x times the transposed offset: `[..., cols], [d] -> [..., rows]`. With `[batch, d]`, x is batch first."""
        return torch.einsum(
            "b...c,brc->b...r" if theta.dim() > 1 else "...c,rc->...r", x, self.materialise(theta).to(x)
        )

    def gather(self, index: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        """Rows of the offset: `int[...], [d] -> [..., cols]`. With `[batch, d]`, the index is batch first."""
        place = (*samples(theta, index), index)
        return self.materialise(theta)[place]

    def __deepcopy__(self, memo: dict) -> TensorProjection:
        return self
