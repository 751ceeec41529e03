"""Packed adapters to test with, and the golden files."""

from __future__ import annotations

import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import build
from torch import nn
from transformers import AutoModelForSequenceClassification

from peft_intrinsic.codec import PackedAdapter

GOLDEN = sorted(Path(__file__).parents[1].joinpath("codec/golden").glob("*.pia"))
PLAIN: dict[str, Any] = {
    "said": False,
    "lambda_granularity": "layer",
    "projection": "fastfood",
    "scale": "fan_in",
    "head": "subspace",
    "add_bias": False,
    "task_type": None,
    "target_modules": "norms-and-biases",
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "target_parameters": None,
    "label_texts": None,
    "label_sketch": None,
    "value_sketch": None,
}


def resealed(data: bytes) -> bytes:
    """Replace the last four bytes by the checksum of the others."""
    return data[:-4] + zlib.crc32(data[:-4]).to_bytes(4, "little")


def synthetic(theta: Any, scales: Any = (), **fields: Any) -> PackedAdapter:
    """A packed adapter with these values; other fields of `PackedAdapter` and options by name."""
    options = {name: fields.pop(name, value) for name, value in PLAIN.items()} | {"said": len(scales) > 0}
    given = {
        "d": len(theta) + len(scales),
        "seed": 0,
        "block_size": 64,
        "base": "some/model",
        "classes": 3,
        "base_digest": b"basebase",
        "manifest_digest": b"manifest",
        "reinitialized": [],
    }
    vectors = {"theta": np.array(theta, dtype=np.float32), "scales": np.array(scales, dtype=np.float32)}
    return PackedAdapter(**{**given, **fields}, options=options, **vectors)


def few_values(d: int, levels: int, spread: float = 0.3, seed: int = 0) -> np.ndarray:
    """θ of exactly so many values, each a float16; the smaller the spread, the more frequent the middle ones."""
    generator = np.random.default_rng(seed)
    values = np.sort(generator.choice(np.arange(-2000, 2000), levels, replace=False)) / np.float32(1024)
    others = np.rint(levels * (0.5 + spread * generator.standard_normal(d - levels))).clip(0, levels - 1).astype(int)
    return values[generator.permutation(np.concatenate([np.arange(levels), others]))].astype(np.float32)


def contents(packed: PackedAdapter) -> dict[str, Any]:
    """All fields of a packed adapter, with the names and types of the independent reader."""
    return {
        "algorithm_version": packed.algorithm,
        "labels": packed.classes,
        **{name: getattr(packed, name) for name in ("d", "seed", "block_size", "base", "reinitialized")},
        "base_digest": packed.base_digest.hex(),
        "manifest_digest": packed.manifest_digest.hex(),
        **packed.options,
        "λ": packed.scales.tolist(),
        "θ": packed.theta.tolist(),
    }


def headless(folder: Path, name: str = "bert", seed: int = 1) -> nn.Module:
    """A classifier whose head is not in the checkpoint; each seed initializes another."""
    if not folder.exists():
        build(name).base_model.save_pretrained(folder)
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()


def base_of(golden: Path) -> nn.Module:
    """The base model that a golden file was made for."""
    family = json.loads(golden.with_suffix(".json").read_text())["family"]
    if family != "headless":
        return build(family)
    with tempfile.TemporaryDirectory() as folder:
        return headless(Path(folder, "encoder"))
