"""Sketches: a few floats that show whether values that are computed from a base model are the same again."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ..projection import TensorProjection
from ..projection.randomness import normals, words
from .checks import SKETCH_SIZE
from .config import IntrinsicConfig


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


def check_sketch(config: IntrinsicConfig, name: str, here: list[float], limits: tuple[float, float], what: str) -> None:
    """Compare the sketch of a saved adapter with that of this base model.

    Args:
        config: of the adapter.
        name: of the option with the stored sketch.
        here: the sketch of this base model.
        limits: relative differences above which this warns, and above which it raises an error.
        what: what follows from the base model, for messages.

    Raises:
        ValueError: what follows is zero or not finite, the adapter has no sketch, or the base model is another one.
    """
    if not all(map(math.isfinite, here)) or not any(here):
        raise ValueError(f"{what} of this base model are zero or not finite. Check the weights of the base model.")
    if not config.is_saved:
        return
    stored = getattr(config, name)
    if stored is None:
        raise ValueError(f"The adapter's configuration lacks {name}, so it is damaged. Save the adapter again.")
    change = difference(stored, here)
    if not change <= limits[1]:
        raise ValueError(
            f"{what} of this base model differ from those in training (relative difference {change:.2g}): it has other "
            "weights, or another tokenizer. Load the base model that the adapter was trained on."
        )
    if change > limits[0]:
        warnings.warn(
            f"{what} of this base model differ from those in training (relative difference {change:.2g}), as where it "
            "is quantized, has another dtype or was trained further. Load it as it was in training.",
            stacklevel=2,
        )


def _draw(n: int) -> np.ndarray:
    return normals(words(0, "sketch", str(n), SKETCH_SIZE * n)).reshape(-1, n)


def _round(values: np.ndarray) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
