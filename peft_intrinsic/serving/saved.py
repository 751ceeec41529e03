"""Reading stored adapters that are not packed: θ in safetensors, and folders as PEFT saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeGuard

import torch
from peft import PeftConfig, PeftType, load_peft_weights
from safetensors.torch import load

from ..codec.packed import MAGIC
from ..tuner.config import IntrinsicConfig
from ..tuner.files import read_vectors
from .store import Stored

METADATA = "adapter_config"
"""Key of the metadata of a safetensors file that holds the text of `adapter_config.json`."""


def is_packed(stored: Stored) -> TypeGuard[bytes]:
    """Whether a stored adapter is packed, or neither that nor a safetensors file, so that reading it as packed fails.

    A safetensors file begins with eight bytes of a length and a brace.
    """
    return isinstance(stored, bytes) and (stored.startswith(MAGIC) or stored[8:9] != b"{")


def read_saved(stored: Stored) -> tuple[IntrinsicConfig, list[torch.Tensor]]:
    """Read an adapter that is not packed.

    Args:
        stored: bytes of a safetensors file with the tensors of `adapter_model.safetensors`, whose metadata has the text
            of `adapter_config.json` under `METADATA`; or the folder of a saved adapter.

    Returns:
        Its configuration, θ, and λ if there is one.

    Raises:
        ValueError: the adapter is damaged, is of another method, or does not say how it was made.
    """
    try:
        if isinstance(stored, Path):
            config, state = PeftConfig.from_pretrained(str(stored)), load_peft_weights(str(stored), device="cpu")
        else:
            state = load(stored)
            config = _read_config(stored)
    except Exception as error:  # whatever a file causes
        raise ValueError(f"The adapter cannot be read: {error}") from error
    if not isinstance(config, IntrinsicConfig):
        raise ValueError(
            f"It is an adapter of the method {PeftType(config.peft_type).value}. Store intrinsic adapters."
        )
    if config.manifest is None:
        raise ValueError(
            "The adapter's configuration has no manifest, so it does not say for which parameters θ was trained. Store "
            "the adapter_config.json that save_pretrained wrote."
        )
    config.inference_mode = True
    return config, read_vectors(config, state)


def _read_config(data: bytes) -> PeftConfig:
    """Read the configuration in the metadata of a safetensors file that is known to be valid."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    text = header.get("__metadata__", {}).get(METADATA)
    if text is None:
        raise ValueError(
            f"the safetensors file has no metadata {METADATA!r}. Store the text of adapter_config.json there "
            "(docs/vllm.md)."
        )
    options = json.loads(text)
    if options.get("subspace") is not None:
        raise ValueError("it needs a subspace file. Store the folder of the saved adapter.")
    return PeftConfig.from_peft_type(**options)
