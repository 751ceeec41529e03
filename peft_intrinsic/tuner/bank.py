"""Adapters for every sample of a batch, by name among the attached ones or by index from a bank of thousands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft import load_peft_weights
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .batch_first import without_samples
from .batches import Choices, Route
from .config import IntrinsicConfig
from .files import read_vectors
from .layer import find_adapter

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
        routes.append(_route(vector, like, torch.stack([members.get(name, zeros) for name in names])))
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


def _with_names(module: nn.Module, args: Any, kwargs: Any, names: list[str], choices: Choices) -> tuple[Any, Any]:
    return args, kwargs if choices.proving else {**kwargs, "adapter_names": names}


def _route(vector: Any, adapter: str, vectors: torch.Tensor) -> Route:
    """Split the trainable parameters of the samples, `[batch, d]`, into θ and λ."""
    length = len(vector.intrinsic_theta[adapter].weight)
    return Route(adapter, vectors[:, :length], vectors[:, length:])


def _check_full(config: IntrinsicConfig, what: str) -> None:
    if config.trained_beside:
        raise ValueError(
            f"{config.trained_beside} of {what}: a bank stores d parameters per adapter and one base model for all. "
            "Train without this option, or attach the adapters and pass adapter_names."
        )


class AdapterBank:
    """K adapters of one projection as one tensor, selected by index for each sample of a batch.

    G and H of the projection do not depend on θ, so a batch with as many adapters as samples costs about as much as
    one adapter. The model has a single attached adapter, whose projection all of them use.

    Args:
        model: a `PeftModel` with an intrinsic adapter.
        vectors: θ and then λ of each adapter, `[K, d]`. A row of zeros is the base model.
        adapter: name of the attached adapter with the projection; by default the active one.

    Raises:
        ValueError: the vectors do not have d columns, an adapted module cannot be mixed, the adapter has fully trained
            modules, or it is not attached.

    Example:
        >>> bank = AdapterBank.from_pretrained(model, ["users/ann", "users/bob"])
        >>> with bank.select([0, 1, 1, -1]):  # −1: the base model
        ...     model.generate(**inputs)  # 4 prompts
    """

    def __init__(self, model: Any, vectors: torch.Tensor, adapter: str | None = None) -> None:
        self.model = model
        self.adapter = find_adapter(model, adapter)
        config = model.peft_config[self.adapter]
        if vectors.dim() != 2 or vectors.shape[1] != config.d:
            raise ValueError(
                f"vectors must have the shape [K, {config.d}] for adapter {self.adapter!r}, got {tuple(vectors.shape)}."
            )
        _check_full(config, f"adapter {self.adapter!r}")
        self._vector: Any = model.base_model.vector
        self._config, self._layers = config, model.base_model.tuner_layers()
        check_mixable(model.get_base_model(), self._layers, {self.adapter})
        self.vectors = vectors.to(self._vector.concatenate(self.adapter))

    @classmethod
    def from_pretrained(cls, model: Any, paths: Sequence[str], adapter: str | None = None) -> AdapterBank:
        """Load saved adapters into a bank.

        Args:
            model: a `PeftModel` with an intrinsic adapter.
            paths: folders or names on the Hub. Row k of the bank is `paths[k]`.
            adapter: name of the attached adapter with the projection; by default the active one.

        Raises:
            ValueError: an adapter has another projection than the attached one. The error lists the options.
        """
        own = model.peft_config[adapter or model.active_adapter]
        rows = []
        for path in paths:
            config = IntrinsicConfig.from_pretrained(path)
            _check_full(config, path)
            if unlike := own.differences(config):
                raise ValueError(f"{path} cannot join the bank: it differs from the attached adapter in {unlike}.")
            weights = load_peft_weights(path, device="cpu")
            rows.append(torch.cat(read_vectors(config, weights)).float())
        return cls(model, torch.stack(rows), adapter)

    @contextmanager
    def select(self, index: Sequence[int] | torch.Tensor) -> Iterator[None]:
        """Within this context, sample i of a batch uses the adapter `index[i]`.

        In training, gradients reach the rows of the bank that the batch uses, if these require gradients. The adapter
        of the model is not trained. Each coroutine and each thread has its own choice. Beam search and several returned
        sequences repeat samples automatically.

        Args:
            index: rows of the bank, `int[batch]`; −1 is the base model.

        Raises:
            IndexError: an index is not in the bank.
            ValueError: an adapter is merged, the active one has fully trained modules, or the one with the projection
                is no longer attached.
        """
        if self.model.peft_config.get(self.adapter) is not self._config:
            raise ValueError(
                f"Adapter {self.adapter!r} with the projection of the bank is no longer attached. Make a new bank."
            )
        for name in self.model.active_adapters:
            _check_full(self.model.peft_config[name], f"the active adapter {name!r}")
        check_mixable(self.model.get_base_model(), self._layers, set())
        chosen = torch.as_tensor(index, device=self.vectors.device)
        if chosen.dim() != 1 or (chosen < -1).any() or (chosen >= len(self.vectors)).any():
            raise IndexError(
                f"index must be a list of −1 to {len(self.vectors) - 1}, one for each sample, got {index}."
            )
        (own,) = torch.where(chosen >= 0)
        vectors = self.vectors.new_zeros(len(chosen), self.vectors.shape[1]).index_copy(
            0, own, self.vectors[chosen[own]]
        )
        with self._vector.choices.use([_route(self._vector, self.adapter, vectors)]):
            yield
