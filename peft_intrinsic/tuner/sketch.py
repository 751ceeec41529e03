"""Sketches: a few floats that show whether values that are computed from a base model are the same again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ..projection import TensorProjection
from ..projection.randomness import normals, words
from .checks import SKETCH_SIZE


def compute_sketch(rows: torch.Tensor) -> list[float]:
    """Compute fixed random combinations of a matrix's entries, which differ by about as much as matrices do."""
    values = rows.detach().double().cpu().numpy()
    left, right = (_draw(n) for n in values.shape)
    return _round(((left @ values) * right).sum(1))


def sketch_projections(projections: Iterable[TensorProjection], d: int) -> list[float]:
    """Compute fixed random combinations of the offsets of random θ: of the entries of P."""
    theta = torch.from_numpy(_draw(d))
    offsets = torch.cat([projection.materialize(theta).flatten(1) for projection in projections], 1).double().numpy()
    return _round((offsets * _draw(offsets.shape[1])).sum(1))


def difference(stored: Sequence[float], here: Sequence[float]) -> float:
    """Relative difference of two sketches."""
    return float(np.linalg.norm(np.subtract(stored, here))) / (float(np.linalg.norm(stored)) or math.nan)


def _draw(n: int) -> np.ndarray:
    return normals(words(0, "sketch", str(n), SKETCH_SIZE * n)).reshape(-1, n)


def _round(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
