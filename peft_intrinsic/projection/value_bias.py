"""Biases of value projections, along the directions that the output projection of their attention layer reads most.

`"value_lora"` has the same biases as weights of rank one, which a LoRA can represent.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from .allocation import allocate
from .base import DeviceCopies, Shape, Shapes, Spec, TensorProjection
from .dense import DenseTensor
from .fastfood import build_fastfood
from .randomness import normals, words

VALUE_SCALE = 200
"""Scale of θ under `fan_in`, for every d: docs/defaults.md has the measurements."""

POWERS = 8
"""Subspace iterations: eight directions of SmolLM2-135M then hold 98% of the squares that the best eight hold."""

SHIFT = 2.0**-10
"""Part of the mean squared singular value that is added to all of them, so that zeros do not leave Q undefined."""


class RankOneTensor(TensorProjection):
    """The offset b aᵀ of a weight, which adds about the bias b, as a·x is about one for each input x.

    Args:
        bias: projection of b.
        direction: a, `float32[cols]`.
    """

    def __init__(self, bias: TensorProjection, direction: torch.Tensor) -> None:
        self.rows, self.cols = bias.rows, len(direction)
        self.bias, self._direction = bias, DeviceCopies(direction)

    def factors(self, theta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the offset as a product, `[d] -> [rows, 1], [1, cols]`. `[batch, d]` adds a batch axis to b."""
        (direction,) = self._direction.on(theta.device)
        return self.bias.materialize(theta), direction[None]

    def slab(self, theta: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        left, right = self.factors(theta)
        return left[..., start:stop, :] * right

    def linear(self, x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        left, right = (factor.to(x.dtype) for factor in self.factors(theta))
        return F.linear(x, right) * left.view(*left.shape[:-2], *[1] * (x.dim() - 2), self.rows)


def find_directions(matrix: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Compute an orthonormal basis of about the leading right singular vectors of a matrix.

    Randomized range finder with subspace iteration (Halko, Martinsson, Tropp 2011, algorithm 4.4). Signs and order of
    singular vectors play no part: the basis depends continuously on the matrix. Its first columns do not depend on the
    later columns of `start`.

    Args:
        matrix: `float64[rows, n]`.
        start: random numbers, `float64[n, k]` with k ≤ n.

    Returns:
        `float64[n, k]` with orthonormal columns.
    """
    mean = np.square(matrix).sum() / matrix.shape[1]
    basis = _orthonormalize(start)
    for _ in range(POWERS if mean else 0):
        basis = _orthonormalize(matrix.T @ (matrix @ basis) / mean + SHIFT * basis)
    return basis


def _orthonormalize(columns: np.ndarray) -> np.ndarray:
    """Return Q of the QR decomposition whose R has a positive diagonal, which is unique."""
    q, r = np.linalg.qr(columns)
    return q * np.copysign(1.0, np.diag(r))


@torch.inference_mode(False)
def build_value_bias(spec: Spec, shapes: Shapes) -> dict[str, TensorProjection]:
    """Build projections of the parameters in `spec.values`, and Fastfood projections of the others (a head).

    Raises:
        ValueError: d exceeds the number of weights, of which a bias has those entries that belong to values; or no bias
            has an effect, because base weights are zero.
    """
    values = {name: spec.values[name] for name in shapes if name in spec.values}
    sizes = {name: Shape(values[name].size, 1, "bias") if name in values else shapes[name] for name in shapes}
    coordinates = allocate(spec.d, sizes)
    used = np.zeros(spec.d)  # with fewer coordinates than biases, adjacent ones share a coordinate
    for first, count in (coordinates[name] for name in values):
        used[first : first + count] += 1
    rest = {name: shape for name, shape in shapes.items() if name not in values}
    others = build_fastfood(spec, rest, coordinates) if rest else {}
    result: dict[str, TensorProjection] = {}
    zero = []
    for name, shape in shapes.items():
        if name not in values:
            result[name] = others[name]
            continue
        (first, count), value = coordinates[name], values[name]
        matrix = value.read_map()
        size, constant = value.measure() if value.folded or spec.scale == "fan_in" else (1.0, None)
        zero += [] if matrix.any() and size else [name]
        bias = f"{name.removesuffix('.weight')}.bias" if value.folded else name  # equal θ, equal biases
        start = normals(words(spec.seed, "frame", bias, count * value.size)).reshape(count, value.size).T
        directions = find_directions(matrix, start)
        if spec.scale == "isometric":
            directions = directions / np.sqrt(used[first : first + count])
        else:
            directions = directions * (VALUE_SCALE * size * math.sqrt(value.size / count))
        cols = 1 if constant is not None else shape.cols
        rows = np.zeros((shape.rows * cols, count), np.float32)
        rows[value.first : value.first + value.size] = spec.factor * directions
        result[name] = DenseTensor(shape.rows, cols, torch.from_numpy(rows), first)
        if constant is not None:
            if spec.scale == "isometric":
                constant = constant / np.linalg.norm(constant)
            result[name] = RankOneTensor(result[name], torch.from_numpy(constant.astype(np.float32)))
    if zero and len(zero) == len(values):
        raise ValueError(
            f"θ has no effect: the weights of values or outputs of all attention layers are zero ({', '.join(zero)}). "
            "Load a base model with pretrained weights, or use projection='fastfood'."
        )
    return result
