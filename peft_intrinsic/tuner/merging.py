"""Reading and writing one base parameter, plain or quantised, so that the original can be put back to the bit."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.utils import resolve_quantization_backend


def _backend(layer: Any, name: str) -> Any:
    """PEFT's access to a quantised weight; None where the parameter is plain."""
    base = layer.get_base_layer()
    data = getattr(base, name).data
    if type(data) is torch.Tensor and data.is_floating_point() and data.element_size() > 1:
        return None
    backend, reason = None, f"PEFT does not know how to write a {name} of type {data.dtype}"
    try:
        backend = resolve_quantization_backend(base, **layer.vector.quantization) if name == "weight" else None
    except ValueError as error:  # torchao without the model's quantisation settings
        reason = str(error)
    if backend is None or not backend.supports_merge:
        raise ValueError(
            f"Cannot merge into the {name} of a {type(base).__name__}: {reason}. Load the base model unquantised and "
            "merge there."
        )
    return backend


def read(layer: Any, name: str) -> torch.Tensor:
    """The base parameter as it is, dequantised.

    Raises:
        ValueError: it is quantised in a way that PEFT cannot merge into.
    """
    backend = _backend(layer, name)
    base = layer.get_base_layer()
    return backend.get_base_weight(base) if backend else getattr(base, name).data


def write(layer: Any, name: str, value: torch.Tensor) -> None:
    """Replace the base parameter, quantised again where it was."""
    backend = _backend(layer, name)
    if backend:
        backend.set_base_weight(layer, value)
    else:
        getattr(layer.get_base_layer(), name).data = value


def kept(layer: Any, name: str) -> Any:
    """What `restore` needs to undo any number of writes."""
    base = layer.get_base_layer()
    if _backend(layer, name):
        return base, getattr(base, name), copy.copy(getattr(base, "state", None))
    return getattr(base, name).data


def restore(layer: Any, name: str, original: Any) -> None:
    """Put back what `kept` returned."""
    if isinstance(original, torch.Tensor):
        parameter = getattr(layer.get_base_layer(), name)
        parameter.data = original.to(parameter.device, parameter.dtype)  # the model may have moved since
        return
    base, parameter, state = original
    layer.base_layer = base  # some backends replace the whole layer
    if name in base.__dict__:  # torchao leaves a plain attribute behind
        delattr(base, name)
    setattr(base, name, parameter)
    if state is not None:
        base.state = state
