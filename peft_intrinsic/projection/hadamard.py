"""The Walsh–Hadamard transform as a few small matrix products."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

_FACTOR = 128  # largest order at which one product is cheaper than two factors
_LARGEST_CACHED = 1024  # order: 4 MiB


def _build(n: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    matrix = torch.ones(1, 1, device=device, dtype=dtype)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@cache
def _cached(n: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    with torch.inference_mode(False):  # else no backward pass could use the cached tensor
        return _build(n, device, dtype)


def _sylvester(n: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    # A compiled graph cannot read the cache; it builds the matrix once for all of its uses. Only small matrices are
    # cached, because the cache lasts as long as the process.
    small = n <= _LARGEST_CACHED and not torch.compiler.is_compiling()
    return _cached(n, device, dtype) if small else _build(n, device, dtype)


def hadamard(n: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """Return the first `width` columns of Sylvester's H of order n, with device and dtype of `like`: `[n, width]`.

    Rows repeat with the next power of two above `width`, so a narrow tensor never needs an n × n matrix.
    """
    period = 1 << (width - 1).bit_length()
    return _sylvester(period, like.device, like.dtype)[:, :width].repeat(n // period, 1)


def fwht(x: torch.Tensor, n: int | None = None) -> torch.Tensor:
    """Compute H x along the last axis, not normalized: `[..., ≤ n] -> [..., n]`, n a power of two. x is zero-padded.

    H of order a·b is the Kronecker product of H of order a and b. So one product per factor replaces log2 n passes.
    """
    n = n or x.shape[-1]
    if n <= _FACTOR:
        return x @ _sylvester(n, x.device, x.dtype)[: x.shape[-1]]
    x = F.pad(x, (0, n - x.shape[-1]))
    x = x.unflatten(-1, (n // _FACTOR, _FACTOR)) @ _sylvester(_FACTOR, x.device, x.dtype)
    return fwht(x.transpose(-1, -2)).transpose(-1, -2).flatten(-2)
