"""Which parameters are moved, under which name and shape, and in which λ group."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import _ExcludedModule
from torch import nn

from .module_types import is_linear, is_vector, movable
from .names import KEYWORDS, block_of, canonical, fits, foreign, inside, named


def output_module(model: Any) -> str | None:
    """Name of the module that turns hidden states into words, as transformers knows it."""
    try:
        output = getattr(model, "get_output_embeddings", lambda: None)()
    except NotImplementedError:  # its inner model is wrapped
        return None
    return next((canonical(name, model) for name, module in model.named_modules() if module is output), None)


def candidates(config: Any, key: str, module: nn.Module) -> list[str]:
    """What `movable` names, and the bias that a linear layer lacks, where the configuration adds it."""
    bare = config.add_bias and is_linear(module) and getattr(module, "bias", None) is None
    added = bare and key not in config.head_modules and key != config.output_module
    return [*movable(module), "bias"] if added else movable(module)


def chosen(config: Any, key: str, module: nn.Module) -> list[str]:
    """Which parameters of a targeted module are moved: under `"norms-and-biases"` only these, but all of the head."""
    whole = config.target_modules != "norms-and-biases" or key in config.head_modules
    found = [name for name in candidates(config, key, module) if whole or is_vector(module, name)]
    return found if key else [name for name in found if targeted(config, name) and not excluded(config, name)]


def lambda_groups(names: Iterable[str], granularity: str) -> dict[str, int]:
    """Index of the λ of each parameter. `names` come in the order of the model."""
    labels = {}
    blocks_seen = False
    for name in names:
        block = block_of(name)
        blocks_seen |= block is not None
        if granularity == "tensor":
            labels[name] = name
        elif granularity == "module":
            labels[name] = name.rpartition(".")[0]
        else:
            labels[name] = block or ("after" if blocks_seen else "before")
    index = {label: i for i, label in enumerate(dict.fromkeys(labels.values()))}
    return {name: index[label] for name, label in labels.items()}


def excluded(config: Any, key: str) -> bool:
    """Whether `exclude_modules` or `modules_to_save` keeps a module where it is."""
    left_out = config.exclude_modules or ()
    if isinstance(left_out, str) and fits("exclude_modules", left_out, key):
        return True
    return (not isinstance(left_out, str) and named(left_out, key)) or inside(config.full_modules or (), key)


def targeted(config: Any, key: str) -> bool:
    """Whether `target_modules`, `layers_to_transform` and `layers_pattern` choose a module, as in LoRA.

    Raises:
        ValueError: a regular expression takes too long.
    """
    targets = config.target_modules
    if targets in KEYWORDS:
        targets = None
    if isinstance(targets, str):
        return fits("target_modules", targets, key)
    if targets is None and config.target_parameters:
        return False
    if targets is not None and not named(map(canonical, targets), key):  # "all-linear" lists names with wrappers' parts
        return False
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    for pattern in patterns or [r"[^.]*"]:
        # The first number is the layer's; experts inside it have numbers of their own.
        for index in re.finditer(r"\.(\d+)\.", key):
            path = key[: index.start()]
            if fits("layers_pattern", rf"(?:.*\.)?(?:{pattern})", path):
                return int(index[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def matched(config: Any, key: str, model: nn.Module) -> Any:
    """Whether a configuration chooses a module, as PEFT asks it: true, false, or its mark of an excluded module.

    Raises:
        ValueError: a regular expression takes too long.
    """
    if foreign(key):
        return False
    key = canonical(key, model)
    return _ExcludedModule() if excluded(config, key) else targeted(config, key)
