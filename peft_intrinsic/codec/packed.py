"""`PackedAdapter`: the fields of a packed adapter and their bytes, defined by docs/packed_format.md."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..projection import ALGORITHM_VERSION
from ..version import __version__, pip_install
from . import entropy, wire
from .quantize import find_nearest

MAGIC, VERSIONS = b"PIA", (1, 2)
MAX_D, MAX_NAME, MAX_JSON = 2**24, 255, 2**16
"""Limits of the format: d; bytes of the base model's name; bytes of the options in JSON."""

GRANULARITIES = ("layer", "module", "tensor")
PROJECTIONS = ("fastfood", "global", "dense", "value_bias", "value_lora")
SCALES = ("fan_in", "isometric")
HEADS = ("subspace", "keep")
TARGETS = ("norms-and-biases", "all")
TASKS = (None, "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
SINCE_2 = ("label_texts", "label_sketch", "value_sketch")
RARE = (
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"),
    *SINCE_2,
)
"""Options that the file has in JSON unless they are `None`."""

OPTIONS = ("said", "lambda_granularity", "projection", "scale", "head", "add_bias", "task_type", *RARE)
"""Stored options, in addition to d, seed and block size. All others follow from these or matter for training only."""


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """Contents of a packed adapter.

    Args:
        d: number of trainable parameters, λ included.
        seed: seed of the projection.
        block_size: block size of the projection.
        options: other options of the configuration by name (`OPTIONS`).
        base: name of the base model.
        classes: number of labels of the base model, 0 if it has none.
        base_digest: digest of the base model's weights, 8 bytes.
        manifest_digest: digest of the names and shapes of the adapted parameters, 8 bytes.
        reinitialized: indexes of the re-initialized parameters among the sorted names of the base model.
        theta: θ, `float32[d − m]` with few distinct values.
        scales: λ, `float32[m]`; m is 0 without SAID.
        algorithm: algorithm version of the projection.
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
        """Distinct values of θ in increasing order: `float32[L]`."""
        return np.unique(self.theta)

    def encode_head(self) -> bytes:
        """Encode what is not learned: base model and projection. The format version is the lowest that can hold them.

        Raises:
            ValueError: the options are longer than `MAX_JSON`.
        """
        options = self.options
        labels = options["label_texts"] is not None  # and so head="labels"
        projection = PROJECTIONS.index(options["projection"])
        new = projection > 2 or any(options[name] is not None for name in SINCE_2)
        target = options["target_modules"]
        flags = (
            options["said"]
            | GRANULARITIES.index(options["lambda_granularity"]) << 1
            | min(projection, 3) << 3
            | SCALES.index(options["scale"]) << 5
            | (0 if labels else HEADS.index(options["head"])) << 6
            | options["add_bias"] << 7
        )
        target_index = TARGETS.index(target) if target in TARGETS else len(TARGETS)
        sizes = (self.block_size.bit_length() - 1) | target_index << 6
        rare = {name: options[name] for name in RARE if options[name] is not None}
        if target in TARGETS:
            del rare["target_modules"]
        if projection > 3:
            rare["projection"] = options["projection"]
        others = json.dumps(rare, separators=(",", ":"), sort_keys=True).encode() if rare else b""
        if len(others) > MAX_JSON:
            names = ", ".join(rare)
            raise ValueError(f"{names}: {len(others)} bytes, of which a packed adapter holds {MAX_JSON}. Use fewer.")
        return b"".join(
            (
                MAGIC,
                bytes([2 if new else 1]),
                *(wire.write_varint(value) for value in (self.algorithm, self.d, self.seed)),
                bytes([flags, sizes, TASKS.index(options["task_type"])]),
                wire.write_text(others),
                wire.write_text(self.base.encode()),
                wire.write_varint(self.classes),
                self.base_digest,
                self.manifest_digest,
                wire.write_increasing(self.reinitialized),
            )
        )

    def encode_body(self, weights: Iterable[int] = range(entropy.PRIORS + 1)) -> bytes:
        """Encode what is learned: the values of θ, the weights that code them, λ, and the code.

        Args:
            weights: weights that the code may use: 0 is a table of counts, 1 … 16 are fixed priors.
        """
        values = self.values
        symbols = find_nearest(self.theta, values)
        index, code = entropy.encode(symbols, len(values), weights)
        counts = np.bincount(symbols)[:-1] if index == 0 else ()
        return b"".join(
            (
                bytes([len(values) - 1, index]),
                wire.write_floats(values),
                *(wire.write_varint(int(count)) for count in counts),
                wire.write_varint(len(self.scales)),
                wire.write_floats(self.scales) if len(self.scales) else b"",
                code,
            )
        )

    def to_bytes(self) -> bytes:
        """Encode the file: head, body, CRC-32 (little-endian)."""
        data = self.encode_head() + self.encode_body()
        return data + zlib.crc32(data).to_bytes(4, "little")

    @classmethod
    def from_bytes(cls, data: bytes) -> PackedAdapter:
        """Read a file as untrusted input, in bounded time and memory.

        Raises:
            ValueError: the file is no packed adapter, has a later format version, or is damaged.
        """
        if data[:3] != MAGIC:
            raise ValueError(f"This is no packed adapter: it begins with {data[:3]!r}, not with {MAGIC!r}.")
        if data[3:4] and data[3] not in VERSIONS:
            raise ValueError(
                f"This packed adapter has format version {data[3]}; peft_intrinsic {__version__} reads versions "
                f"{' and '.join(map(str, VERSIONS))}. Upgrade: {pip_install()}"
            )
        if len(data) < 8 or zlib.crc32(data[:-4]).to_bytes(4, "little") != data[-4:]:
            raise ValueError("This packed adapter is damaged: its checksum does not fit. Copy the file again.")
        try:
            packed = cls._read(wire.Reader(data[:-4]))
            if not data.startswith(packed.encode_head()):
                raise ValueError("its head is not in canonical form")
        except ValueError as error:
            raise ValueError(f"This packed adapter is damaged: {error}. Pack the adapter again.") from None
        return packed

    @classmethod
    def _read(cls, reader: wire.Reader) -> PackedAdapter:
        reader.read_bytes(4)
        algorithm = reader.read_varint(1, 2**31, "the version of the algorithm")  # the configuration checks it
        d = reader.read_varint(1, MAX_D, "d")
        seed = reader.read_varint(0, 2**63 - 1, "the seed")
        flags, sizes, task = reader.read_bytes(3)
        choices = {
            "lambda_granularity": (GRANULARITIES, flags >> 1 & 3),
            "projection": (PROJECTIONS, flags >> 3 & 3),
            "scale": (SCALES, flags >> 5 & 1),
            "head": (HEADS, flags >> 6 & 1),
            "target_modules": ((*TARGETS, None), sizes >> 6),
            "task_type": (TASKS, task),
        }
        options: dict[str, Any] = {**dict.fromkeys(RARE), "said": bool(flags & 1), "add_bias": bool(flags >> 7)}
        for name, (values, index) in choices.items():
            if index >= len(values):
                raise ValueError(f"{name} has index {index} of {len(values)} values")
            options[name] = values[index]
        options.update(_parse_json(reader.read_text(MAX_JSON, "the other options")))
        if options["label_texts"] is not None:
            options["head"] = "labels"
        base = reader.read_text(MAX_NAME, "the base model's name")
        classes = reader.read_varint(0, 2**32, "the number of labels")
        digests = reader.read_bytes(8), reader.read_bytes(8)
        reinitialized = reader.read_increasing(2**20, "reinitialized parameters")
        theta, scales = _read_body(reader, d, options["said"])
        return cls(
            d, seed, 1 << (sizes & 63), options, base, classes, *digests, reinitialized, theta, scales, algorithm
        )


def _parse_json(text: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        options = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("the other options are not JSON") from None
    if not isinstance(options, dict) or not options or not set(options) <= {*RARE, "projection"}:
        raise ValueError(f"the other options are not some of {', '.join(RARE)}")
    return options


def _read_body(reader: wire.Reader, d: int, said: bool) -> tuple[np.ndarray, np.ndarray]:
    levels, index = reader.read_bytes(2)
    levels += 1
    values = reader.read_floats(levels, "the codebook")
    if (np.diff(values) <= 0).any():
        raise ValueError("the codebook is not increasing")
    if index > entropy.PRIORS:
        raise ValueError(f"weights {index} exceed {entropy.PRIORS}")
    counts = [reader.read_varint(1, d, "a count") for _ in range(levels - 1)] if index == 0 else []
    m = reader.read_varint(int(said), d - 1 if said else 0, "the number of λ")
    scales = reader.read_floats(m, "λ") if m else np.zeros(0, dtype=np.float32)
    weights = (*counts, d - m - sum(counts)) if index == 0 else entropy.compute_prior(index, levels)
    if min(weights) < 1:
        raise ValueError("the counts exceed the length of θ")
    symbols = entropy.decode(reader.read_bytes(len(reader.data) - reader.position), d - m, weights)
    occurring = np.bincount(symbols, minlength=levels)
    if not occurring.all() or (index == 0 and occurring.tolist() != list(weights)):
        raise ValueError("the values of the codebook do not occur as often as they must")
    return values[symbols], scales
