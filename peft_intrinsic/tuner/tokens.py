"""Rows of embeddings that are fully trained beside θ (`trainable_token_indices`, as in LoRA)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft.utils.other import TrainableTokensWrapper
from torch import nn

from .base_model import base_modules
from .names import named
from .targets import Targeting


def token_rows(model: nn.Module, config: Any) -> dict[str, Sequence[int]]:
    """The trained rows of each embedding, by the embedding's name in the base model.

    Raises:
        ValueError, TypeError: `trainable_token_indices` names no embedding, or rows that it does not have.
    """
    option = config.trainable_token_indices
    if not option:
        return {}
    if isinstance(option, Mapping):
        given = dict(option)
    else:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        embedding = getattr(embedding, "original_module", embedding)
        inputs = [key for key, module in base_modules(model) if module is embedding]
        if not inputs:
            raise ValueError(
                f"trainable_token_indices={option!r}: the input embedding of the model is unknown. Pass "
                "a dictionary: {'name of the embedding': indices}."
            )
        given = {inputs[0]: option}
    result: dict[str, Sequence[int]] = {}
    for name, rows in given.items():
        found = {key: module for key, module in base_modules(model) if named([name], key)}
        sizes = {getattr(module, "num_embeddings", getattr(module, "out_features", 0)) for module in found.values()}
        if not found or 0 in sizes:
            raise ValueError(f"trainable_token_indices={option!r}: the model has no embedding {name!r}. Name one.")
        if isinstance(rows, str) or not all(type(row) is int for row in rows):
            raise TypeError(f"trainable_token_indices={option!r} must hold a list of ints for {name!r}.")
        if not rows or len(set(rows)) < len(rows) or not all(0 <= row < min(sizes) for row in rows):
            raise ValueError(
                f"trainable_token_indices={option!r}: the rows of {name!r} must be different indices from 0 to "
                f"{min(sizes) - 1}, at least one."
            )
        result |= dict.fromkeys(found, rows)
    return result


def check_not_adapted(model: nn.Module, targeting: Targeting, config: Any) -> None:
    """Raise ValueError if P would adapt an embedding with trained rows, where the offset would be lost."""
    adapted = {module for users in targeting.users.values() for module, _ in users}
    for key, module in model.named_modules():
        if isinstance(module, TrainableTokensWrapper) and module.original_module in adapted:
            raise ValueError(
                f"trainable_token_indices={config.trainable_token_indices!r}: P adapts {key} too. Exclude it: "
                f"exclude_modules=['{key}']."
            )
