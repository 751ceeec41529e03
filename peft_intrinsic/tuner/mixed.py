"""Batches in which every sample has an adapter of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import load_peft_weights
from torch import nn

from .config import IntrinsicConfig
from .layer import IntrinsicLayer, Route
from .targets import base_modules
from .vector import IntrinsicVector

BASE = "__base__"
"""PEFT's name for no adapter at all."""

_SAME = ("d", "said", "lambda_granularity", "seed", "projection", "block_size", "scale", "algorithm_version")


def differences(one: IntrinsicConfig, other: IntrinsicConfig) -> list[str]:
    """What keeps the numbers of two adapters from meaning the same: options and their values, none if they agree."""
    names = [*_SAME, "manifest", "redrawn"]
    return [
        name + (f" ({getattr(one, name)!r} and {getattr(other, name)!r})" if name in _SAME else "")
        for name in names
        if getattr(one, name) != getattr(other, name)
    ]


def check_mixable(model: nn.Module, adapters: set[str]) -> None:
    """Refuse what cannot differ from sample to sample.

    Raises:
        ValueError: an adapter is merged, or moves parameters whose module has no batched form.
    """
    stuck: list[str] = []
    names = {id(module): name for name, module in base_modules(model)}
    for name, layer in model.named_modules():
        if isinstance(layer, IntrinsicLayer) and not isinstance(layer, IntrinsicVector):
            if layer.merged:
                raise ValueError("Adapters are merged, so samples cannot differ. Call unmerge_adapter() first.")
            # Tables of relative positions are not looked up by sample.
            if not layer.mixable or "relative" in name:
                path = names[id(layer.get_base_layer())]
                moved = {own for adapter in adapters for own in layer.offsets.get(adapter, {})}
                stuck += [f"{path}.{own}".lstrip(".") for own in sorted(moved)]
    if stuck:
        raise ValueError(
            f"Samples of one batch cannot have different offsets for: {', '.join(stuck)}. Leave these out with "
            "exclude_modules, or run one batch per adapter."
        )


def routes_by_name(vector: Any, configs: Mapping[str, IntrinsicConfig], names: Sequence[str]) -> list[Route]:
    """One route for all adapters of the same projection: their numbers for their samples, zeros for the others."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for adapter in sorted(set(names) - {BASE}):
        like = next((known for known in groups if not differences(configs[known], configs[adapter])), adapter)
        groups.setdefault(like, {})[adapter] = vector.numbers(adapter)
    routes = []
    for like, members in groups.items():
        zeros = torch.zeros_like(members[like])
        routes.append(_route(vector, like, torch.stack([members.get(name, zeros) for name in names])))
    return routes


def _route(vector: Any, adapter: str, numbers: torch.Tensor) -> Route:
    """Numbers of the samples, `[batch, d]`, as θ and λ."""
    length = len(vector.intrinsic_theta[adapter].weight)
    return Route(adapter, numbers[:, :length], numbers[:, length:])


class AdapterBank:
    """K adapters of one projection as one tensor, chosen by index for each sample of a batch.

    G and H of the projection do not depend on θ, so a batch with as many adapters as samples costs about as much as
    one adapter. The model keeps a single attached adapter, which lends its projection.

    Args:
        model: a `PeftModel` with an intrinsic adapter, in evaluation mode.
        numbers: θ and then λ of each adapter, `[K, d]`. Zeros are the base model.
        adapter: the attached adapter that lends its projection; by default the active one.

    Raises:
        ValueError: `numbers` has another width than d, or a targeted module cannot be mixed.

    Example:
        >>> bank = AdapterBank.from_pretrained(model, ["users/ann", "users/bob"])
        >>> with bank.select([0, 1, 1, -1]):  # −1: the base model
        ...     model.generate(**inputs)  # 4 prompts
    """

    def __init__(self, model: Any, numbers: torch.Tensor, adapter: str | None = None) -> None:
        self.model = model
        self.adapter = adapter or model.active_adapter
        config = model.peft_config[self.adapter]
        if numbers.dim() != 2 or numbers.shape[1] != config.d:
            raise ValueError(
                f"numbers must have the shape [K, {config.d}] for adapter {self.adapter!r}, got {tuple(numbers.shape)}."
            )
        self._vector: Any = model.get_base_model().get_submodule("intrinsic")
        check_mixable(model.get_base_model(), {self.adapter})
        self.numbers = numbers.to(self._vector.numbers(self.adapter))

    @classmethod
    def from_pretrained(cls, model: Any, paths: Sequence[str], adapter: str | None = None) -> AdapterBank:
        """A bank of saved adapters: folders or names on the Hub. Row k is `paths[k]`.

        Raises:
            ValueError: an adapter has another projection than the attached one; the message names the options.
        """
        own = model.peft_config[adapter or model.active_adapter]
        rows = []
        for path in paths:
            config = IntrinsicConfig.from_pretrained(path)
            if unlike := differences(own, config):
                raise ValueError(f"{path} cannot join the bank: it differs from the attached adapter in {unlike}.")
            weights = load_peft_weights(path, device="cpu")
            ordered = [value for key in ("theta", "lambda") for name, value in weights.items() if f"_{key}." in name]
            rows.append(torch.cat(ordered).float())
        return cls(model, torch.stack(rows), adapter)

    @contextmanager
    def select(self, index: Sequence[int] | torch.Tensor) -> Iterator[None]:
        """Within this context and thread, sample i of a batch has the adapter `index[i]`; −1 is the base model.

        Beam search and several returned sequences repeat samples by themselves.

        Raises:
            IndexError: an index is not in the bank.
            ValueError: the model is in training mode.
        """
        chosen = torch.as_tensor(index, device=self.numbers.device)
        if chosen.dim() != 1 or (chosen < -1).any() or (chosen >= len(self.numbers)).any():
            raise IndexError(
                f"index must be a list of −1 to {len(self.numbers) - 1}, one for each sample, got {index}."
            )
        if self.model.training:
            raise ValueError("The model is in training mode; mixed batches are for inference. Call model.eval() first.")
        numbers = torch.where(chosen[:, None] < 0, 0, self.numbers[chosen.clamp(min=0)])
        with self._vector.routed([_route(self._vector, self.adapter, numbers)]):
            yield
