"""Putting tuner layers into a model and taking them out."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..projection import BLOCK_SIZE, PROJECTIONS, Shapes, Spec
from ..projection.randomness import normals, words
from .base_model import base_modules
from .config import IntrinsicConfig
from .layer import IntrinsicLayer, Offset
from .manifest import check_manifest, manifest
from .module_types import is_embedding, is_linear, is_vector, logical_shape, matrix_view
from .modules import IntrinsicEmbedding, IntrinsicLinear, IntrinsicModule
from .names import HOLDER, canonical, inside
from .parametrized import IntrinsicParameters
from .targets import candidates, chosen, excluded, lambda_groups, targeted
from .vector import IntrinsicVector

logger = logging.getLogger(__name__)

NUMBERS = 2**22
"""Random numbers that a projection may always have (16 MiB); beyond, a small multiple of the moved weights."""

LAMBDA = {"fan_in": 256, "isometric": 1}
"""What λ is counted in: under `fan_in` a λ of 1 is stored as 1/256, so that it trains at the rate of θ."""

Match = tuple[nn.Module, list[str]]
"""A base module and which of its parameters are moved."""

Users = dict[str, list[tuple[nn.Module, str]]]
"""All modules that hold a parameter, and its name there, by the parameter's name in the plain base model."""


def default_targets(model: nn.Module, config: IntrinsicConfig) -> str:
    """What `target_modules=None` stands for: norms, biases and head, or everything where those hold too few weights."""
    vectors = {
        _identity(module, name): math.prod(logical_shape(module, name)[0])
        for key, module in base_modules(model)
        for name in chosen(config, key, module)
        if not excluded(config, key)
        and (key in config.head_modules or (targeted(config, key) and is_vector(module, name)))
    }
    return "norms-and-biases" if config.d <= sum(vectors.values()) else "all"


def users_of(model: nn.Module, matched: Iterable[Match], config: IntrinsicConfig) -> Users:
    """Every holder of every matched parameter, so that tied parameters move together.

    Raises:
        ValueError: nothing was matched, or a parameter that cannot get an offset.
    """
    wanted = {_identity(module, name) for module, names in matched for name in names}
    users: Users = {}
    scripted: set[Any] = set()
    firsts: dict[Any, str] = {}
    ties = getattr(model, "all_tied_weights_keys", None) or {}  # offloaded, tied parameters are no longer one object
    for key, module in base_modules(model):
        for name in candidates(config, key, module):
            if (identity := _identity(module, name)) in wanted:
                if isinstance(module, torch.jit.ScriptModule):
                    scripted.add(identity)
                    continue
                full = f"{key}.{name}" if key else name
                parameter = module._parameters.get(name)
                offloaded = parameter is not None and parameter.is_meta
                first = firsts.setdefault(identity, ties.get(full, full) if offloaded else full)
                users.setdefault(first, []).append((module, name))
    if scripted:
        held = ((key, module, name) for key, module in base_modules(model) for name in candidates(config, key, module))
        keys = list(dict.fromkeys(key for key, module, name in held if _identity(module, name) in scripted))
        raise ValueError(
            f"{', '.join(keys)}: a scripted or traced module reads its parameters in compiled code, so they cannot get "
            f"an offset. Leave them out: exclude_modules={keys}. Or script the model after merging the adapter."
        )
    if not users:
        raise ValueError(
            f"target_modules={config.target_modules!r} and target_parameters={config.target_parameters!r} matched "
            "no module with parameters of its own. Name linear layers, norms or embeddings, or pass 'all'."
        )
    return users


def _is_split(model: nn.Module, module: nn.Module, name: str) -> bool:
    """Whether a parameter is only a part on this device. FSDP 2 puts those of layers that are wrapped together."""
    if not hasattr(module._parameters.get(name), "full_tensor"):
        return False
    gathered = any(hasattr(each, "reshard") for each in model.modules()) and not getattr(model, "_tp_size", None)
    return not (gathered and (is_linear(module) or is_embedding(module)))


def _identity(module: nn.Module, name: str) -> Any:
    # Some quantised layers have none for `weight`, an added bias has none, and scripted modules hold no dictionary.
    parameter = dict(module._parameters).get(name)
    return (id(module), name) if parameter is None else id(parameter)


