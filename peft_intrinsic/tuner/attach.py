"""Adding tuner layers to a model and removing them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Container, Iterable
from contextlib import ExitStack
from functools import cache, partial
from typing import Any, cast

import numpy as np
import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..projection import OF_VALUES, PROJECTIONS
from ..projection.randomness import normals, words
from .base_model import base_modules
from .config import IntrinsicConfig
from .head import count_labels
from .layer import IntrinsicLayer, Offset
from .module_types import adaptable_names, is_embedding, is_linear, logical_shape
from .modules import IntrinsicEmbedding, IntrinsicLinear, IntrinsicModule
from .names import KEYWORDS, VECTOR, canonical, is_inside
from .parametrized import IntrinsicParameters
from .sketch import check_sketch, sketch_projections
from .targets import LAMBDA_SCALE, Targeting, identify, is_excluded, is_targeted
from .vector import IntrinsicVector

logger = logging.getLogger(__name__)

LIMITS = 0.03, 0.8
"""Relative differences of sketches above which attaching a saved adapter warns, and above which it raises an error.

SmolLM2-135M, d = 240 and 5,760: 0.003 and 0.009 in bfloat16, 0.02 and 0.06 in 8 bits, 0.2 and 0.5 in NF4.
"""

MANY_LABELS, PER_LABEL = 10, 20
"""Attaching warns if a head for more labels than this starts at random and d is below so many times their number."""


def attach(
    model: nn.Module, adapter: str, targeting: Targeting, config: IntrinsicConfig, twin: str | None = None
) -> None:
    """Add the offsets of an adapter to the modules, and its θ and λ to the model.

    Args:
        model: the base model.
        adapter: name of the new adapter.
        targeting: the parameters that it adapts.
        config: its options.
        twin: name of an attached adapter with the same P, whose projections are shared.

    Raises:
        ValueError: a dense projection would be out of proportion to the model, or value biases have other directions
            than in training.
    """
    if twin is None:
        projections = PROJECTIONS[cast(str, config.projection)](targeting.spec, targeting.shapes)
    else:
        attached = [module.offsets.get(twin, {}) for module in model.modules() if isinstance(module, IntrinsicLayer)]
        projections = {offset.name: offset.projection for offsets in attached for offset in offsets.values()}
    values = [projections[name] for name in projections if name in targeting.spec.values]
    if values := [getattr(projection, "bias", projection) for projection in values]:  # a·x is about one in any base
        sketch = sketch_projections(values, targeting.spec.d)
        check_sketch(config, "value_sketch", sketch, LIMITS, "The directions of value biases")
        config.value_sketch = sketch
    if not config.inference_mode:
        _warn_of_running_statistics(model, config)
        _warn_of_many_labels(count_labels(model, config.task_type) or 0, config)
    if not hasattr(model, VECTOR):
        _add_vector(model)
        _report_unadapted(model, targeting.users, config)
    if config.projection in OF_VALUES and config.target_modules not in KEYWORDS:
        _report_other_targets(model, targeting, config)
    vector: Any = model.get_submodule(VECTOR)
    layers = _make_layers(model, vector, [module for users in targeting.users.values() for module, _ in users])
    vector.choices.forget()
    merged: set[Any] = set()
    for name, users in targeting.users.items():
        form = logical_shape(*users[0])
        for module, own in users:
            if _is_split(model, module, own):
                vector.split[adapter] = name
            merges = (identity := identify(module, own)) not in merged
            merged.add(identity)
            offset = Offset(name, projections[name], *form, targeting.groups.get(name), merges)
            layers[id(module)].offsets.setdefault(adapter, {})[own] = offset
    spec = targeting.spec
    scale = spec.theta_scale / spec.factor if config.scale == "fan_in" else 1
    count = config.ensemble or int(not config.init_weights)
    starts = [random_theta(int(torch.randint(2**62, ())), spec.d) / scale for _ in range(count)]
    theta = np.mean(starts, axis=0) if starts else np.zeros(spec.d)
    module, own = next(iter(targeting.users.values()))[0]
    like = next(p for p in (module._parameters.get(own), *module.parameters(), *module.buffers()) if p is not None)
    vector.add(adapter, theta, np.ones(len(set(targeting.groups.values()))) / LAMBDA_SCALE[config.scale], like)


def _is_split(model: nn.Module, module: nn.Module, name: str) -> bool:
    """Whether this device has only a part of a parameter. FSDP 2 gathers those of layers that are wrapped."""
    if not hasattr(module._parameters.get(name), "full_tensor"):
        return False
    gathered = any(hasattr(each, "reshard") for each in model.modules()) and not getattr(model, "_tp_size", None)
    return not (gathered and (is_linear(module) or is_embedding(module)))


def random_theta(seed: int, length: int) -> np.ndarray:
    """A random start of θ: normal, with standard deviation 0.2, `float64[length]`."""
    return normals(words(seed, "theta", "", length)) / 5


def _report_unadapted(model: nn.Module, targets: Container[str], config: IntrinsicConfig) -> None:
    """Report once which parameters `target_modules="all"` leaves unchanged."""
    rest = [canonical(name, model) for name, p in model.named_parameters() if not p.is_floating_point()]
    rest = [name for name in rest if name not in targets]
    if config.target_modules == "all" and rest:
        logger.info("Not adapted (not floating point): %s", ", ".join(rest))


def _report_other_targets(model: nn.Module, targeting: Targeting, config: IntrinsicConfig) -> None:
    """Report the targeted modules that `"value_bias"` or `"value_lora"` leaves unchanged."""
    adapted = {module for users in targeting.users.values() for module, _ in users}
    rest = [
        key
        for key, module in base_modules(model)
        if module not in adapted and adaptable_names(module) and is_targeted(config, key)
        if not is_excluded(config, key)
    ]
    if rest:
        logger.info("Not adapted (projection=%r adapts values alone): %s", config.projection, ", ".join(rest))


def _warn_of_running_statistics(model: nn.Module, config: IntrinsicConfig) -> None:
    """Warn that training also changes running statistics of the base model, which adapter files do not contain."""
    names = [
        key
        for key, module in base_modules(model)
        if isinstance(module, _NormBase) and module.running_mean is not None
        if not is_inside(config.full_modules or (), key)
    ]
    if names:
        warnings.warn(
            f"Training updates the running statistics of {len(names)} modules ({', '.join(names[:3])}"
            f"{', …' if len(names) > 3 else ''}), which are not part of the adapter: a reloaded adapter uses those of "
            "the base model. Save these modules with the adapter (modules_to_save=[their names]), or keep them in "
            "evaluation mode (module.eval() after each model.train()).",
            stacklevel=2,
        )


def _warn_of_many_labels(labels: int, config: IntrinsicConfig) -> None:
    """Warn that few parameters do not train a head for many labels from random values."""
    new = config.manifest is None and config.head == "subspace" and config.reinitialized
    if new and labels > MANY_LABELS and config.d < PER_LABEL * labels:
        warnings.warn(
            f"d={config.d} is little for a newly initialized head with {labels} labels, most of which it will not "
            "learn. Start the head from the labels' names (head='labels'), or use more parameters: below "
            f"d = {PER_LABEL * labels} most predictions were wrong in our measurements (docs/choosing_d.md).",
            stacklevel=2,
        )


def _find_parents(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """All parents of every module and its names in them, by the module's id."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                found.setdefault(id(child), []).append((parent, name))
    return found


