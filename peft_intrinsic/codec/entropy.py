"""Symbols as bytes, by asymmetric numeral systems, and the weights that are coded with or instead of a table."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Context, Decimal
from functools import cache

import numpy as np
from constriction import stream

SHAPES = ("gaussian", "laplace")
WIDTHS = 8
PRIORS = len(SHAPES) * WIDTHS
"""Weights that are fixed beforehand, named by one byte from 1 on; 0 is a table of counts."""


@cache
def prior(index: int, levels: int) -> tuple[int, ...]:
    """Weights of the symbols 0 … L − 1, falling from the middle: `1 + ⌊2^16 · exp(−(x/s)²/2)⌋`, or `exp(−|x|/s)`.

    x counts from (L − 1)/2, and s = L · 2^(−k/2), k = 1 … 8. Decimal numbers, since their exponential is the same on
    every platform.

    Args:
        index: 1 … `PRIORS`, shapes first.
        levels: L.
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
    """Whole weights as probabilities in units of 2^-24, none of them zero."""
    return stream.model.Categorical(np.asarray(weights, dtype=np.float64), perfect=False)


def _coded(symbols: np.ndarray, weights: tuple[int, ...] | np.ndarray) -> bytes:
    """The state of the coder as one big-endian number, without leading zeros."""
    if len(weights) == 1:
        return b""
    coder = stream.stack.AnsCoder()
    coder.encode_reverse(symbols, _model(weights))
    return coder.get_compressed()[::-1].astype(">u4").tobytes().lstrip(b"\0")


def encode(symbols: np.ndarray, levels: int, allowed: Iterable[int] = range(PRIORS + 1)) -> tuple[int, bytes]:
    """The shortest code, the table of counts included where it needs one.

    Args:
        symbols: `int32[N]`, each of 0 … levels − 1 at least once.
        levels: L.
        allowed: the weights to try: 0, a table, and 1 … `PRIORS`.

    Returns:
        Which weights, and the code.
    """
    counts = np.bincount(symbols, minlength=levels)
    table = sum(-(-int(count).bit_length() // 7) for count in counts[:-1])
    codes = {index: _coded(symbols, prior(index, levels) if index else counts) for index in allowed}
    return min(codes.items(), key=lambda item: len(item[1]) + (0 if item[0] else table))


def decode(code: bytes, count: int, weights: tuple[int, ...] | np.ndarray) -> np.ndarray:
    """What `encode` coded.

    Args:
        code: the bytes.
        count: N.
        weights: counts or `prior`.

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
        raise ValueError("the code holds more or less than the numbers")
    return symbols
