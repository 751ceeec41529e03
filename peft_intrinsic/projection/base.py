"""What every projection offers for one targeted tensor, seen as a matrix `[rows, cols]`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

Scale = Literal["fan_in", "isometric"]
Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Spec:
    """What fixes a projection besides the tensors that it covers.

    Args:
        d: number of coordinates of θ.
        seed: of the random stream.
        block_size: order n of the Fastfood blocks, a power of two.
        scale: `"fan_in"` or `"isometric"` (see the README beside this file).
    """

    d: int
    seed: int
    block_size: int
    scale: Scale


def natural_size(rows: int, cols: int) -> float:
    """c of a tensor: 1/√fan-in. A vector (`cols == 1`) counts its own length as the fan-in."""
    return 1 / math.sqrt(cols if cols > 1 else rows)


class TensorProjection(ABC):
    """The rows of P that belong to one tensor. Immutable, shared by copies of a model, nothing of it is saved."""

    rows: int
    cols: int

    @abstractmethod
    def materialise(self, theta: torch.Tensor) -> torch.Tensor:
        """The offset itself: `[d] -> [rows, cols]`."""

    def linear(self, x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        """x times the transposed offset: `[..., cols], [d] -> [..., rows]`."""
        return torch.nn.functional.linear(x, self.materialise(theta).to(x.dtype))

    def gather(self, index: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        """Rows of the offset: `int[...], [d] -> [..., cols]`."""
        return torch.nn.functional.embedding(index, self.materialise(theta))

    def __deepcopy__(self, memo: dict) -> TensorProjection:
        return self
