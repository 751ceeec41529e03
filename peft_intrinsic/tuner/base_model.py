"""The base model below its adapters: modules, parameters and digests."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .names import VECTOR, block_of, canonical, is_foreign


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The names and modules of the base model, without those of attached adapters."""
    for name, module in model.named_modules():
        name = canonical(name, model) if not is_foreign(name) else VECTOR
        if name.partition(".")[0] != VECTOR and not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            yield name, module


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within this context, the model is in evaluation mode.

    4-bit layers of bitsandbytes remain in training mode, which computes the same: on some CPUs, their first pass in
    evaluation mode repacks the weights, and inputs have no gradients afterwards.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for module, _ in modes:
            module.training = hasattr(module, "support_avx512bf16_for_cpu")
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def base_parameters(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The module of each floating-point parameter of the base model, and the parameter's name in it, by full names.

    A parameter that several modules share has an entry for each of its names.
    """
    return {
        f"{key}.{own}" if key else own: (module, own)
        for key, module in base_modules(model)
        for own, parameter in module._parameters.items()
        if parameter is not None and parameter.is_floating_point()
    }


def base_digest(model: nn.Module, without: Container[str] = ()) -> bytes:
    """Digest that identifies a base model: SHA-256 of its parameters, cut to 8 bytes.

    It covers names in alphabetic order, shapes and values. Values are rounded to bfloat16, so that a model has the same
    digest in float32 and in bfloat16. Quantized weights are not floating point and are left out.

    Args:
        model: with or without adapters, none of them merged.
        without: names of parameters to leave out, such as those that are re-initialized from a fixed seed.

    Raises:
        ValueError: weights are on the meta device (offloaded), or an adapter is merged into them.
    """
    if any(getattr(module, "merged_adapters", None) for module in model.modules()):
        raise ValueError("An adapter is merged into the base model. Call unmerge_adapter() first.")
    digest = hashlib.sha256()
    for name, (module, own) in sorted(base_parameters(model).items(), key=lambda place: place[0]):
        if name in without:
            continue
        parameter: Any = module._parameters[own]
        if parameter.is_meta:
            raise ValueError(f"{name} is offloaded, so the base model has no digest. Load the model into memory.")
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        values = parameter.detach().to(torch.bfloat16).cpu().reshape(-1).contiguous()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.digest()[:8]


def values_digest(model: nn.Module, names: Collection[str]) -> str:
    """Digest of some parameters of a base model: of those in numbered blocks, or of all if there are none.

    Parameters outside, such as a head, may start with other values for every adapter.
    """
    model = getattr(model, "get_base_model", lambda: model)()
    inner = {name for name in names if block_of(name)} or set(names)
    return base_digest(model, without=set(base_parameters(model)) - inner).hex()


def known_digest(model: nn.Module, names: Collection[str]) -> str | None:
    """`values_digest`, or None for quantized, offloaded or float16 parameters, and under a merged adapter."""
    model = getattr(model, "get_base_model", lambda: model)()
    parameters = {name: module._parameters[own] for name, (module, own) in base_parameters(model).items()}
    chosen = [parameters.get(name) for name in names]
    absent = any(p is None or p.is_meta or p.dtype == torch.float16 or type(p.data) is not torch.Tensor for p in chosen)
    merged = any(getattr(module, "merged_adapters", None) for module in model.modules())
    return None if absent or merged else values_digest(model, names)
