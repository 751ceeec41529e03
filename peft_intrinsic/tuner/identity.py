"""Which base model this is."""

from __future__ import annotations

import hashlib
from collections.abc import Container
from typing import Any

import torch
from torch import nn

from .layer import base_places


def base_digest(model: nn.Module, without: Container[str] = ()) -> bytes:
    """What tells a base model from others: SHA-256 of its parameters, cut to 8 bytes.

    Names in alphabetic order, shapes and values; these rounded to bfloat16, so that a model has the same digest in
    float32 and in bfloat16. Quantised weights are no floating-point parameters, and left out.

    Args:
        model: with or without adapters, none of them merged.
        without: names of parameters to leave out, such as those that start from the fixed stream.

    Raises:
        ValueError: weights are on the meta device (offloaded), or an adapter is merged into them.
    """
    if any(getattr(module, "merged_adapters", None) for module in model.modules()):
        raise ValueError("An adapter is merged into the base model. Call unmerge_adapter() first.")
    digest = hashlib.sha256()
    for name, (module, own) in sorted(base_places(model).items(), key=lambda place: place[0]):
        if name in without:
            continue
        parameter: Any = module._parameters[own]
        if parameter.is_meta:
            raise ValueError(f"{name} is offloaded, so the base model cannot be told. Load the model into memory.")
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        values = parameter.detach().to(torch.bfloat16).cpu().reshape(-1).contiguous()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.digest()[:8]