def check_replaceable(parents: Iterable[tuple[nn.Module, str]]) -> None:
    """Raise ValueError if a layer was compiled by itself, so that a wrapper would not be called."""
    for parent, name in parents:
        if name == "_orig_mod":
            raise ValueError(
                f"{parent} was compiled by itself, and its compiled code would not call the adapter. Compile the "
                "module that contains it, or compile after attaching the adapter."
            )


def _make_layers(model: nn.Module, vector: IntrinsicVector, modules: Iterable[nn.Module]) -> dict[int, IntrinsicLayer]:
    """Make the missing tuner layers of base modules. Returns those of all adapted modules, by the module's id.

    Linear layers and embeddings are wrapped, under every name that they have. Other modules are not replaced.
    """
    known = [module for module in model.modules() if isinstance(module, IntrinsicLayer)]
    layers: dict[int, Any] = {id(layer.get_base_layer()): layer for layer in known}
    parents = _find_parents(model)
    for module in modules:
        if id(module) in layers:
            continue
        kind = IntrinsicLinear if is_linear(module) else IntrinsicEmbedding if is_embedding(module) else None
        at = parents.get(id(module), [])
        if kind is None or not at:  # the root has no parent
            layers[id(module)] = IntrinsicParameters(module, vector)
            continue
        check_replaceable(at)
        layers[id(module)] = layer = kind(module, vector)
        for parent, name in at:
            setattr(parent, name, layer)
    return layers


