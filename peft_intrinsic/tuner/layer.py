"""What the tuner's layers share: offsets, effective parameters, merging."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.autograd.forward_ad import unpack_dual

from ..projection import TensorProjection
from .lazy_tensor import EffectiveTensor
from .merging import add_offsets, blank, kept, restore
from .vector import IntrinsicVector


@dataclass(frozen=True)
class Offset:
    """One parameter's share of P.

    Args:
        name: of the parameter, in the plain base model.
        projection: its rows of P, with the parameter seen as a matrix `[rows, cols]`.
        shape: of the parameter itself.
        transposed: the matrix is the parameter's transpose (Conv1D of GPT-2).
        group: index of its λ, or None.
        merges: whether this module does the merging of a parameter that several share.
    """

    name: str
    projection: TensorProjection
    shape: tuple[int, ...]
    transposed: bool
    group: int | None
    merges: bool

    def materialize(self, theta: torch.Tensor) -> torch.Tensor:
        """`[d] -> shape`, or `[batch, d] -> [batch, *shape]`."""
        matrix = self.projection.materialize(theta)
        return matrix.mT if self.transposed else matrix.view((*theta.shape[:-1], *self.shape))


class IntrinsicLayer(BaseTunerLayer):
    """What all tuner layers share: which offsets they apply for which adapter, and merging.

    θ and λ belong to the holder. Every layer shows the holder's dictionaries as its own, which is how PEFT freezes,
    deletes and counts them.
    """

    adapter_layer_names: tuple[str, ...] = ("intrinsic_theta", "intrinsic_lambda")
    other_param_names: tuple[str, ...] = ("offsets",)
    cast_input_dtype_enabled = False  # PEFT's disable_input_dtype_casting has nothing to switch off
    mixable = False  # whether the samples of a batch can have different adapters
    in_features: int
    out_features: int

    def __init__(self, vector: IntrinsicVector) -> None:
        self.offsets: dict[str, dict[str, Offset]] = {}
        self.merged_adapters: list[str] = []
        self.rounding: tuple[Any, Any] = (0.0, 0.0)  # squared norms: what merging lost of the offsets, and the offsets
        self._originals: dict[str, Any] = {}
        self._vector = (vector,)  # in a tuple: the holder must not become a sub-module of every layer

    @property
    def vector(self) -> IntrinsicVector:
        """The holder of θ and λ."""
        return self._vector[0]

    @property
    def intrinsic_theta(self) -> nn.ModuleDict:
        """θ of every adapter of the model."""
        return self.vector.intrinsic_theta

    @property
    def intrinsic_lambda(self) -> nn.ModuleDict:
        """λ of every adapter of the model."""
        return self.vector.intrinsic_lambda

    @property
    def weight(self) -> Any:
        """The weight with its offset, for readers that do not call the layer; None where there is none."""
        return self.read("weight")

    @property
    def bias(self) -> Any:
        """Likewise."""
        return self.read("bias")

    def _get_available_adapters(self) -> set[str]:
        return set(self.offsets)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        self.vector.move_to_base(adapter_name, device)

    def enable_adapters(self, enabled: bool) -> None:
        """As in PEFT, but unmerge at once: a tied parameter has one owner, which a forward pass need not visit."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    def applied(self) -> list[tuple[str, Offset, torch.Tensor]]:
        """Parameter name, offset and λθ of everything that a forward pass adds. λθ of routes is `[batch, d − m]`."""
        if self.disable_adapters or self.merged:
            return []
        vector = self.vector
        routes = vector.choices.routes()
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

    def base_parameter(self, name: str) -> Any:
        """A parameter of the base layer, as it is; None where there is none."""
        return getattr(self.get_base_layer(), name, None)

    def read(self, name: str) -> Any:
        """A parameter for readers: with its offset, unless it is quantised or offloaded.

        Its values are computed when they are used. A compiler drops unused values by itself, and function transforms
        must see the computation, so both get the values at once.
        An offloaded parameter is not there to be read.
        """
        applied = [(offset, theta) for own, offset, theta in self.applied() if own == name]
        base = self.base_parameter(name)
        if base is None and applied:
            base = blank(self, *applied[0])
        plain = isinstance(base, torch.Tensor) and base.is_floating_point() and base.element_size() > 1
        if not plain or base.is_meta:
            return base
        if not applied or any(hasattr(theta, "full_tensor") for _, theta in applied):
            return base  # sharded by FSDP 2, as it is only while no forward pass runs
        offsets = [offset for offset, _ in applied]

        def value(*thetas: torch.Tensor) -> torch.Tensor:
            result = base
            for offset, theta in zip(offsets, thetas, strict=True):
                if theta.dim() > 1:
                    raise ValueError(
                        f"{offset.name} is read by another module than its own, so the samples of a batch cannot have "
                        f"different adapters there. Leave it out: exclude_modules=['{offset.name.rpartition('.')[0]}']."
                    )
                result = result + offset.materialize(theta.to(base.device)).to(base.dtype)
            return result

        thetas = [theta for _, theta in applied]
        if torch.compiler.is_compiling() or _is_transformed(thetas):
            return value(*thetas)
        if base.dim() > 1:
            return EffectiveTensor.of(base, thetas, value)
        result: Any = value(*thetas)
        result._is_param = True  # as an EffectiveTensor, but it costs nothing to make
        return result

    def get_delta_weight(self, adapter: str, parameter: str = "weight") -> torch.Tensor:
        """The offset of one parameter, λ included, in its own shape and θ's type.

        Raises:
            KeyError: the adapter does not move that parameter of this layer.
        """
        offset = self.offsets[adapter][parameter]
        theta = self.vector.scaled(adapter, offset.group)
        return offset.materialize(theta.float()).to(theta.dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the offsets to the base parameters, in place. The originals are kept, so that `unmerge` is exact.

        Raises:
            ValueError: with `safe_merge`, a merged parameter would not be finite; or the base is quantised in a way
                that PEFT cannot merge into.
        """
        adapters = [a for a in check_adapters_to_merge(self, adapter_names) if a in self.offsets]
        before = list(self.merged_adapters)
        parts: dict[str, list[tuple[Offset, torch.Tensor]]] = {}
        for adapter in adapters:
            for name, offset in self.offsets[adapter].items():
                if offset.merges:
                    theta = self.vector.scaled(adapter, offset.group).float()
                    parts.setdefault(name, []).append((offset, theta))
        sound: Any = True
        lost, whole = self.rounding
        for name, offsets in parts.items():
            if name not in self._originals:
                self._originals[name] = kept(self, name, *offsets[0])
            finite, gone, norm = add_offsets(self, name, offsets)
            sound, lost, whole = finite & sound, lost + gone, whole + norm
        self.rounding = lost, whole
        self.merged_adapters += adapters
        if safe_merge and not sound:
            self.unmerge()
            if before:
                self.merge(adapter_names=before)
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(adapters)} seems to be broken: a weight "
                "would be NaN or infinite."
            )

    def added(self, adapters: Iterable[str]) -> list[str]:
        """Names of the biases that the base layer lacks, of some adapters and of the merged ones."""
        if self._originals.get("bias", self.base_parameter("bias")) is not None:
            return []
        owners = [self.offsets.get(adapter, {}) for adapter in {*adapters, *self.merged_adapters}]
        return [offsets["bias"].name for offsets in owners if "bias" in offsets]

    def unmerge(self) -> None:
        """Put the original parameters back, to the bit."""
        for name, original in self._originals.items():
            restore(self, name, original)
        self._originals, self.rounding = {}, (0.0, 0.0)
        self.merged_adapters = []


def _is_transformed(thetas: Iterable[torch.Tensor]) -> bool:
    """Whether `torch.func` (vmap, jvp, hessian) or forward-mode differentiation looks into the computation."""
    forward_mode = any(unpack_dual(theta).tangent is not None for theta in thetas)
    return forward_mode or torch._C._are_functorch_transforms_active()


def attached(model: Any, adapter: str | None) -> str:
    """The adapter of this name, or the active one.

    Raises:
        ValueError: there is none of this name.
    """
    name = adapter or model.active_adapter
    if name not in model.peft_config:
        raise ValueError(f"adapter={name!r} is not attached. Attached are {list(model.peft_config)}.")
    return name
