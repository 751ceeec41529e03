"""Quantizes θ to a few values by optimal k-means in one dimension, and trains it quantized."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import kmeans1d
import numpy as np
import torch
from torch import nn

from ..tuner.layer import find_adapter
from ..tuner.vector import Vector
from .wire import from_halves, to_halves

MAX_LEVELS = 256
"""Maximum number of values of θ in a packed adapter."""


def check_levels(levels: int) -> int:
    """Return `levels`, or raise ValueError if θ cannot have so many values."""
    if not isinstance(levels, (int, np.integer)) or not 1 <= levels <= MAX_LEVELS:
        raise ValueError(f"levels must be an integer from 1 to {MAX_LEVELS}, got {levels!r}.")
    return levels


def fit_codebook(theta: np.ndarray, levels: int) -> np.ndarray:
    """Find the values with the least squared error of θ, by exact one-dimensional k-means.

    Args:
        theta: `float[N]`.
        levels: maximum number of values, 1 to `MAX_LEVELS`.

    Returns:
        Increasing `float32[L]`, unchanged by `to_halves`.

    Raises:
        ValueError: `levels` is out of range.
    """
    distinct = np.unique(theta.astype(np.float64))
    if len(distinct) > check_levels(levels):
        distinct = np.unique(kmeans1d.cluster(theta.astype(np.float64), levels).centroids)
    return np.unique(from_halves(*to_halves(distinct)) + np.float32(0))  # one zero, not two


def find_nearest(theta: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Find the index of the nearest of increasing values: `float[N], float[L] -> int32[N]`."""
    middles = (values[1:].astype(np.float64) + values[:-1]) / 2
    return np.searchsorted(middles, theta.astype(np.float64)).astype(np.int32)


def quantize(theta: np.ndarray, levels: int) -> np.ndarray:
    """Round `float[N]` to at most `levels` values: `float32[N]`."""
    values = fit_codebook(theta, levels)
    return values[find_nearest(theta, values)]


class QuantizedVector(Vector):
    """θ rounded to the nearest values of a codebook, which is trained with it.

    The gradient passes straight through the rounding to θ, and each value of the codebook gets the sum over its entries
    of θ (Lotfi et al. 2022, arXiv 2211.13609). `weight` is the unrounded θ, so saving writes a usual adapter.
    """

    def __init__(self, theta: torch.Tensor, levels: int) -> None:
        super().__init__(theta)
        values = fit_codebook(theta.detach().cpu().float().numpy(), levels)
        self.codebook = nn.Parameter(torch.from_numpy(values).to(theta))

    def forward(self) -> torch.Tensor:
        values = self.codebook.sort().values
        index = torch.bucketize(self.weight.detach(), (values[1:] + values[:-1]).detach() / 2)
        return values[index] + (self.weight - self.weight.detach())  # adds exactly 0


@contextmanager
def quantization_aware(model: Any, levels: int, adapter: str | None = None) -> Iterator[None]:
    """Context in which θ is rounded to `levels` values, and trained with them. Afterwards θ has only these values.

    Train the adapter without it first, then for a few more steps inside, with a new optimizer or Trainer, which also
    trains the codebook, at a tenth of the learning rate.

    Args:
        model: `PeftModel` with an intrinsic adapter.
        levels: number of values of θ, 1 to 256.
        adapter: name of the adapter; by default the active one.

    Raises:
        ValueError: `levels` is out of range, or the adapter is not attached.

    Example:
        >>> with quantization_aware(model, levels=4):
        ...     Trainer(model=model, …).train()
        >>> data = compress(model, levels=4)  # no further loss
    """
    vectors = model.base_model.vector.intrinsic_theta
    name = find_adapter(model, adapter)
    vector = vectors[name]
    vectors[name] = QuantizedVector(vector.weight.detach().clone(), check_levels(levels))
    vectors[name].train(vector.training).weight.requires_grad_(vector.weight.requires_grad)
    try:
        yield
    finally:
        with torch.no_grad():
            values = quantize(vectors[name]().cpu().float().numpy(), levels)
            vector.weight.copy_(torch.from_numpy(values))
        vectors[name] = vector