def unwrap(model: nn.Module, layers: Iterable[Any]) -> None:
    """Replace tuner layers by their base modules, and restore the classes of these."""
    parents = _find_parents(model)
    for layer in layers:
        if isinstance(layer, IntrinsicParameters):
            layer.remove()
        elif isinstance(layer, IntrinsicModule):
            for parent, name in parents.get(id(layer), []):
                setattr(parent, name, layer.base_layer)


def detach(model: nn.Module, adapter: str) -> None:
    """Remove an adapter from the model, after a failed attachment."""
    for module in list(model.modules()):
        for name, child in module._modules.items():  # modules_to_save, trainable_token_indices
            if isinstance(child, AuxiliaryTrainingWrapper) and adapter in child._adapters:
                child.delete_adapter(adapter, new_active_adapters=None)
                if not child._adapters:
                    module._modules[name] = child.original_module
    layers = [module for module in model.modules() if isinstance(module, IntrinsicLayer)]
    for layer in layers:
        layer.delete_adapter(adapter)
    unwrap(model, [layer for layer in layers if not layer.offsets])
    vector: Any = getattr(model, VECTOR, None)
    if isinstance(vector, IntrinsicVector) and not vector.intrinsic_theta:
        remove_vector(model)


def _tie_weights(model: Any, *args: Any, **kwargs: Any) -> None:
    """Call transformers' `tie_weights`, which needs the names of the parameters in the plain model."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, IntrinsicLayer)]
    parents = _find_parents(model)
    with ExitStack() as stack:
        for layer in layers:
            if isinstance(layer, IntrinsicParameters):
                stack.enter_context(layer.as_plain_module())
            for parent, name in parents[id(layer)] if isinstance(layer, IntrinsicModule) else ():
                stack.callback(setattr, parent, name, layer)
                setattr(parent, name, layer.base_layer)
        type(model).tie_weights(model, *args, **kwargs)


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Call transformers' `generate`, which repeats each sample for its beams and returned sequences."""
    settings = [kwargs.get("generation_config"), *args[1:2], getattr(model, "generation_config", None)]
    options = ("num_beams", "num_return_sequences")
    given = [kwargs.get(name) or next((v for s in settings if (v := getattr(s, name, None))), 1) for name in options]
    with getattr(model, VECTOR).choices.repeating(max(given)):
        return type(model).generate(model, *args, **kwargs)


def _add_vector(model: nn.Module) -> None:
    setattr(model, VECTOR, IntrinsicVector(model))
    if hasattr(type(model), "generate") and "generate" not in model.__dict__:
        model.__dict__["generate"] = partial(_generate, model)
    if hasattr(model, "tie_weights"):
        model.__dict__["tie_weights"] = partial(_tie_weights, model)
    if isinstance(model, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        kind: Any = type(model)
        model.__class__ = _hide_vector(kind)


def remove_vector(model: nn.Module) -> None:
    """Remove θ and λ from the model."""
    vector: Any = model.get_submodule(VECTOR)
    vector.detach_from(model)
    model.__dict__.pop("tie_weights", None)
    if getattr(model.__dict__.get("generate"), "func", None) is _generate:
        del model.__dict__["generate"]
    if isinstance(model, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        model.__class__ = type(model).__mro__[1]


@cache
def _hide_vector(kind: Any) -> Any:
    """A subclass of a container that runs or counts its items, without θ and λ among them."""

    def items(module: Any) -> dict[str, nn.Module]:
        return {name: child for name, child in module._modules.items() if name != VECTOR}

    members: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__len__": lambda module: len(items(module)),
        "__reduce_ex__": lambda module, protocol: (_unpickle, (kind,), kind.__reduce_ex__(module, 2)[2]),
    }
    if issubclass(kind, nn.ModuleDict):
        members |= {
            "items": lambda module: items(module).items(),
            "keys": lambda module: items(module).keys(),
            "values": lambda module: items(module).values(),
            "__iter__": lambda module: iter(items(module)),
        }
    else:
        members["__iter__"] = lambda module: iter(items(module).values())
    return type(kind.__name__, (kind,), members)


def _unpickle(kind: Any) -> nn.Module:
    subclass = _hide_vector(kind)
    return subclass.__new__(subclass)
