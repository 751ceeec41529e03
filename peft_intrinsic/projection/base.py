"""The interface of all projections. Each adapted parameter is a matrix `[rows, cols]`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch

Scale = Literal["fan_in", "isometric"]
Kind = Literal["matrix", "embedding", "norm", "bias", "head"]

THETA_SCALE = 2**9
"""Scale of θ under `fan_in`. Divided by the fourth root of d, it makes one learning rate work for every d."""

FACTORS: dict[str, int] = {"matrix": 1, "embedding": 1, "norm": 8, "bias": 8, "head": 8}
"""Size of offsets relative to 1/√fan-in, by kind. benchmarks/results/README.md compares THETA_SCALE, FACTORS, PARTS."""

PARTS: dict[str, int] = {"matrix": 1, "embedding": 1, "norm": 1, "bias": 1, "head": 16}
"""Parts of θ that a tensor gets, by kind."""


class Shape(NamedTuple):
    """Matrix view of an adapted parameter.

    Args:
        rows, cols: shape of the matrix. A bias or norm is a column: `cols` is 1.
        kind: role of the parameter, which sets its scale and its allocation of θ.
        transposed: the parameter stores the transpose, as `Conv1D` of GPT-2 does.
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
    def entry_scale(self) -> float:
        """f · c: scale of an entry of the offset, `factor / √fan-in`. The fan-in of a bias or norm is its length."""
        return FACTORS[self.kind] / math.sqrt(self.rows if self.kind in ("norm", "bias") else self.cols)


Shapes = Mapping[str, Shape]


class ValueBias(NamedTuple):
    """What `"value_bias"` and `"value_lora"` need to know of one value projection.

    Args:
        first: first entry of the bias that belongs to values, where a layer computes queries and keys too.
        size: number of these entries, n_v.
        folded: whether they are adapted as a weight of rank one, for `"value_lora"`.
        read_map: returns the map from these entries to the output of the attention layer, `float64[hidden, n_v]`.
        measure: returns the root mean square of the base model's values for random tokens, and if folded a vector
            `float64[cols]` whose product with each input of the layer is about one.
    """

    first: int
    size: int
    folded: bool
    read_map: Callable[[], np.ndarray]
    measure: Callable[[], tuple[float, np.ndarray | None]]


@dataclass(frozen=True)
class Spec:
    """Everything that determines a projection, except the tensors.

    Args:
        d: length of θ.
        seed: seed of the random numbers.
        block_size: order n of the Fastfood blocks, a power of two.
        scale: `"fan_in"` or `"isometric"`, defined in this folder's README.md.
        factor: factor of P that makes up for a stored λ that is smaller by it.
        subspace: path of the file with the directions of `"trajectory"`.
        values: the adapted parameters of value projections, by name, for `"value_bias"` and `"value_lora"`.
    """

    d: int
    seed: int
    block_size: int
    scale: Scale
    factor: int = 1
    subspace: str | None = None
    values: Mapping[str, ValueBias] = field(default_factory=dict)

    @property
    def theta_scale(self) -> float:
        """Factor of every row of P under `fan_in`."""
        return THETA_SCALE * self.factor / math.sqrt(math.sqrt(self.d))


def index_samples(theta: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Index of the batch axis that precedes `index` if each sample has its own θ, shaped to broadcast; else empty."""
    if theta.dim() == 1:
        return ()
    return (torch.arange(len(theta), device=index.device).view(-1, *[1] * (index.dim() - 1)),)


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Return a context without autocast. Where autocast is off, it is empty: entering one costs more than a product."""
    kind = device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if enabled else nullcontext()


class DeviceCopies:
    """Tensors with a copy on each device where they are used."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.copies = {tensors[0].device: tensors}

    def __reduce__(self) -> tuple[type[DeviceCopies], tuple[torch.Tensor, ...]]:
        return DeviceCopies, next(iter(self.copies.values()))  # torch.load may put them on another device

    def on(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Return the tensors on `device`."""
        if device not in self.copies:
            with torch.inference_mode(False):
                self.copies[device] = tuple(tensor.to(device) for tensor in next(iter(self.copies.values())))
        return self.copies[device]


class TensorProjection(ABC):
    """The rows of P that belong to one parameter. Immutable, shared by copies of a model, never saved.

    A subclass implements `slab` and may override `linear` and `gather` with faster ones. θ is one vector `[d]`, or one
    for each sample of a batch, `[batch, d]`. Offsets are float32 for θ of any dtype.
    """

    rows: int
    cols: int

    @abstractmethod
    def slab(self, theta: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Compute rows `start` to `stop` of the offset: `[d] -> [rows, cols]`. `[batch, d]` adds a batch axis."""

    def materialize(self, theta: torch.Tensor) -> torch.Tensor:
        """Compute the whole offset: `[d] -> [rows, cols]`, or `[batch, d] -> [batch, rows, cols]`."""
        return self.slab(theta, 0, self.rows)

    def linear(self, x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        """Multiply by the transposed offset: `[..., cols], [d] -> [..., rows]`. With `[batch, d]`, x is batch first."""
        return torch.einsum(
            "b...c,brc->b...r" if theta.dim() > 1 else "...c,rc->...r", x, self.materialize(theta).to(x)
        )

    def gather(self, index: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        """Compute rows of the offset: `int[...], [d] -> [..., cols]`. With `[batch, d]`, the index is batch first."""
        rows = (*index_samples(theta, index), index)
        return self.materialize(theta)[rows]

    def __deepcopy__(self, memo: dict) -> TensorProjection:
        return self
