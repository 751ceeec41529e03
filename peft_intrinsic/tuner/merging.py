"""Merging offsets into one base parameter, plain or quantized, so that it can be restored bitwise."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import onload_layer
from peft.utils import resolve_quantization_backend
from torch import nn
from transformers import PreTrainedModel

STEP = 2**20
"""Entries of a weight that are merged at a time, so that merging needs little memory beside the originals."""


def _backend(layer: Any, name: str) -> Any:
    """PEFT's access to a quantized weight; None if the parameter is plain."""
    base = layer.get_base_layer()
    data = layer.base_parameter(name).data
    if type(data) is torch.Tensor and data.is_floating_point() and data.element_size() > 1:
        return None
    backend, reason = None, f"PEFT does not know how to write a {name} of type {data.dtype}"
    try:
        backend = resolve_quantization_backend(base, **layer.vector.quantization) if name == "weight" else None
    except ValueError as error:  # torchao without the model's quantization settings
        reason = str(error)
    if backend is None or not backend.supports_merge:
        raise ValueError(
            f"Cannot merge into the {name} of a {type(base).__name__}: {reason}. Load the base model without "
            "quantization and merge there."
        )
    return backend


def dequantize(backend: Any, module: Any) -> torch.Tensor:
    """Read a quantized weight through PEFT's backend.

    bitsandbytes repacks 4-bit weights on some CPUs when they are used, and PEFT then reads wrong values. `state_dict`
    undoes it with a loss, so on a copy.
    """
    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        module = copy.deepcopy(module)
        module.state_dict()
    return backend.get_base_weight(module)


def add_offsets(layer: Any, name: str, parts: Sequence[tuple[Any, torch.Tensor]]) -> tuple[Any, Any, Any]:
    """Add offsets to a base parameter, some rows at a time.

    Args:
        layer: a tuner layer.
        name: of the parameter.
        parts: offsets and the λθ of each, `[d − m]`.

    Returns:
        Whether the result is finite, and the squared norms of the rounding error and of the offsets: tensors on the
        parameter's device, so that nothing waits for it here.
    """
    backend = _backend(layer, name)
    data = dequantize(backend, layer.get_base_layer()) if backend else layer.base_parameter(name).data
    first = parts[0][0]
    rows, cols = first.projection.rows, first.projection.cols
    offloaded = hasattr(layer.get_base_layer(), "_hf_hook")  # tied weights may share the values that the hook stores
    whole_at_once = backend or offloaded or not (data.is_contiguous() or first.transposed)
    target = data.clone(memory_format=torch.contiguous_format) if whole_at_once else data
    matrix = target.mT if first.transposed else target.view(rows, cols)
    finite = torch.ones((), dtype=torch.bool, device=data.device)
    lost, norm = torch.zeros((2,), device=data.device)
    step = max(1, STEP // cols)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        delta = sum(offset.projection.slab(theta, start, stop) for offset, theta in parts).to(data.device)
        old = matrix[start:stop]
        new = (old + delta).to(data.dtype)
        finite &= torch.isfinite(new).all()
        lost += (new.float() - old.float() - delta).square().sum()
        norm += delta.square().sum()
        old.copy_(new)
    if backend:
        before = data.float()
        backend.set_base_weight(layer, target)
        data = backend.get_base_weight(layer.get_base_layer())
        lost = (data.float() - before - (target.float() - before)).square().sum()
    elif whole_at_once:
        layer.base_parameter(name).data = target
    return finite, lost, norm


def zero_bias(layer: Any, offset: Any, theta: torch.Tensor) -> torch.Tensor:
    """Zeros for a bias that the layer lacks."""
    weight = layer.base_parameter("weight")
    plain = weight.is_floating_point() and weight.element_size() > 1
    return torch.zeros(offset.shape, dtype=weight.dtype if plain else theta.dtype, device=weight.device)


def save_original(layer: Any, name: str, offset: Any, theta: torch.Tensor) -> Any:
    """Save what `restore_original` needs to undo any number of merges, and add a bias that the layer lacks.

    A plain parameter is copied, because `base + offset − offset` is not bitwise equal to the base. A quantized one is
    saved by reference, because merging replaces it.
    """
    base, parameter = layer.get_base_layer(), layer.base_parameter(name)
    if parameter is None:
        setattr(base, name, nn.Parameter(zero_bias(layer, offset, theta), requires_grad=False))
        return None
    if _backend(layer, name):
        return base, parameter, copy.copy(getattr(base, "state", None))
    return parameter.data.clone()


def find_bias_flags(model: Any, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Find options of the model's configuration with which its class has added biases, for `merge_and_unload`.

    Returns:
        The options, and the names of biases that the class then has too, which must be zero.

    Raises:
        ValueError: a transformers class cannot have them, so that they would be lost when it is saved and loaded.
    """
    wanted = set(names)
    if not wanted or not isinstance(model, PreTrainedModel):
        return [], []

    def build_names(*flags: str) -> set[str]:
        config = copy.deepcopy(model.config)
        for flag in flags:
            setattr(config, flag, True)
        with torch.device("meta"):
            return {name for name, _ in type(model)(config).named_parameters()}

    plain = build_names()
    flags = [flag for flag, value in vars(model.config).items() if flag.endswith("bias") and value is False]
    added = {flag: build_names(flag) - plain for flag in flags}
    exact = [flag for flag in flags if set() < added[flag] <= wanted]
    covered = set().union(*(added[flag] for flag in exact))
    chosen = exact + [flag for flag in flags if flag not in exact and added[flag] & (wanted - covered)]
    present = build_names(*chosen)
    if missing := sorted(wanted - present):
        raise ValueError(
            f"A saved {type(model).__name__} cannot hold these added biases: {', '.join(missing)}. Leave the adapter "
            "unmerged, merge it in memory with merge_adapter(), or train one with projection='value_lora' or "
            "'fastfood'."
        )
    return chosen, sorted(present - plain - wanted)


def add_zero_bias(linear: Any) -> None:
    """Add a bias of zeros to a linear layer without one."""
    with onload_layer(nn.ModuleDict({"base_layer": linear})):  # the hook of an offloaded layer then stores the bias
        weight = linear.weight
        dtype = weight.dtype if weight.is_floating_point() and weight.element_size() > 1 else torch.float32
        bias = torch.zeros(linear.out_features, dtype=dtype, device=weight.device)
        linear.bias = nn.Parameter(bias, requires_grad=False)


def restore_original(layer: Any, name: str, original: Any) -> None:
    """Undo merges with the result of `save_original`."""
    if original is None:
        setattr(layer.get_base_layer(), name, None)
        return
    if isinstance(original, torch.Tensor):
        layer.base_parameter(name).data.copy_(original)  # the model may have changed its type or device since
        return
    base, parameter, state = original
    layer.base_layer = base  # some backends replace the whole layer
    if name in base.__dict__:  # torchao leaves a plain attribute behind
        delattr(base, name)
    setattr(base, name, parameter)
    if state is not None:
        base.state = state
