"""The Walsh–Hadamard transform as a few small matrix products."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

_FACTOR = 128  # order up to which one product is cheaper than splitting
_KEPT = 1024  # order up to which matrices are kept: 4 MiB


def _built(n: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    matrix = torch.ones(1, 1, device=device, dtype=dtype)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@cache
def _cached(n: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    with torch.inference_mode(False):  # or the cached tensor could never take part in a backward pass
        return _built(n, device, dtype)


def _sylvester(n: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    # A compiled graph cannot look into the cache; it makes the matrix once for all of its uses. The cache lasts as
    # long as the process, so it is for small matrices.
    small = n <= _KEPT and not torch.compiler.is_compiling()
    return _cached(n, device, dtype) if small else _built(n, device, dtype)


def hadamard(n: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """The first `width` columns of H (order n, Sylvester's, entries ±1), placed and typed as `like`: `[n, width]`.

    They repeat with the next power of two above `width`, so a narrow tensor never costs an n × n matrix.
    """
    period = 1 << (width - 1).bit_length()
    return _sylvester(period, like.device, like.dtype)[:, :width].repeat(n // period, 1)


def fwht(x: torch.Tensor, n: int | None = None) -> torch.Tensor:
    """H x along the last axis, unnormalised: `[..., ≤ n] -> [..., n]`, n a power of two. What x lacks is zero.

    H of order a·b is the Kronecker product of those of order a and b, so one product per factor replaces log2 n passes.
    """
    n = n or x.shape[-1]
    if n <= _FACTOR:
        return x @ _sylvester(n, x.device, x.dtype)[: x.shape[-1]]
    x = F.pad(x, (0, n - x.shape[-1]))
    x = x.unflatten(-1, (n // _FACTOR, _FACTOR)) @ _sylvester(_FACTOR, x.device, x.dtype)
    return fwht(x.transpose(-1, -2)).transpose(-1, -2).flatten(-2)
