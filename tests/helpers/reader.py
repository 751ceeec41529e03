"""A second reader of packed adapters, written from docs/packed_format.md alone: the oracle of the first."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Iterable
from decimal import Context, Decimal, localcontext
from itertools import pairwise
from typing import Any

import numpy as np

GRANULARITIES = ["layer", "module", "tensor"]
PROJECTIONS = ["fastfood", "global", "dense", "value_bias"]
SCALES = ["fan_in", "isometric"]
HEADS = ["subspace", "keep"]
TARGETS = ["norms-and-biases", "all"]
TASKS = [None, "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
OTHERS = ["exclude_modules", "layers_pattern", "layers_to_transform", "target_modules", "target_parameters"]
SINCE_2 = ["label_sketch", "label_texts", "value_sketch"]


def demand(condition: bool, what: str) -> None:
    """A file that the page does not allow is damaged."""
    if not condition:
        raise ValueError(what)


class Cursor:
    """Reads the page's kinds of field one after another."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.place = 0

    def take(self, count: int) -> bytes:
        demand(self.place + count <= len(self.data), "ends early")
        self.place += count
        return self.data[self.place - count : self.place]

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self) -> int:
        """Seven bits a byte, the lowest first."""
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                demand(byte > 0 or shift == 7, "a number in more bytes than it needs")
                demand(value < 2**63, "a number of 64 bits")
                return value
            demand(shift < 63, "a number of more than nine bytes")

    def floats(self, count: int) -> list[float]:
        """An exponent for all, and a float16 for each."""
        (exponent,) = struct.unpack("<b", self.take(1))
        halves = struct.unpack(f"<{count}e", self.take(2 * count))
        largest = max(map(abs, halves))
        demand(1 <= largest < 2 or (largest == 0 and exponent == 0), "floats that are not normalized")
        return [math.ldexp(half, exponent) for half in halves]


def named(values: list, index: int) -> Any:
    """The value that an index means."""
    demand(index < len(values), f"no meaning for {index} among {values}")
    return values[index]


def prior(code: int, levels: int) -> list[int]:
    """The weights that a formula gives, in decimal arithmetic of 30 digits."""
    shape, k = divmod(code - 1, 8)
    with localcontext(Context(prec=30)):
        width = levels * Decimal(2) ** (-Decimal(k + 1) / 2)
        distances = [abs(i - Decimal(levels - 1) / 2) / width for i in range(levels)]
        heights = [(-x).exp() if shape else (-x * x / 2).exp() for x in distances]
        return [1 + math.floor(2**16 * height) for height in heights]


def boundaries(weights: list[int]) -> list[int]:
    """Where the integers that a symbol owns begin, and where the last one's end."""
    levels, before, result = len(weights), 0, []
    factor = float(2**24 - levels) / float(sum(weights))
    for i, weight in enumerate(weights):
        result.append(math.floor(float(before) * factor) + i)
        before += weight
    return [*result, 2**24]


def decode(code: bytes, weights: list[int], count: int) -> list[int]:
    """Asymmetric numeral systems, as the page spells them out."""
    if len(weights) == 1:
        demand(not code, "code for a single value")
        return [0] * count
    demand(not code.startswith(b"\0"), "code with a leading zero")
    padded = bytes(-len(code) % 4) + code
    words = list(struct.unpack(f">{len(padded) // 4}I", padded))[::-1]
    starts = boundaries(weights)
    edges = np.array(starts[1:])
    state = 0
    for _ in range(min(2, len(words))):
        state = state << 32 | words.pop()
    symbols = []
    for _ in range(count):
        q = state & 0xFFFFFF
        symbol = int(np.searchsorted(edges, q, side="right"))
        symbols.append(symbol)
        state = (state >> 24) * (starts[symbol + 1] - starts[symbol]) + q - starts[symbol]
        if state < 2**32 and words:
            state = state << 32 | words.pop()
    demand(state == 0 and not words, "code that does not end where θ does")
    return symbols


