"""Fine-tuning of θ as it will be packed: rounded to a few values that are trained along."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..tuner.layer import attached
from ..tuner.vector import Vector
from .quantize import check_levels, codebook, rounded


class RoundedVector(Vector):
    """θ rounded to the nearest value of a codebook; both are trained.

    The gradient passes straight through the rounding to θ, and each value gets the sum of its members' (Lotfi et al.
    2022, arXiv 2211.13609). `weight` stays θ itself, so that what is saved meanwhile is a usual adapter.
    """

    def __init__(self, theta: torch.Tensor, levels: int) -> None:
        super().__init__(theta)
        values = codebook(theta.detach().cpu().float().numpy(), levels)
        self.codebook = nn.Parameter(torch.from_numpy(values).to(theta))

    def forward(self) -> torch.Tensor:
        values = self.codebook.sort().values
        index = torch.bucketize(self.weight.detach(), (values[1:] + values[:-1]).detach() / 2)
        return values[index] + (self.weight - self.weight.detach())  # adds nothing, to the bit


@contextmanager
def quantization_aware(model: Any, levels: int, adapter: str | None = None) -> Iterator[None]:
    """Within this context θ counts as rounded to `levels` values; after it θ holds just these, ready for `compress`.

    Train an adapter as usual first; then a few more steps inside, with a new optimizer or Trainer, which takes up the
    codebook too.

    Args:
        model: a `PeftModel` with an intrinsic adapter.
        levels: 1 to 256.
        adapter: its name, by default the active one.

    Example:
        >>> with quantization_aware(model, levels=4):
        ...     Trainer(model=model, …).train()
        >>> data = compress(model, levels=4)
    """
    vectors = model.base_model.vector.intrinsic_theta
    name = attached(model, adapter)
    vector = vectors[name]
    vectors[name] = RoundedVector(vector.weight.detach().clone(), check_levels(levels))
    vectors[name].train(vector.training).weight.requires_grad_(vector.weight.requires_grad)
    try:
        yield
    finally:
        with torch.no_grad():
            found = rounded(vectors[name]().cpu().float().numpy(), levels)
            vector.weight.copy_(torch.from_numpy(found))
        vectors[name] = vector
