"""`serving="lora"`: options under which everything that is adapted is exactly a LoRA."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

from torch import nn

from .base_model import base_modules
from .module_types import adaptable_names, is_embedding, is_linear
from .names import KEYWORDS, is_named, kind_of
from .targets import HEAD_NAMES, adaptable_parameters, is_excluded, is_head, is_targeted, output_embeddings

logger = logging.getLogger(__name__)

LORA_BLOCK_SIZE = 8
"""Block size of Fastfood, and so the rank of a LoRA on linear layers."""

LOW_RANK = ("fastfood", "global", "value_lora")
"""Projections whose offsets of linear layers and embeddings are products of two small matrices."""


def check_lora_options(model: nn.Module, config: Any) -> None:
    """Check that no option selects what a LoRA cannot represent, or what servers of LoRAs do not take.

    Raises:
        ValueError: an option does. The error names it.
    """
    keywords = () if config.projection == "value_lora" else KEYWORDS  # which adapts values alone, whatever is selected
    heads = [key for key, module in base_modules(model) if is_head(config, key) and adaptable_names(module)]
    reasons = {
        "projection": config.projection not in LOW_RANK and "a LoRA cannot represent its offsets",
        "add_bias": config.add_bias and "a LoRA has no biases",
        "target_modules": config.target_modules in keywords and "a LoRA has no norms and biases",
        "modules_to_save": config.full_modules and "servers of LoRAs take no fully trained modules",
        "trainable_token_indices": config.trainable_token_indices and "servers of LoRAs take no trained rows",
        "head": heads and f"it adapts {', '.join(heads)}, and servers of LoRAs take no heads (head='keep' freezes it)",
    }
    for name, reason in reasons.items():
        if reason:
            raise ValueError(
                f"{name}={getattr(config, name)!r} does not go with serving='lora': {reason}. Change it, or leave out "
                "serving='lora' and serve the adapter with peft-intrinsic serve."
            )


def select_for_lora(model: nn.Module, config: Any) -> None:
    """Set the block size, and `target_parameters` to the weights of the selected linear layers and embeddings.

    Without options that select any, these are all linear layers but heads and output embeddings. Other parameters stay
    frozen and are reported.

    Raises:
        ValueError: the options select a parameter that a LoRA cannot represent, or select none that it can.
    """
    given = f"target_modules={config.target_modules!r}, target_parameters={config.target_parameters!r}"
    named, heads = config.target_parameters or (), HEAD_NAMES.get(config.task_type or "", ())
    output = output_embeddings(model)
    every = config.target_modules == "all-linear" or (config.target_modules is None and not named)
    scope = copy.copy(config)
    if every:
        scope.target_modules = scope.target_parameters = None
    chosen: list[str] = []
    others: list[str] = []
    frozen: list[str] = []
    for key, module, own in adaptable_parameters(model, config):
        name = f"{key}.{own}" if key else own
        by_name, by_module = is_named(named, name), is_targeted(scope, key) and not is_excluded(config, key)
        if key and own == "weight" and (is_linear(module) or is_embedding(module)):
            inner = is_linear(module) and key != output and key.partition(".")[0] not in heads
            (chosen if by_name or (by_module and (inner or not every)) else others).append(name)
            continue
        others.append(name)
        if by_name or (by_module and not every and not is_linear(module)):
            raise ValueError(
                f"{given} does not go with serving='lora': a LoRA cannot represent {name}, which it selects. Select "
                "linear layers and embeddings."
            )
        if by_module:
            frozen.append(kind_of(name))
    if not chosen:
        raise ValueError(f"{given} selects no linear layer or embedding, as serving='lora' requires. Name some.")
    config.target_modules, config.target_parameters = None, _shorten(chosen, others)
    config.block_size = config.block_size or LORA_BLOCK_SIZE
    if frozen:
        logger.info("Not adapted (a LoRA cannot represent them): %s", ", ".join(dict.fromkeys(frozen)))


def _shorten(chosen: list[str], others: list[str]) -> list[str]:
    """The shortest ends of names that are ends of no others, each once. One end can fit many names.

    Raises:
        ValueError: a whole name is the end of another one.
    """
    taken = {end for name in others for end in _ends(name)}
    ends = {name: next((end for end in _ends(name) if end not in taken), None) for name in chosen}
    if same := [name for name, end in ends.items() if end is None]:
        raise ValueError(
            f"serving='lora' cannot adapt {same[0]} alone: the name of another parameter ends alike. Rename the module."
        )
    return list(dict.fromkeys(filter(None, ends.values())))


def _ends(name: str) -> Iterator[str]:
    """Ends of a parameter's name, from that with one module to the whole name."""
    parts = name.split(".")
    return (".".join(parts[i:]) for i in range(max(0, len(parts) - 2), -1, -1))
