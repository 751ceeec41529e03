"""The Walsh–Hadamard transform as a few small matrix products."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

_FACTOR = 128  # order up to which one product is cheaper than splitting


@cache
def _sylvester(n: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    matrix = np.ones((1, 1), dtype=np.float32)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    with torch.inference_mode(False):  # or the cached tensor could never take part in a backward pass
        return torch.from_numpy(matrix).to(device, dtype)


def hadamard(n: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """The first `width` columns of H (order n, Sylvester's, entries ±1), placed and typed as `like`: `[n, width]`.

    They repeat with the next power of two above `width`, so a narrow tensor never costs an n × n matrix.
    """
    period = 1 << (width - 1).bit_length()
    return _sylvester(period, like.device, like.dtype)[:, :width].repeat(n // period, 1)


def fwht(x: torch.Tensor) -> torch.Tensor:
    """H x along the last axis, unnormalised: `[..., n] -> [..., n]`, n a power of two.

    H of order a·b is the Kronecker product of those of order a and b, so one product per factor replaces log2 n passes.
    """
    n = x.shape[-1]
    if n <= _FACTOR:
        return x @ _sylvester(n, x.device, x.dtype)
    x = x.unflatten(-1, (n // _FACTOR, _FACTOR)) @ _sylvester(_FACTOR, x.device, x.dtype)
    return fwht(x.transpose(-1, -2)).transpose(-1, -2).flatten(-2)
