"""Adapted parameters of modules that are not wrapped, because they cannot be or their forward is not known.

The module remains the same object, with its names and parameters. Its class becomes a subclass of the same name in
which the parameters are properties, so that every method reads them with their offsets.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from .batches import spread
from .layer import IntrinsicLayer
from .lazy_tensor import LazyTensor
from .module_types import LAYER, adaptable_names, is_norm, matrix_view
from .vector import IntrinsicVector


class _Values(threading.local):
    """The parameters of a norm during a forward pass over a mixed batch in this thread."""

    mixed: dict[str, torch.Tensor] | None = None


class IntrinsicParameters(nn.Module, IntrinsicLayer):
    """The tuner layer of a module that is not wrapped, an entry of `IntrinsicVector.in_place`."""

    base_layer: nn.Module
    kind: Any

    def __init__(self, owner: nn.Module, vector: IntrinsicVector) -> None:
        nn.Module.__init__(self)
        IntrinsicLayer.__init__(self, vector)
        object.__setattr__(self, "base_layer", owner)  # not as a sub-module: it is already one of another module
        self.mixable = is_norm(owner)
        names = adaptable_names(owner)
        self.out_features, self.in_features, *_ = matrix_view(owner, names[0])
        self._values = _Values()
        self.kind = type(owner)
        owner.__dict__[LAYER] = self
        owner.__class__ = _with_offsets(self.kind, tuple(names), self.mixable)
        vector.in_place.append(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_values": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._values = _Values()

    def base_parameter(self, name: str) -> Any:
        own = self.base_layer.__dict__
        return own[name] if name in own else own["_parameters"].get(name)  # FSDP 1 keeps its views among the attributes

    def read(self, name: str) -> Any:
        base = self.base_parameter(name)
        if getattr(base, "_fsdp_flattened", False):
            return base  # FSDP 1 looks at its own parameter; while the module runs, it puts a view there
        values = self._values.mixed if self.vector.choices.open else None
        return super().read(name) if values is None else values[name]

    @contextmanager
    def mixed(self, x: torch.Tensor) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]] | None]:
        """In a forward pass of a norm: input and parameters, `[batch, 1, …, k]`, if samples have different offsets."""
        applied = self.applied()
        if not applied or applied[0][2].dim() == 1:
            yield None
            return
        values = {name: self.base_parameter(name) for name in self.base_layer._parameters}
        for name, offset, each in applied:
            theta, rows = self.vector.choices.match(offset.name, each, x)
            values[name] = values[name] + spread(offset.materialize(theta), rows).to(x.dtype)
        self._values.mixed = values
        try:
            yield rows, values
        finally:
            self._values.mixed = None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """A LoRA cannot hold these parameters."""
        return adapter_name not in self.offsets

    @contextmanager
    def as_plain_module(self) -> Iterator[None]:
        """Within this context, the module has its own class."""
        self.base_layer.__class__, kind = self.kind, type(self.base_layer)
        try:
            yield
        finally:
            self.base_layer.__class__ = kind

    def remove(self) -> None:
        """Restore the module."""
        self.base_layer.__class__ = self.kind
        del self.base_layer.__dict__[LAYER]
        self.vector.in_place = nn.ModuleList(layer for layer in self.vector.in_place if layer is not self)

    def __repr__(self) -> str:
        return "intrinsic." + super().__repr__()


def _adapted_property(name: str) -> property:
    def read(module: nn.Module) -> Any:
        if "_is_replica" in module.__dict__:
            raise RuntimeError(
                "nn.DataParallel copies modules to other devices without their adapted parameters. Train with "
                "DistributedDataParallel (accelerate launch, torchrun), or on one device (CUDA_VISIBLE_DEVICES=0)."
            )
        return module.__dict__[LAYER].read(name)

    def write(module: nn.Module, value: Any) -> None:
        module.__dict__[name] = value

    def delete(module: nn.Module) -> None:
        del module.__dict__[name]

    return property(read, write, delete)


def _unpickle(kind: Any, names: tuple[str, ...], norm: bool) -> nn.Module:
    subclass = _with_offsets(kind, names, norm)
    return subclass.__new__(subclass)


@cache
def _with_offsets(kind: Any, names: tuple[str, ...], norm: bool) -> type[nn.Module]:
    """A subclass of `kind` with offsets on the named parameters."""

    def reduce(module: nn.Module, protocol: Any) -> Any:  # the subclass has no name to be imported by
        return _unpickle, (kind, names, norm), kind.__reduce_ex__(module, 2)[2]

    def register(module: Any, own: str, parameter: Any) -> None:  # FSDP 1 takes parameters out and puts them back
        if own in names:
            module._parameters[own] = parameter
        else:
            kind.register_parameter(module, own, parameter)

    def forward(module: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = module.__dict__[LAYER]
        if not layer.vector.choices.open:
            return kind.forward(module, x, *args, **kwargs)
        with layer.mixed(x) as mixed:
            if mixed is None:
                return kind.forward(module, x, *args, **kwargs)
            x, values = mixed
            if kind not in (nn.LayerNorm, nn.RMSNorm):
                return kind.forward(module, x, *args, **kwargs)
            # torch's own kernels require the shape of the parameters: normalize without any, then apply them.
            normalize: Any = nn.functional.layer_norm if kind is nn.LayerNorm else nn.functional.rms_norm
            x = normalize(x, module.normalized_shape, eps=module.eps)
            bias = values.get("bias")
            return x * values["weight"] if bias is None else torch.addcmul(bias, x, values["weight"])

    def flat(module: Any) -> list[torch.Tensor]:  # recurrent layers of torch hand this list to their kernels
        values = [getattr(module, name) for name in module._flat_weights_names]
        return [value.clone() if isinstance(value, LazyTensor) else value for value in values]

    members: dict[str, Any] = {name: _adapted_property(name) for name in names}
    members |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    members |= {"__reduce_ex__": reduce, "register_parameter": register}
    if norm:
        members["forward"] = forward
    if issubclass(kind, nn.RNNBase):
        members["_flat_weights"] = property(flat, lambda module, value: None)
    return type(kind.__name__, (kind,), members)
