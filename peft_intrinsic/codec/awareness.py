"""Quantization-aware training: θ is rounded to a few values, which are trained with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..tuner.layer import attached
from ..tuner.vector import Vector
from .quantize import check_levels, fit_codebook, quantize


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
    name = attached(model, adapter)
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