def attach(model: nn.Module, adapter: str, users: Users, config: IntrinsicConfig) -> None:
    """Give every user of a parameter its offset, and the holder this adapter's θ and λ.

    Fills in `config.manifest` and `config.block_size`.

    Raises:
        ValueError: d does not exceed the number of λ, or exceeds the number of moved weights; the projection would be
            out of proportion to the model; or the model is not the one that a saved adapter was made for.
    """
    groups = lambda_groups(users, config.lambda_granularity) if config.said else {}
    count = len(set(groups.values()))
    forms = {name: logical_shape(*held[0]) for name, held in users.items()}
    shapes = {
        name: matrix_view(*held[0], head=name.rpartition(".")[0] in config.head_modules) for name, held in users.items()
    }
    spec = _spec(config, count, shapes)
    if config.manifest is not None:
        check_manifest(config.manifest, shapes)
    projections = PROJECTIONS[config.projection](spec, shapes)
    config.manifest, config.block_size = manifest(shapes), spec.block_size

    if not config.inference_mode:
        _warn_of_running_statistics(model, config)
    if not hasattr(model, HOLDER):
        _add_holder(model)
        _name_the_rest(model, users, config)
    holder: Any = model.get_submodule(HOLDER)
    layers = _layers(model, holder, [module for held in users.values() for module, _ in held])
    holder.choices.forget()
    merged: set[Any] = set()
    for name, held in users.items():
        for module, own in held:
            if _is_split(model, module, own):
                holder.split[adapter] = name
            merges = _identity(module, own) not in merged
            merged.add(_identity(module, own))
            offset = Offset(name, projections[name], *forms[name], groups.get(name), merges)
            layers[id(module)].offsets.setdefault(adapter, {})[own] = offset

    unit = spec.unit / spec.factor if config.scale == "fan_in" else 1
    draws = config.ensemble or int(not config.init_weights)
    drawn = [random_theta(int(torch.randint(2**62, ())), spec.d) / unit for _ in range(draws)]
    theta = np.mean(drawn, axis=0) if drawn else np.zeros(spec.d)
    module, own = next(iter(users.values()))[0]
    like = next(p for p in (module._parameters.get(own), *module.parameters(), *module.buffers()) if p is not None)
    holder.add(adapter, theta, np.ones(count) / LAMBDA[config.scale], like)


def random_theta(seed: int, length: int) -> np.ndarray:
    """θ at a random start: normal numbers with a standard deviation of .2, `float64[length]`."""
    return normals(words(seed, "theta", "", length)) / 5


