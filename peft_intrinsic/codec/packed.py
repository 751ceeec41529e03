"""A packed adapter: what it holds, and its bytes. docs/packed_format.md is the definition."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..projection import ALGORITHM_VERSION
from . import entropy, wire
from .quantize import nearest

MAGIC, VERSION = b"PIA", 1
NUMBERS, NAME, OTHERS = 2**24, 255, 2**16
"""Limits of the format: numbers of an adapter; bytes of the base model's name, of the less common options."""

GRANULARITIES = ("layer", "module", "tensor")
PROJECTIONS = ("fastfood", "global", "dense")
SCALES = ("fan_in", "isometric")
HEADS = ("subspace", "keep")
TARGETS = ("norms-and-biases", "all")
TASKS = (None, "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
RARE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
"""Options that stand in JSON where they are not `None`."""

OPTIONS = ("said", "lambda_granularity", "projection", "scale", "head", "add_bias", "task_type", *RARE)
"""Options that a packed adapter keeps beside d, seed and block size; all others follow from them or train only."""


@dataclass(frozen=True, eq=False)
class Packed:
    """All that a packed adapter holds.

    Args:
        d: how many numbers were trained.
        seed: of the projection.
        block_size: of the projection.
        options: the other options of the configuration, `OPTIONS`, by name.
        base: name of the base model.
        classes: its number of labels, 0 where it has none.
        base_digest: of the weights of the base model, 8 bytes.
        manifest_digest: of the names and shapes that are moved, 8 bytes.
        reinitialized: which parameters start from the fixed stream: places among the base model's sorted names.
        theta: `float32[d − m]`, of few distinct values.
        scales: λ, `float32[m]`; m is 0 without SAID.
        algorithm: version of the projection.
    """

    d: int
    seed: int
    block_size: int
    options: Mapping[str, Any]
    base: str
    classes: int
    base_digest: bytes
    manifest_digest: bytes
    reinitialized: list[int]
    theta: np.ndarray = field(repr=False)
    scales: np.ndarray = field(repr=False)
    algorithm: int = ALGORITHM_VERSION

    @property
    def values(self) -> np.ndarray:
        """The distinct values of θ, rising: `float32[L]`."""
        return np.unique(self.theta)

    def head(self) -> bytes:
        """Everything that is not learnt: which base model, which projection."""
        options = self.options
        target = options["target_modules"]
        flags = (
            options["said"]
            | GRANULARITIES.index(options["lambda_granularity"]) << 1
            | PROJECTIONS.index(options["projection"]) << 3
            | SCALES.index(options["scale"]) << 5
            | HEADS.index(options["head"]) << 6
            | options["add_bias"] << 7
        )
        named = TARGETS.index(target) if target in TARGETS else len(TARGETS)
        places = (self.block_size.bit_length() - 1) | named << 6
        rare = {name: options[name] for name in RARE if options[name] is not None}
        if target in TARGETS:
            del rare["target_modules"]
        return b"".join(
            (
                MAGIC,
                bytes([VERSION]),
                *(wire.number(value) for value in (self.algorithm, self.d, self.seed)),
                bytes([flags, places, TASKS.index(options["task_type"])]),
                wire.text(json.dumps(rare, separators=(",", ":"), sort_keys=True).encode() if rare else b""),
                wire.text(self.base.encode()),
                wire.number(self.classes),
                self.base_digest,
                self.manifest_digest,
                wire.gaps(self.reinitialized),
            )
        )

    def body(self, weights: Iterable[int] = range(entropy.PRIORS + 1)) -> bytes:
        """What is learnt: how many values, which weights code them, the values, the counts if need be, λ, the code.

        Args:
            weights: that the code may use: 0, a table of counts; 1 … 16, fixed beforehand.
        """
        values = self.values
        symbols = nearest(self.theta, values)
        index, code = entropy.encode(symbols, len(values), weights)
        counts = np.bincount(symbols)[:-1] if index == 0 else ()
        return b"".join(
            (
                bytes([len(values) - 1, index]),
                wire.floats(values),
                *(wire.number(int(count)) for count in counts),
                wire.number(len(self.scales)),
                wire.floats(self.scales) if len(self.scales) else b"",
                code,
            )
        )

    def to_bytes(self) -> bytes:
        """The file: head, body, CRC-32 (little-endian)."""
        whole = self.head() + self.body()
        return whole + zlib.crc32(whole).to_bytes(4, "little")

    @classmethod
    def from_bytes(cls, data: bytes) -> Packed:
        """Read a file that may be damaged or hostile, in time and memory that its limits bound.

        Raises:
            ValueError: it is no packed adapter, of a later version, or damaged; the message says where.
        """
        if data[:3] != MAGIC:
            raise ValueError(f"This is no packed adapter: it begins with {data[:3]!r}, not with {MAGIC!r}.")
        if data[3:4] and data[3] != VERSION:
            raise ValueError(
                f"This packed adapter has format version {data[3]}; version {VERSION} is known here. Upgrade: pip "
                "install -U peft_intrinsic."
            )
        if len(data) < 8 or zlib.crc32(data[:-4]).to_bytes(4, "little") != data[-4:]:
            raise ValueError("This packed adapter is damaged: its checksum does not fit. Copy the file again.")
        try:
            packed = cls._read(wire.Reader(data[:-4]))
            if not data.startswith(packed.head()):
                raise ValueError("its head is not written in the one way that the format has")
        except ValueError as error:
            raise ValueError(f"This packed adapter is damaged: {error}. Pack the adapter again.") from None
        return packed

    @classmethod
    def _read(cls, reader: wire.Reader) -> Packed:
        reader.take(4)
        algorithm = reader.number(1, 2**31, "the version of the algorithm")  # the configuration knows which
        d = reader.number(1, NUMBERS, "d")
        seed = reader.number(0, 2**63 - 1, "the seed")
        flags, places, task = reader.take(3)
        choices = {
            "lambda_granularity": (GRANULARITIES, flags >> 1 & 3),
            "projection": (PROJECTIONS, flags >> 3 & 3),
            "scale": (SCALES, flags >> 5 & 1),
            "head": (HEADS, flags >> 6 & 1),
            "target_modules": ((*TARGETS, None), places >> 6),
            "task_type": (TASKS, task),
        }
        options: dict[str, Any] = {**dict.fromkeys(RARE), "said": bool(flags & 1), "add_bias": bool(flags >> 7)}
        for name, (known, index) in choices.items():
            if index >= len(known):
                raise ValueError(f"{name} is number {index} of {len(known)}")
            options[name] = known[index]
        options.update(_rare(reader.text(OTHERS, "the other options")))
        base = reader.text(NAME, "the base model's name")
        classes = reader.number(0, 2**32, "the number of labels")
        digests = reader.take(8), reader.take(8)
        reinitialized = reader.gaps(2**20, "reinitialized parameters")
        theta, scales = _learnt(reader, d, options["said"])
        return cls(
            d, seed, 1 << (places & 63), options, base, classes, *digests, reinitialized, theta, scales, algorithm
        )


def _rare(raw: str) -> dict[str, Any]:
    if not raw:
        return {}
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        raise ValueError("the other options are no JSON") from None
    if not isinstance(found, dict) or not found or not set(found) <= set(RARE):
        raise ValueError(f"the other options are not some of {', '.join(RARE)}")
    return found


def _learnt(reader: wire.Reader, d: int, said: bool) -> tuple[np.ndarray, np.ndarray]:
    levels, index = reader.take(2)
    levels += 1
    values = reader.floats(levels, "the codebook")
    if (np.diff(values) <= 0).any():
        raise ValueError("the codebook does not rise")
    if index > entropy.PRIORS:
        raise ValueError(f"weights {index} of {entropy.PRIORS} are unknown")
    counts = [reader.number(1, d, "a count") for _ in range(levels - 1)] if index == 0 else []
    m = reader.number(int(said), d - 1 if said else 0, "the number of λ")
    scales = reader.floats(m, "λ") if m else np.zeros(0, dtype=np.float32)
    weights = (*counts, d - m - sum(counts)) if index == 0 else entropy.prior(index, levels)
    if min(weights) < 1:
        raise ValueError("the counts are more than the numbers")
    symbols = entropy.decode(reader.rest(), d - m, weights)
    found = np.bincount(symbols, minlength=levels)
    if not found.all() or (index == 0 and found.tolist() != list(weights)):
        raise ValueError("the values do not occur as often as they must")
    return values[symbols], scales
