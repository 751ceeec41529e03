"""An explicit Gaussian P, for small models and as a reference."""

from __future__ import annotations

import math

import torch

from .base import Shapes, Spec, TensorProjection
from .randomness import normal_rows

LIMIT = 2**28
"""Entries that P may have in all: 1 GiB."""


class DenseTensor(TensorProjection):
    """The rows of P of one tensor, stored.

    Args:
        rows, cols: of the tensor.
        matrix: `float32[rows · cols, count]`.
        first: the first of the `count` coordinates of θ that it mixes.
    """

    def __init__(self, rows: int, cols: int, matrix: torch.Tensor, first: int = 0) -> None:
        self.rows, self.cols = rows, cols
        self._window = slice(first, first + matrix.shape[1])
        self._state = {matrix.device: matrix}

    def slab(self, theta: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        if theta.device not in self._state:
            with torch.inference_mode(False):
                self._state[theta.device] = next(iter(self._state.values())).to(theta.device)
        with torch.autocast(theta.device.type, enabled=False):
            rows = self._state[theta.device][start * self.cols : stop * self.cols]
            theta = theta[..., self._window].float()
            flat = rows @ theta if theta.dim() == 1 else theta @ rows.T  # the former is faster backwards
            return flat.unflatten(-1, (stop - start, self.cols))


@torch.inference_mode(False)
def build_dense(spec: Spec, shapes: Shapes) -> dict[str, TensorProjection]:
    """Dense Gaussian projections (Li et al. 2018, section 2) for the tensors named in `shapes`.

    Raises:
        ValueError: P would have more than `LIMIT` entries.
    """
    total = sum(shape.size for shape in shapes.values())
    if total * spec.d > LIMIT:
        raise ValueError(
            f"projection='dense' would store {total} x {spec.d} numbers, more than {LIMIT}. Use projection='fastfood'."
        )
    result: dict[str, TensorProjection] = {}
    for name, shape in shapes.items():
        scale = 1 / math.sqrt(total) if spec.scale == "isometric" else spec.unit * shape.natural / math.sqrt(spec.d)
        matrix = torch.from_numpy(normal_rows(spec.seed, "dense", name, shape.size, spec.d))
        result[name] = DenseTensor(shape.rows, shape.cols, matrix * scale)
    return result
