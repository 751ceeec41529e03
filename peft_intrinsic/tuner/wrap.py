"""Putting tuner layers into a model and taking them out; the start of a fresh head."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import nn

from ..projection.randomness import normals, words
from .layer import IntrinsicLayer
from .modules import IntrinsicEmbedding, IntrinsicHook, IntrinsicLinear, IntrinsicModule, IntrinsicNorm, affine
from .targets import is_linear
from .vector import IntrinsicVector


@cache
def _source(kind: Any) -> str:
    """The code that a class of modules runs, without what sets it up."""
    methods = inspect.getmembers(kind, lambda m: inspect.isfunction(m) and m.__module__ != nn.Module.__module__)
    code = []
    for name, method in methods:
        if "init" not in name and "reset" not in name:
            try:
                code.append(inspect.getsource(method))
            except (OSError, TypeError):  # defined without a file
                continue
    return "\n".join(code)


_TYPE = r"(\.(dtype|device|shape|ndim|size|is_)|\s+is\b|,\s*torch\.Tensor)"


def _reads(parent: nn.Module, child: str) -> bool:
    """Whether a module takes the parameters of its child for itself instead of calling it (Mamba, DeBERTa, …)."""
    kind: Any = type(parent)
    values = rf"\bself\.([\w.]+\.)?{re.escape(child)}\.(weight|bias)\b(?!{_TYPE})"
    return re.search(values, _source(kind)) is not None


def _asks_for_type(parent: nn.Module, child: str) -> bool:
    """Whether a module looks at the dtype, device or shape of its child's weight (T5, vision models)."""
    kind: Any = type(parent)
    return re.search(rf"\bself\.{re.escape(child)}\.weight{_TYPE}", _source(kind)) is not None


def _runs(module: nn.Module) -> bool:
    """Whether a module has a forward pass of its own; lists, dictionaries and bare holders of parameters have none."""
    return type(module).forward is not nn.Module.forward and not isinstance(module, nn.ParameterList | nn.ParameterDict)


def _parents(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                found.setdefault(id(child), []).append((parent, name))
    return found


def _running(places: list[tuple[nn.Module, str]], parents: dict[int, list[tuple[nn.Module, str]]]) -> nn.Module | None:
    """The nearest module above that has a forward pass."""
    while places:
        module = places[0][0]
        if _runs(module):
            return module
        places = parents.get(id(module), [])
    return None


def _wrapper_class(module: nn.Module) -> type[IntrinsicModule]:
    if is_linear(module):
        return IntrinsicLinear
    if isinstance(module, nn.Embedding) and module.max_norm is None:
        plain = type(module).forward is nn.Embedding.forward
        return IntrinsicEmbedding if plain or hasattr(module, "embed_scale") else IntrinsicModule
    return IntrinsicNorm if affine(module) else IntrinsicModule


def tuner_layers(model: nn.Module, holder: IntrinsicVector, modules: Iterable[nn.Module]) -> dict[int, IntrinsicLayer]:
    """The tuner layer of each base module, by the module's id, made where it is missing.

    A leaf is wrapped, under every name that it has. A module with sub-modules keeps its place and gets hooks, as does
    one whose parameters its parent reads.
    """
    layers = {
        id(layer.get_base_layer()): layer
        for layer in (*model.modules(), *holder.hooked)
        if isinstance(layer, IntrinsicLayer) and layer is not holder
    }
    parents = _parents(model)
    for module in modules:
        if id(module) in layers:
            continue
        places = parents.get(id(module), [])
        reader = next((parent for parent, name in places if _reads(parent, name)), None)
        if reader is None and not _runs(module):
            reader = _running(places, parents)
        if reader is not None or module._modules or not places:
            layer: Any = IntrinsicHook(module, reader or module, holder)
            holder.hooked.append(layer)
        else:
            layer = _wrapper_class(module)(module, holder)
            layer.shallow = any(_asks_for_type(parent, name) for parent, name in places)
            layer.train(module.training)
            for parent, name in places:
                setattr(parent, name, layer)
        layers[id(module)] = layer
    return layers


def unwrap(model: nn.Module, layers: Iterable[Any]) -> None:
    """Put base modules back in the place of their wrappers, and take hooks off."""
    parents = _parents(model)
    for layer in layers:
        if isinstance(layer, IntrinsicHook):
            layer.remove()
        elif isinstance(layer, IntrinsicModule):
            for parent, name in parents.get(id(layer), []):
                setattr(parent, name, layer.base_layer)


@torch.no_grad()
def redraw(name: str, module: nn.Module, own: str, config: Any) -> None:
    """Start a fresh parameter from a stream of its own, the same for every adapter and in every process.

    The seed of the adapter is left out on purpose: adapters with different seeds share one base model.

    Raises:
        ValueError: the parameter is offloaded.
    """
    parameter = getattr(module, own)
    if parameter.is_meta:
        if hasattr(module, "_hf_hook"):
            raise ValueError(
                f"{name} is offloaded and was not in the checkpoint, so it must be drawn again. Keep its module in "
                "memory (device_map), or pass head='keep'."
            )
        return
    std = getattr(config, "initializer_range", None) or 0.02  # BERT's and GPT-2's
    values = normals(words(0, "head", name, parameter.numel())) * std
    parameter.copy_(torch.from_numpy(values).view(parameter.shape))
