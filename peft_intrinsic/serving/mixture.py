"""Stored adapters, of several projections, on one model in memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model

from ..codec import read_packed
from ..codec.adapter import make_config
from ..tuner import AdapterBank, IntrinsicConfig
from ..tuner.base_model import base_digest, base_parameters
from ..tuner.head import explain_labels
from .saved import is_packed, read_saved
from .store import Stored

MAX_KINDS = 8
"""Number of projections that are attached at a time."""

ALIKE = ("label_sketch", "value_sketch", "num_labels", "task_type")
"""Options that must agree too, so that the checks of an attached adapter hold for another one."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A stored adapter.

    Args:
        config: its options, as stored.
        vectors: θ, and λ if there is one, in float32.
        digest: digest of its base model; None if it is not stored.
    """

    config: IntrinsicConfig
    vectors: list[torch.Tensor]
    digest: bytes | None

    def is_like(self, other: Adapter) -> bool:
        """Whether θ means the same in both, and has the same shape."""
        same = all(getattr(self.config, name) == getattr(other.config, name) for name in ALIKE)
        same = same and [each.shape for each in self.vectors] == [each.shape for each in other.vectors]
        return same and self.digest == other.digest and not self.config.differences(other.config)


class Mixture:
    """A base model whose samples have stored adapters. Each projection is attached once, and has θ = 0 there.

    Args:
        root: base model. It gets the layers of the tuner, and is in evaluation mode afterwards.
    """

    def __init__(self, root: Any) -> None:
        self.root = root.eval()
        self._names = list(base_parameters(root))
        self._task = "CAUSAL_LM" if root.can_generate() else "SEQ_CLS"
        self._model: Any = None
        self._kinds: dict[str, Adapter] = {}  # by name of the attached adapter: the first one of each projection
        self._count = 0

    def read(self, stored: Stored) -> Adapter:
        """Read a stored adapter. It need not fit the base model.

        Raises:
            ValueError: it is damaged, of another method or task, trains more than θ and λ, or exceeds float32.
        """
        digest = None
        if is_packed(stored):
            packed = read_packed(stored)
            config, digest = make_config(packed, self._names), packed.base_digest
            vectors = [torch.from_numpy(each) for each in (packed.theta, packed.scales) if len(each)]
        else:
            config, vectors = read_saved(stored)
        vectors = [each.float() for each in vectors]
        if not all(each.isfinite().all() for each in vectors):  # such a row would fail its whole batch
            raise ValueError("θ or λ has NaN or infinite values in float32. Train it with a lower learning rate.")
        if config.trained_beside:
            raise ValueError(f"It trains {config.trained_beside} beside θ. Train it without this option.")
        if config.task_type not in (None, self._task):
            raise ValueError(f"It has the task {config.task_type}, and the server has {self._task}.")
        return Adapter(config, vectors, digest)

    def attach(self, adapter: Adapter) -> str:
        """Attach the projection of an adapter, unless it is attached already.

        Returns:
            The name of the projection for `select` and `has`.

        Raises:
            ValueError: the adapter is not one of this base model, or adapts what samples of a batch cannot have apart.
        """
        if (kind := next((kind for kind in self._kinds if self.has(kind, adapter)), None)) is not None:
            self._kinds[kind] = self._kinds.pop(kind)  # the last one used is the last one deleted
            return kind
        config = copy.deepcopy(adapter.config)
        if labels := explain_labels(config.num_labels, self.root, config.task_type):
            raise ValueError(labels)
        if adapter.digest not in (None, here := base_digest(self.root, config.reinitialized or ())):
            raise ValueError(
                f"It was made for a base model with digest {adapter.digest.hex()}, and that of the server is "
                f"{here.hex()}. Pack an adapter that was trained on this model."
            )
        if len(self._kinds) == MAX_KINDS:
            self._detach(next(iter(self._kinds)))
        self._count += 1
        kind = f"kind_{self._count}"
        if self._model is None:
            self._model = get_peft_model(self.root, config, kind)
        else:
            self._model.add_adapter(kind, config)
        self._model.eval()
        self._kinds[kind] = adapter
        try:
            vector = self.root.intrinsic
            own = [each[kind].weight for each in (vector.intrinsic_theta, vector.intrinsic_lambda) if kind in each]
            if (shapes := [list(each.shape) for each in own]) != (stored := [list(v.shape) for v in adapter.vectors]):
                raise ValueError(f"Its θ and λ have the shapes {stored} instead of {shapes}. Save it again.")
            own[0].data.zero_()
            with self.select(kind, [adapter]):
                pass
        except Exception:
            self._detach(kind)
            raise
        return kind

    def has(self, kind: str, adapter: Adapter) -> bool:
        """Whether an adapter has an attached projection."""
        return self._kinds[kind].is_like(adapter)

    def select(self, kind: str | None, adapters: Sequence[Adapter | None]) -> AbstractContextManager[None]:
        """Within the context, sample i of a batch has `adapters[i]`, all of one projection; None is the base model."""
        if not self._kinds:
            return nullcontext()
        kind = kind or next(iter(self._kinds))
        zeros = torch.zeros(self._kinds[kind].config.d)
        rows = [zeros if adapter is None else torch.cat(adapter.vectors) for adapter in adapters]
        index = [-1 if adapter is None else row for row, adapter in enumerate(adapters)]
        return AdapterBank(self._model, torch.stack(rows), kind).select(index)

    def _detach(self, kind: str) -> None:
        del self._kinds[kind]
        if self._kinds:
            self._model.set_adapter(next(iter(self._kinds)))  # PEFT warns where the active one is deleted
            self._model.delete_adapter(kind)
        else:
            self._model.unload()
            self._model = None
