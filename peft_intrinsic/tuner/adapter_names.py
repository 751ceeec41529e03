"""Mixed batches by PEFT's `adapter_names`: every sample names one of the attached adapters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .batch_first import without_samples
from .batches import Choices, Route
from .config import IntrinsicConfig

BASE = "__base__"
"""PEFT's name for the base model without an adapter."""


def check_mixable(root: nn.Module, layers: Iterable[Any], adapters: set[str]) -> None:
    """Check that all adapted parameters can differ between samples.

    Raises:
        ValueError: an adapter is merged, or adapts modules without a batched form or whose rows are not the samples.
    """
    unbatched: list[str] = []
    inputs = without_samples(root)
    others: list[str] = []
    for layer in layers:
        if layer.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        adapted = {offset.name for adapter in adapters for offset in layer.offsets.get(adapter, {}).values()}
        # Tables of relative positions are looked up once for all samples.
        unbatched += sorted(name for name in adapted if not layer.mixable or "relative" in name)
        others += sorted(adapted) if layer.get_base_layer() in inputs else []
    if unbatched:
        raise ValueError(
            f"Samples of one batch cannot have different offsets for: {', '.join(unbatched)}. Leave these out with "
            "exclude_modules, or run one batch per adapter."
        )
    if others:
        raise ValueError(
            f"{type(root).__name__} takes several kinds of input, and the rows of these modules need not be the "
            f"samples (one sample may have several images): {', '.join(others)}. Leave them out with exclude_modules, "
            "or run one batch per adapter."
        )


def routes_by_name(vector: Any, configs: Mapping[str, IntrinsicConfig], names: Sequence[str]) -> list[Route]:
    """One route for all adapters of the same projection: its rows are θ and λ of each sample, or zeros."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for adapter in sorted(set(names) - {BASE}):
        like = next((known for known in groups if not configs[known].differences(configs[adapter])), adapter)
        groups.setdefault(like, {})[adapter] = vector.concatenate(adapter)
    routes = []
    for like, members in groups.items():
        zeros = torch.zeros_like(members[like])
        routes.append(make_route(vector, like, torch.stack([members.get(name, zeros) for name in names])))
    return routes


@contextmanager
def select_by_name(tuner: Any, names: Sequence[str], batch: int) -> Iterator[None]:
    """Apply PEFT's `adapter_names`: sample i of the batch uses the attached adapter `names[i]`.

    Raises:
        ValueError: the model is in training mode, a name is unknown, or an adapted module cannot be mixed.
    """
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first.")
    if unknown := sorted(set(names) - {BASE, *tuner.peft_config}):
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. Attached: {list(tuner.peft_config)}."
        )
    if batch != len(names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {batch} respectively. Name one per sample."
        )
    check_mixable(tuner.model, tuner.tuner_layers(), set(names))
    with ExitStack() as stack:
        for module in tuner.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):  # modules_to_save
                hook = partial(_with_names, names=list(names), choices=tuner.vector.choices)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        stack.enter_context(tuner.vector.choices.use(routes_by_name(tuner.vector, tuner.peft_config, names)))
        yield


def _with_names(module: Any, args: Any, kwargs: Any, names: list[str], choices: Choices) -> tuple[Any, Any]:
    own = [name if name in module._adapters else BASE for name in names]
    return args, kwargs if choices.proving else {**kwargs, "adapter_names": own}


def make_route(vector: Any, adapter: str, vectors: torch.Tensor) -> Route:
    """Split the trainable parameters of the samples, `[batch, d]`, into θ and λ."""
    length = len(vector.intrinsic_theta[adapter].weight)
    return Route(adapter, vectors[:, :length], vectors[:, length:])
