"""A stored Gaussian P, for small models and as a reference."""

from __future__ import annotations

import math

import torch

from .base import DeviceCopies, Shapes, Spec, TensorProjection, full_precision
from .randomness import normal_rows

LIMIT = 2**28
"""Maximum number of entries of P: 1 GiB."""


class DenseTensor(TensorProjection):
    """The rows of P of one parameter, stored.

    Args:
        rows, cols: shape of the parameter's matrix view.
        matrix: rows of P, `float32[rows · cols, count]`.
        first: first of the `count` coordinates of θ that they mix.
    """

    def __init__(self, rows: int, cols: int, matrix: torch.Tensor, first: int = 0) -> None:
        self.rows, self.cols = rows, cols
        self._slice = slice(first, first + matrix.shape[1])
        self._state = DeviceCopies(matrix)

    def slab(self, theta: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        (matrix,) = self._state.on(theta.device)
        with full_precision(theta.device):
            rows = matrix[start * self.cols : stop * self.cols]
            theta = theta[..., self._slice].float()
            flat = rows @ theta if theta.dim() == 1 else theta @ rows.T  # the former has the faster backward pass
            return flat.unflatten(-1, (stop - start, self.cols))


@torch.inference_mode(False)
def build_dense(spec: Spec, shapes: Shapes) -> dict[str, TensorProjection]:
    """Build a Gaussian projection for each parameter in `shapes` (Li et al. 2018, section 2).

    Raises:
        ValueError: P would have more than `LIMIT` entries.
    """
    total = sum(shape.size for shape in shapes.values())
    if total * spec.d > LIMIT:
        raise ValueError(
            f"projection='dense' would store {total} x {spec.d} entries, more than {LIMIT}. Use projection='fastfood'."
        )
    result: dict[str, TensorProjection] = {}
    for name, shape in shapes.items():
        fan_in, isometric = spec.theta_scale * shape.entry_scale / math.sqrt(spec.d), 1 / math.sqrt(total)
        matrix = torch.from_numpy(normal_rows(spec.seed, "dense", name, shape.size, spec.d))
        result[name] = DenseTensor(shape.rows, shape.cols, matrix * (fan_in if spec.scale == "fan_in" else isometric))
    return result