def _spec(config: IntrinsicConfig, count: int, shapes: Shapes) -> Spec:
    """What the projection is made from, checked before anything is allocated: the configuration can be a stranger's."""
    total = sum(shape.size for shape in shapes.values())
    if config.d <= count:
        raise ValueError(
            f"d={config.d} must exceed the number of λ, which is {count} with lambda_granularity="
            f"{config.lambda_granularity!r}. Use a larger d, a coarser granularity, or said=False."
        )
    if config.d > total:
        raise ValueError(
            f"d={config.d} is more than the {total} weights that are moved. Use d={total} at most, or target more."
        )
    length = config.d - count
    n = config.block_size or BLOCK_SIZE
    height = min(max(shape.rows for shape in shapes.values()), 16384)
    numbers = n * (height + sum(-(-shape.cols // n) for shape in shapes.values()))
    if config.projection in ("fastfood", "global") and numbers > max(NUMBERS, 16 * total):
        raise ValueError(
            f"block_size={n} needs {numbers:.2g} random numbers for the {total} weights that are moved. Use a smaller "
            "block_size, or None."
        )
    return Spec(length, config.seed, n, config.scale, LAMBDA[config.scale] if config.said else 1, config.subspace)


def _name_the_rest(model: nn.Module, users: Users, config: IntrinsicConfig) -> None:
    """Say once which parameters stay still although every parameter was asked for."""
    if config.target_modules != "all":
        return
    sizes = {canonical(name, model): p.numel() for name, p in model.named_parameters()}
    rest = [canonical(name, model) for name, p in model.named_parameters() if not p.is_floating_point()]
    if rest := [name for name in rest if name not in users]:
        share = sum(sizes[name] for name in rest) / sum(sizes.values())
        logger.warning("Not moved, as they hold no real numbers: %s (%.2g of all parameters).", ", ".join(rest), share)


def _warn_of_running_statistics(model: nn.Module, config: IntrinsicConfig) -> None:
    """Warn that training changes the base model beside θ: in statistics that no adapter file holds, LoRA's neither."""
    names = [
        key
        for key, module in base_modules(model)
        if isinstance(module, _NormBase) and module.running_mean is not None
        if not inside(config.full_modules or (), key)
    ]
    if names:
        warnings.warn(
            f"Training updates the running statistics of {len(names)} modules ({', '.join(names[:3])}"
            f"{', …' if len(names) > 3 else ''}), which are not part of the adapter: a reloaded adapter runs with the "
            "base model's. Save these modules with the adapter (modules_to_save=[their names]), or keep them in "
            "evaluation mode (module.eval() after each model.train()).",
            stacklevel=2,
        )


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Parent and name of every module, by the module's id."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                found.setdefault(id(child), []).append((parent, name))
    return found


def check_replaceable(places: Iterable[tuple[nn.Module, str]]) -> None:
    """Raises ValueError: a layer was compiled by itself, so that what replaces it would not be called."""
    for parent, name in places:
        if name == "_orig_mod":
            raise ValueError(
                f"{parent} was compiled by itself, and its compiled code would not call the adapter. Compile the "
                "module that contains it, or compile after attaching the adapter."
            )


def _layers(model: nn.Module, holder: IntrinsicVector, modules: Iterable[nn.Module]) -> dict[int, IntrinsicLayer]:
    """The tuner layer of each base module, by the module's id, made where it is missing.

    Linear layers and embeddings are wrapped, under every name that they have. All others keep their place.
    """
    known = [module for module in model.modules() if isinstance(module, IntrinsicLayer)]
    layers: dict[int, Any] = {id(layer.get_base_layer()): layer for layer in known}
    places = _places(model)
    for module in modules:
        if id(module) in layers:
            continue
        kind = IntrinsicLinear if is_linear(module) else IntrinsicEmbedding if is_embedding(module) else None
        at = places.get(id(module), [])
        if kind is None or not at:  # the root has no place
            layers[id(module)] = IntrinsicParameters(module, holder)
            continue
        check_replaceable(at)
        layers[id(module)] = layer = kind(module, holder)
        for parent, name in at:
            setattr(parent, name, layer)
    return layers


def unwrap(model: nn.Module, layers: Iterable[Any]) -> None:
    """Give base modules their places and classes back."""
    places = _places(model)
    for layer in layers:
        if isinstance(layer, IntrinsicParameters):
            layer.remove()
        elif isinstance(layer, IntrinsicModule):
            for parent, name in places.get(id(layer), []):
                setattr(parent, name, layer.base_layer)


def detach(model: nn.Module, adapter: str) -> None:
    """Undo a failed attachment."""
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
    holder: Any = getattr(model, HOLDER, None)
    if isinstance(holder, IntrinsicVector) and not holder.intrinsic_theta:
        remove_holder(model)


def _tie_weights(model: Any, *args: Any, **kwargs: Any) -> None:
    """transformers' call, which looks parameters up by the names that they have in the plain model."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, IntrinsicLayer)]
    places = _places(model)
    with ExitStack() as stack:
        for layer in layers:
            if isinstance(layer, IntrinsicParameters):
                stack.enter_context(layer.absent())
            for parent, name in places[id(layer)] if isinstance(layer, IntrinsicModule) else ():
                stack.callback(setattr, parent, name, layer)
                setattr(parent, name, layer.base_layer)
        type(model).tie_weights(model, *args, **kwargs)


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' call, which repeats each sample for its beams and returned sequences."""
    settings = [kwargs.get("generation_config"), *args[1:2], getattr(model, "generation_config", None)]
    options = ("num_beams", "num_return_sequences")
    given = [kwargs.get(name) or next((v for s in settings if (v := getattr(s, name, None))), 1) for name in options]
    with getattr(model, HOLDER).choices.repeating(max(given)):
        return type(model).generate(model, *args, **kwargs)


def _add_holder(model: nn.Module) -> None:
    setattr(model, HOLDER, IntrinsicVector(model))
    if hasattr(type(model), "generate") and "generate" not in model.__dict__:
        model.__dict__["generate"] = partial(_generate, model)
    if hasattr(model, "tie_weights"):
        model.__dict__["tie_weights"] = partial(_tie_weights, model)
    if isinstance(model, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        kind: Any = type(model)
        model.__class__ = _without_holder(kind)


def remove_holder(model: nn.Module) -> None:
    """Take θ and λ off the model."""
    holder: Any = model.get_submodule(HOLDER)
    holder.detach_from(model)
    model.__dict__.pop("tie_weights", None)
    if getattr(model.__dict__.get("generate"), "func", None) is _generate:
        del model.__dict__["generate"]
    if isinstance(model, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        model.__class__ = type(model).__mro__[1]


@cache
def _without_holder(kind: Any) -> Any:
    """A container that runs or counts its items, without the holder among them."""

    def items(module: Any) -> dict[str, nn.Module]:
        return {name: child for name, child in module._modules.items() if name != HOLDER}

    members: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__len__": lambda module: len(items(module)),
        "__reduce_ex__": lambda module, protocol: (_container, (kind,), kind.__reduce_ex__(module, 2)[2]),
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


def _container(kind: Any) -> nn.Module:
    subclass = _without_holder(kind)
    return subclass.__new__(subclass)


def name_outermost(model: nn.Module, config: IntrinsicConfig) -> None:
    """Spell `modules_to_save` out where a name fits a module and others inside it, such as BERT's embeddings.

    PEFT compares ends of names. It would copy the inner modules within the copy of the outer one, and could not load
    what it saves.

    Raises:
        ValueError: the outer module's whole name is the end of an inner one's.
    """
    names = config.full_modules or ()
    keys = [key for key, _ in base_modules(model) if key and key.endswith(tuple(names))] if names else []
    outer = [key for key in keys if not any(key.startswith(f"{other}.") for other in keys)]
    if len(outer) == len(keys):
        return
    if again := [key for key in keys if key not in outer and key.endswith(tuple(outer))]:
        raise ValueError(
            f"modules_to_save={list(names)} fits {', '.join(outer)} and {', '.join(again)} inside. Name the inner "
            "modules."
        )
    config.modules_to_save = outer
