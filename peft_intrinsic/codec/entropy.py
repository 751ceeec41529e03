"""Codes symbols by asymmetric numeral systems, with a table of counts or with fixed priors."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Context, Decimal
from functools import cache

import numpy as np
from constriction import stream

SHAPES = ("gaussian", "laplace")
WIDTHS = 8
PRIORS = len(SHAPES) * WIDTHS
"""Number of fixed priors. In the file, 1 to `PRIORS` is a prior, and 0 is a table of counts."""


@cache
def compute_prior(index: int, levels: int) -> tuple[int, ...]:
    """Compute the weights of symbols 0 … L − 1 under a prior: `1 + ⌊2^16 · exp(−(x/s)²/2)⌋`, or with `exp(−|x|/s)`.

    x is the symbol minus (L − 1)/2, and s = L · 2^(−k/2), k = 1 … 8. Decimal arithmetic has the same exponential on
    every platform.

    Args:
        index: prior, 1 … `PRIORS`: first Gaussian with k = 1 … 8, then Laplace.
        levels: L, the number of symbols.
    """
    shape, k = divmod(index - 1, WIDTHS)
    context = Context(prec=30)
    width = context.divide(Decimal(levels), context.sqrt(Decimal(2 ** (k + 1))))
    weights = []
    for i in range(levels):
        x = context.divide(Decimal(abs(2 * i - (levels - 1))), context.multiply(2, width))
        power = context.divide(context.multiply(x, x), 2) if SHAPES[shape] == "gaussian" else x
        weights.append(1 + int(context.multiply(2**16, context.exp(-power))))
    return tuple(weights)


def _model(weights: tuple[int, ...] | np.ndarray) -> stream.model.Categorical:
    """Convert integer weights to probabilities in multiples of 2^-24, none of them zero."""
    return stream.model.Categorical(np.asarray(weights, dtype=np.float64), perfect=False)


def _encode_with(weights: tuple[int, ...] | np.ndarray, symbols: np.ndarray) -> bytes:
    """Encode symbols: the state of the coder as one big-endian integer, without leading zeros."""
    if len(weights) == 1:
        return b""
    coder = stream.stack.AnsCoder()
    coder.encode_reverse(symbols, _model(weights))
    return coder.get_compressed()[::-1].astype(">u4").tobytes().lstrip(b"\0")


def encode(symbols: np.ndarray, levels: int, allowed: Iterable[int] = range(PRIORS + 1)) -> tuple[int, bytes]:
    """Encode symbols with the weights that give the fewest bytes; a table of counts adds its own size.

    Args:
        symbols: `int32[N]`, each of 0 … L − 1 at least once.
        levels: L, the number of symbols.
        allowed: weights to try: 0 (a table) and 1 … `PRIORS`.

    Returns:
        The chosen weights (0 … `PRIORS`), and the code.
    """
    counts = np.bincount(symbols, minlength=levels)
    table = sum(-(-int(count).bit_length() // 7) for count in counts[:-1])
    codes = {index: _encode_with(compute_prior(index, levels) if index else counts, symbols) for index in allowed}
    return min(codes.items(), key=lambda item: len(item[1]) + (0 if item[0] else table))


def decode(code: bytes, count: int, weights: tuple[int, ...] | np.ndarray) -> np.ndarray:
    """Decode symbols from `encode`.

    Args:
        code: bytes of the code.
        count: N, the number of symbols to decode.
        weights: weight of each symbol: the counts, or those of `compute_prior`.

    Returns:
        `int32[N]`.

    Raises:
        ValueError: the bytes are not the code of N symbols under these weights.
    """
    if len(weights) == 1:
        if code:
            raise ValueError("the code of a single value must be empty")
        return np.zeros(count, dtype=np.int32)
    if code[:1] == b"\0":
        raise ValueError("the code begins with a zero byte")
    words = np.frombuffer(code.rjust(-(-len(code) // 4) * 4, b"\0"), dtype=">u4")[::-1].astype(np.uint32)
    coder = stream.stack.AnsCoder(words) if len(words) else stream.stack.AnsCoder()
    symbols = coder.decode(_model(weights), count)
    if not coder.is_empty():
        raise ValueError("the code has more or fewer symbols than θ")
    return symbols
