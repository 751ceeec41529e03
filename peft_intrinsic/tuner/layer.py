"""The tuner's layers: one holder of θ and λ on the root of the model, and a wrapper or hook per targeted module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from ..projection import TensorProjection


class Vector(nn.Module):
    """A parameter behind a call, so that offloading and sharding hooks see when it is used."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values)

    def forward(self) -> torch.Tensor:
        return self.weight


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
        """`[d] -> shape`."""
        matrix = self.projection.materialise(theta)
        return matrix.T if self.transposed else matrix.view(self.shape)


@contextmanager
def shadowed(module: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let readers of `module` see `values` in place of its parameters.

    An entry in the instance dictionary is found before `nn.Module` looks among the parameters. Unlike
    `torch.func.functional_call`, this also holds under FSDP 1, which keeps its views there.
    """
    hidden = {name: module.__dict__[name] for name in values if name in module.__dict__}
    module.__dict__.update(values)
    try:
        yield
    finally:
        for name in values:
            module.__dict__.pop(name, None)
        module.__dict__.update(hidden)


class IntrinsicLayer(BaseTunerLayer):
    """What all tuner layers share: which offsets they apply for which adapter, and merging."""

    other_param_names: tuple[str, ...] = ("offsets",)

    def __init__(self, vector: Any) -> None:
        self.offsets: dict[str, dict[str, Offset]] = {}
        self.merged_adapters: list[str] = []
        self._originals: dict[str, torch.Tensor] = {}
        self._vector = (vector,)  # in a tuple: the holder must not become a sub-module of every layer

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
        """Parameter name, offset and λθ of everything that a forward pass adds."""
        if self.disable_adapters or self.merged:
            return []
        (vector,) = self._vector
        return [
            (name, offset, vector.scaled(adapter, offset.group))
            for adapter in self.active_adapters
            for name, offset in self.offsets.get(adapter, {}).items()
        ]

    def get_delta_weight(self, adapter: str, parameter: str = "weight") -> torch.Tensor:
        """The offset of one parameter, λ included, in its own shape: float32."""
        (vector,) = self._vector
        offset = self.offsets[adapter][parameter]
        return offset.materialise(vector.scaled(adapter, offset.group).float())

    def _effective(self) -> dict[str, torch.Tensor]:
        """The moved parameters with their offsets added, in their own dtype."""
        values: dict[str, torch.Tensor] = {}
        for name, offset, theta in self._applied():
            base = values.get(name, getattr(self.get_base_layer(), name))
            values[name] = base + offset.materialise(theta.to(base.device)).to(base.dtype)
        return values

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the offsets to the base parameters. The originals are kept, so that `unmerge` is exact.

        Raises:
            ValueError: with `safe_merge`, a merged parameter would not be finite; or the base is quantised.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.offsets:
                continue
            merged = {}
            for name, offset in self.offsets[adapter].items():
                if offset.merges:
                    data = getattr(self.get_base_layer(), name).data
                    if not data.is_floating_point():
                        raise ValueError(
                            f"Cannot merge adapter {adapter!r} into {name} of type {data.dtype}: load the base model "
                            "unquantised and merge there."
                        )
                    merged[name] = (data + self.get_delta_weight(adapter, name).to(data.device)).to(data.dtype)
            if safe_merge and not all(torch.isfinite(data).all() for data in merged.values()):
                raise ValueError(f"Merging adapter {adapter!r} would give NaN or infinite weights. It seems broken.")
            for name, data in merged.items():
                parameter = getattr(self.get_base_layer(), name)
                self._originals.setdefault(name, parameter.data)
                parameter.data = data
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Put the original parameters back, to the bit."""
        for name, data in self._originals.items():
            getattr(self.get_base_layer(), name).data = data
        self._originals = {}
        self.merged_adapters = []


class IntrinsicVector(nn.Module, IntrinsicLayer):
    """θ and λ of every adapter: the only trained parameters. Attribute `intrinsic` on the root of the base model."""

    adapter_layer_names = ("intrinsic_theta", "intrinsic_lambda")
    other_param_names = ()

    def __init__(self) -> None:
        nn.Module.__init__(self)
        IntrinsicLayer.__init__(self, self)
        self.intrinsic_theta = nn.ModuleDict()
        self.intrinsic_lambda = nn.ModuleDict()
        self.hooked = nn.ModuleList()

    def add(self, adapter: str, theta: np.ndarray, scales: np.ndarray, like: torch.Tensor) -> None:
        """Give an adapter its θ (`[d − m]`) and λ (`[m]`): float32, on the device of `like`, a base parameter."""
        self._like = (like,)
        device = "cpu" if like.is_meta else like.device
        for values, vectors in ((theta, self.intrinsic_theta), (scales, self.intrinsic_lambda)):
            if len(values):
                vectors[adapter] = Vector(torch.from_numpy(values).to(device, torch.float32))

    def cast_to_base(self, adapter: str) -> None:
        """Give θ and λ the dtype of the base model."""
        (like,) = self._like
        for vectors in (self.intrinsic_theta, self.intrinsic_lambda):
            if adapter in vectors and like.is_floating_point():
                vectors[adapter].to(like.dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """After loading without a copy in memory: to the base model's device, dtype untouched."""
        (like,) = self._like
        for vectors in (self.intrinsic_theta, self.intrinsic_lambda):
            if adapter_name in vectors and not like.is_meta:
                vectors[adapter_name].to(device or like.device)

    def forward(self, x: Any) -> Any:
        """The identity: a root that is an `nn.Sequential` runs all of its children, and so the holder."""
        return x

    def scaled(self, adapter: str, group: int | None) -> torch.Tensor:
        """θ, or λ_group · θ: `[d − m]`. P is linear, so scaling θ scales the offset."""
        theta = self.intrinsic_theta[adapter]()
        return theta if group is None else theta * self.intrinsic_lambda[adapter]()[group]

    def _get_available_adapters(self) -> set[str]:
        return set(self.intrinsic_theta)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        self.merged_adapters += check_adapters_to_merge(self, adapter_names)

    def unmerge(self) -> None:
        self.merged_adapters = []


class IntrinsicModule(nn.Module, IntrinsicLayer):
    """Any leaf module, its parameters materialised: norms, convolutions, and whatever has no factored form."""

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, vector: IntrinsicVector) -> None:
        nn.Module.__init__(self)
        IntrinsicLayer.__init__(self, vector)
        self.base_layer = base_layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with shadowed(self.base_layer, self._effective()):
            return self.base_layer(*args, **kwargs)

    def __repr__(self) -> str:
        return "intrinsic." + super().__repr__()


class IntrinsicLinear(IntrinsicModule):
    """Linear and Conv1D layers, plain or quantised. The factored form never reads the base weight."""

    def __init__(self, base_layer: Any, vector: IntrinsicVector) -> None:
        super().__init__(base_layer, vector)
        self.in_features, self.out_features = linear_features(base_layer)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        for name, offset, theta in self._applied():
            theta = theta.to(x.device)
            if name == "weight":
                added = offset.projection.linear(x.to(theta.dtype), theta)
            else:
                added = offset.materialise(theta)
            result = result + added.to(result.dtype)
        return result


class IntrinsicEmbedding(IntrinsicModule):
    """Embeddings: only the rows that are looked up are made."""

    def __init__(self, base_layer: Any, vector: IntrinsicVector) -> None:
        super().__init__(base_layer, vector)
        self.in_features, self.out_features = base_layer.num_embeddings, base_layer.embedding_dim

    def forward(self, index: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(index, *args, **kwargs)
        for _, offset, theta in self._applied():
            added = offset.projection.gather(index, theta.to(index.device))
            scale = self._get_embed_scale()
            result = result + (added if scale is None else added * scale).to(result.dtype)
        return result


class IntrinsicHook(nn.Module, IntrinsicLayer):
    """Parameters whose owner cannot be wrapped: it has sub-modules, or its parent reads its parameters itself.

    The effective parameters are in place while `trigger` runs. Lives in the holder's list; names stay as they were.
    """

    base_layer: nn.Module

    def __init__(self, owner: nn.Module, trigger: nn.Module, vector: IntrinsicVector) -> None:
        nn.Module.__init__(self)
        IntrinsicLayer.__init__(self, vector)
        object.__setattr__(self, "base_layer", owner)  # not as a sub-module: it already has its place in the model
        self._open: list[Any] = []
        self._handles = [
            trigger.register_forward_pre_hook(self._enter),
            trigger.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, module: nn.Module, args: Any) -> None:
        scope = shadowed(self.base_layer, self._effective())
        scope.__enter__()
        self._open.append(scope)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._open:
            self._open.pop().__exit__(None, None, None)

    def remove(self) -> None:
        """Leave the model."""
        for handle in self._handles:
            handle.remove()
        (vector,) = self._vector
        vector.hooked = nn.ModuleList(layer for layer in vector.hooked if layer is not self)


def linear_features(layer: Any) -> tuple[int, int]:
    """(in, out) features of a linear layer, plain, Conv1D or quantised."""
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    nx, nf = layer.weight.shape  # Conv1D stores [in, out]
    return nx, nf