def read_head(cursor: Cursor) -> dict[str, Any]:
    """Everything before θ."""
    demand(cursor.take(3) == b"PIA", "not a packed adapter")
    version = cursor.byte()
    demand(version in (1, 2), "another version of the format")
    fields: dict[str, Any] = {name: cursor.number() for name in ("algorithm_version", "d", "seed")}
    demand(fields["algorithm_version"] >= 1, "algorithm version 0")
    demand(1 <= fields["d"] <= 2**24, "d out of range")
    flags, places = cursor.byte(), cursor.byte()
    fields |= {
        "said": bool(flags & 1),
        "lambda_granularity": named(GRANULARITIES, flags >> 1 & 3),
        "projection": named(PROJECTIONS, flags >> 3 & 3),
        "scale": SCALES[flags >> 5 & 1],
        "head": HEADS[flags >> 6 & 1],
        "add_bias": bool(flags >> 7),
        "block_size": 1 << (places & 63),
        "task_type": named(TASKS, cursor.byte()),
    }
    others = dict.fromkeys([*OTHERS, *SINCE_2])
    length = cursor.number()
    demand(length <= 2**16, "other options too long")
    if text := cursor.take(length):
        given = json.loads(text.decode("ascii"))
        demand(isinstance(given, dict) and set(given) <= {*others, "projection"} and bool(given), "unknown options")
        if "projection" in given:
            demand(fields["projection"] == "value_bias" and given["projection"] == "value_lora", "two projections")
        demand(None not in given.values(), "an option that is null")
        plain = json.dumps(given, sort_keys=True, separators=(",", ":")).encode()
        demand(plain == text, "other options written otherwise")
        others |= given
    if places >> 6 != 2:
        demand(others["target_modules"] is None, "target_modules given twice")
        others["target_modules"] = named(TARGETS, places >> 6)
    fields |= others
    if others["label_texts"] is not None:
        demand(fields["head"] == "subspace", "two heads")
        fields["head"] = "labels"
    new = fields["projection"] in ("value_bias", "value_lora") or any(others[name] is not None for name in SINCE_2)
    demand(version == 1 + new, "not the lowest version that can hold it")
    length = cursor.number()
    demand(length <= 255, "base name too long")
    fields["base"] = cursor.take(length).decode()
    fields["labels"] = cursor.number()
    fields["base_digest"] = cursor.take(8).hex()
    fields["manifest_digest"] = cursor.take(8).hex()
    reinitialized, place = [], -1
    for _ in range(cursor.number()):
        place += cursor.number() + 1
        reinitialized.append(place)
    return {**fields, "reinitialized": reinitialized}


def read(data: bytes) -> dict[str, Any]:
    """All fields of a packed adapter, θ and λ as lists of floats."""
    demand(len(data) > 4 and zlib.crc32(data[:-4]) == int.from_bytes(data[-4:], "little"), "wrong checksum")
    cursor = Cursor(data[:-4])
    fields = read_head(cursor)
    levels = cursor.byte() + 1
    weights_code = cursor.byte()
    demand(weights_code <= 16, "unknown weights")
    values = cursor.floats(levels)
    demand(all(a < b for a, b in pairwise(values)), "values that do not rise")
    counts = [cursor.number() for _ in range(levels - 1)] if weights_code == 0 else []
    m = cursor.number()
    demand(m < fields["d"] and (m > 0) == fields["said"], "λ that does not fit")
    lambdas = cursor.floats(m) if m else []
    count = fields["d"] - m
    weights = prior(weights_code, levels) if weights_code else [*counts, count - sum(counts)]
    demand(min(weights) >= 1, "a value that never occurs")
    symbols = decode(cursor.take(len(cursor.data) - cursor.place), weights, count)
    occurring = np.bincount(symbols, minlength=levels).tolist()
    demand(min(occurring) > 0, "a value that never occurs")
    demand(weights_code > 0 or occurring == weights, "counts that are not those of the code")
    theta = [values[symbol] for symbol in symbols]
    return {**fields, "weights": weights_code, "values": values, "λ": lambdas, "θ": theta}


def base_digest(parameters: Iterable[tuple[str, np.ndarray]]) -> str:
    """The page's digest of a base model from names and float32 values, without the reinitialized ones."""
    digest = hashlib.sha256()
    for name, values in sorted(parameters):
        digest.update(f"{name} {values.shape}\n".encode())
        bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # to the nearest, ties to even
        digest.update(rounded.astype("<u2").tobytes())
    return digest.digest()[:8].hex()
