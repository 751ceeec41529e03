"""What the tuner's layers share: offsets, numbers of each sample, effective parameters, merging."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from ..projection import TensorProjection
from .merging import kept, read, restore, write


@dataclass(frozen=True)
class Offset:
    """One parameter's share of P.

    Args:
        projection: its rows of P, with the parameter seen as a matrix `[rows, cols]`.
        shape: of the parameter itself.
        transposed: the matrix is the parameter's transpose (Conv1D of GPT-2).
        group: index of its λ, or None.
        merges: whether this module does the merging of a parameter that several share.
    """

    projection: TensorProjection
    shape: tuple[int, ...]
    transposed: bool
    group: int | None
    merges: bool

    def materialise(self, theta: torch.Tensor) -> torch.Tensor:
        """`[d] -> shape`, or `[batch, d] -> [batch, *shape]`."""
        matrix = self.projection.materialise(theta)
        return matrix.mT if self.transposed else matrix.view((*theta.shape[:-1], *self.shape))


@dataclass(frozen=True)
class Route:
    """Numbers of its own for every sample of a batch, in the projection of one adapter.

    Args:
        adapter: whose projection.
        theta: `[batch, d − m]`.
        scales: λ, `[batch, m]`.
    """

    adapter: str
    theta: torch.Tensor
    scales: torch.Tensor

    def scaled(self, group: int | None) -> torch.Tensor:
        """θ, or λ_group · θ, of every sample: `[batch, d − m]`."""
        return self.theta if group is None else self.theta * self.scales[:, group, None]


class _Current(threading.local):
    """The routes that are in force, by the holder they are for: each thread has its own."""

    def __init__(self) -> None:
        self.routes: dict[nn.Module, list[Route]] = {}


CURRENT = _Current()
_SHADOWING = threading.RLock()


@contextmanager
def shadowed(module: nn.Module, values: Mapping[str, torch.Tensor | None]) -> Iterator[None]:
    """Let readers of `module` see `values` in place of its parameters.

    An entry in the instance dictionary is found before `nn.Module` looks among the parameters. Unlike
    `torch.func.functional_call`, this also holds under FSDP 1, which keeps its views there.
    """
    hidden = {name: module.__dict__[name] for name in values if name in module.__dict__}
    module.__dict__.update(values)
    if "_flat_weights" in module.__dict__:  # recurrent layers of torch read this list
        flat = module.__dict__["_flat_weights"]
        module.__dict__["_flat_weights"] = [getattr(module, name) for name in module.__dict__["_flat_weights_names"]]
    try:
        yield
    finally:
        for name in values:
            module.__dict__.pop(name, None)
        module.__dict__.update(hidden)
        if "_flat_weights" in module.__dict__:
            module.__dict__["_flat_weights"] = flat


class IntrinsicLayer(BaseTunerLayer):
    """What all tuner layers share: which offsets they apply for which adapter, and merging."""

    other_param_names: tuple[str, ...] = ("offsets",)
    mixable = False  # whether the samples of a batch can have different adapters

    def __init__(self, vector: Any) -> None:
        self.offsets: dict[str, dict[str, Offset]] = {}
        self.merged_adapters: list[str] = []
        self.rounding = (0.0, 0.0)  # squared norms: what merging lost of the offsets, and the offsets
        self._originals: dict[str, Any] = {}
        self._vector = (vector,)  # in a tuple: the holder must not become a sub-module of every layer

    @property
    def vector(self) -> Any:
        """The holder of θ and λ."""
        return self._vector[0]

    def _get_available_adapters(self) -> set[str]:
        return set(self.offsets)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Nothing to move: θ lives on the holder."""

    def enable_adapters(self, enabled: bool) -> None:
        """As in PEFT, but unmerge at once: a tied parameter has one owner, which a forward pass need not visit."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    def _applied(self) -> list[tuple[str, Offset, torch.Tensor]]:
        """Parameter name, offset and λθ of everything that a forward pass adds. λθ of routes is `[batch, d − m]`."""
        if self.disable_adapters or self.merged:
            return []
        vector = self.vector
        routes = CURRENT.routes.get(vector)
        if routes is not None:
            return [
                (name, offset, route.scaled(offset.group))
                for route in routes
                for name, offset in self.offsets.get(route.adapter, {}).items()
            ]
        return [
            (name, offset, vector.scaled(adapter, offset.group))
            for adapter in self.active_adapters
            for name, offset in self.offsets.get(adapter, {}).items()
        ]

    def get_delta_weight(self, adapter: str, parameter: str = "weight") -> torch.Tensor:
        """The offset of one parameter, λ included, in its own shape: float32.

        Raises:
            KeyError: the adapter does not move that parameter of this layer.
        """
        offset = self.offsets[adapter][parameter]
        return offset.materialise(self.vector.scaled(adapter, offset.group).float())

    def _effective(self) -> dict[str, torch.Tensor]:
        """The moved parameters with their offsets added, in their own dtype."""
        values: dict[str, torch.Tensor] = {}
        for name, offset, theta in self._applied():
            base = values.get(name, getattr(self.get_base_layer(), name))
            values[name] = base + offset.materialise(theta.to(base.device)).to(base.dtype)
        return values

    @contextmanager
    def _in_place(self, values: Mapping[str, torch.Tensor | None] | None = None) -> Iterator[None]:
        """`values`, or the effective parameters, in place of the base ones: in one thread at a time."""
        with nullcontext() if torch.compiler.is_compiling() else _SHADOWING:
            values = self._effective() if values is None else values
            with shadowed(self.get_base_layer(), values):
                yield

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the offsets to the base parameters. The originals are kept, so that `unmerge` is exact.

        Raises:
            ValueError: with `safe_merge`, a merged parameter would not be finite; or the base is quantised in a way
                that PEFT cannot merge into.
        """
        adapters = [a for a in check_adapters_to_merge(self, adapter_names) if a in self.offsets]
        deltas: dict[str, torch.Tensor] = {}
        for adapter in adapters:
            for name, offset in self.offsets[adapter].items():
                if offset.merges:
                    delta = self.get_delta_weight(adapter, name)
                    deltas[name] = deltas[name] + delta if name in deltas else delta
        lost, whole = self.rounding
        for name, delta in deltas.items():
            base = read(self, name)
            delta = delta.to(base.device)
            merged = (base + delta).to(base.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"Merging {adapters} would give NaN or infinite weights. Is θ sound?")
            self._originals.setdefault(name, kept(self, name))
            write(self, name, merged)
            lost += float((read(self, name).float() - base.float() - delta).square().sum())
            whole += float(delta.square().sum())
        self.rounding = lost, whole
        self.merged_adapters += adapters

    def unmerge(self) -> None:
        """Put the original parameters back, to the bit."""
        for name, original in self._originals.items():
            restore(self, name, original)
        self._originals, self.rounding = {}, (0.0, 0.0)
        self.merged_adapters = []
