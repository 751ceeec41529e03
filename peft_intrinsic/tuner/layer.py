"""The base class of the tuner's layers: offsets, reading adapted parameters, merging."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.autograd.forward_ad import unpack_dual

from ..projection import TensorProjection
from .lazy_tensor import LazyTensor
from .merging import add_offsets, restore_original, save_original, zero_bias
from .vector import IntrinsicVector


@dataclass(frozen=True)
class Offset:
    """The offset that P adds to one parameter.

    Args:
        name: of the parameter, in the plain base model.
        projection: its rows of P, for the matrix view `[rows, cols]`.
        shape: of the parameter itself.
        transposed: whether the matrix view is the parameter's transpose (Conv1D of GPT-2).
        group: index of its λ, or None.
        merges: whether this module merges it, as one of all with the same parameter does.
    """

    name: str
    projection: TensorProjection
    shape: tuple[int, ...]
    transposed: bool
    group: int | None
    merges: bool

    def materialize(self, theta: torch.Tensor) -> torch.Tensor:
        """Compute the offset: `[d] -> shape`, or `[batch, d] -> [batch, *shape]`."""
        matrix = self.projection.materialize(theta)
        return matrix.mT if self.transposed else matrix.view((*theta.shape[:-1], *self.shape))


class IntrinsicLayer(BaseTunerLayer):
    """A tuner layer: its offsets by adapter, and merging.

    θ and λ belong to the `IntrinsicVector`. Every layer has the same dictionaries as attributes, through which PEFT
    freezes, deletes and counts them.
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
        self.rounding: tuple[Any, Any] = (
            0.0,
            0.0,
        )  # squared norms of the rounding error of merging, and of the offsets
        self._originals: dict[str, Any] = {}
        self._vector = (vector,)  # in a tuple, or it would become a sub-module of every layer

    @property
    def vector(self) -> IntrinsicVector:
        """The module with θ and λ."""
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
        """The weight with its offset, for code that does not call the layer; None without a weight."""
        return self.read("weight")

    @property
    def bias(self) -> Any:
        """The bias with its offset, in the same way."""
        return self.read("bias")

    def _get_available_adapters(self) -> set[str]:
        return set(self.offsets)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        self.vector.move_to_base(adapter_name, device)

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable the adapters. Disabling also unmerges, because a forward pass may not visit the layer that
        merges a tied parameter."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    def applied(self) -> list[tuple[str, Offset, torch.Tensor]]:
        """Parameter name, offset and λθ of each active offset. With routes, λθ is `[batch, d − m]`."""
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
        """A parameter of the base layer, without its offset; None if the layer lacks it."""
        return getattr(self.get_base_layer(), name, None)

    def read(self, name: str) -> Any:
        """A parameter with its offset, for code that does not call the layer; quantized or offloaded ones without.

        The values are computed on first use, but immediately under a compiler, which removes unused ones itself, and
        under function transforms, which must trace the computation.
        """
        applied = [(offset, theta) for own, offset, theta in self.applied() if own == name]
        base = self.base_parameter(name)
        if base is None and applied:
            base = zero_bias(self, *applied[0])
        plain = isinstance(base, torch.Tensor) and base.is_floating_point() and base.element_size() > 1
        if not plain or base.is_meta:
            return base
        if not applied or any(hasattr(tensor, "full_tensor") for tensor in (base, *(theta for _, theta in applied))):
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
            return LazyTensor.of(base, thetas, value)
        result: Any = value(*thetas)
        result._is_param = True  # as a LazyTensor, but computed at once, which costs little
        return result

    def get_delta_weight(self, adapter: str, parameter: str = "weight") -> torch.Tensor:
        """The offset of one parameter, λ included, in its own shape and the dtype of θ.

        Raises:
            KeyError: the adapter does not adapt that parameter of this layer.
        """
        offset = self.offsets[adapter][parameter]
        theta = self.vector.scaled(adapter, offset.group)
        return offset.materialize(theta.float()).to(theta.dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the offsets to the base parameters, in place. The originals are saved, so that `unmerge` is exact.

        Args:
            safe_merge: raise an error instead of merging values that are not finite.
            adapter_names: the adapters to merge, by default the active ones.

        Raises:
            ValueError: adapters are selected for the samples of a batch; with `safe_merge`, a merged parameter would
                not be finite; or PEFT cannot merge into weights that are quantized in this way.
        """
        if self.vector.choices.open:
            raise ValueError("Adapters are selected for the samples of a batch. Merge outside of select().")
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
                self._originals[name] = save_original(self, name, *offsets[0])
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

    def added_biases(self, adapters: Iterable[str]) -> list[str]:
        """Names of the biases that the base layer lacks, for some adapters and the merged ones."""
        if self._originals.get("bias", self.base_parameter("bias")) is not None:
            return []
        owners = [self.offsets.get(adapter, {}) for adapter in {*adapters, *self.merged_adapters}]
        return [offsets["bias"].name for offsets in owners if "bias" in offsets]

    def unmerge(self) -> None:
        """Restore the original parameters, bitwise."""
        for name, original in self._originals.items():
            restore_original(self, name, original)
        self._originals, self.rounding = {}, (0.0, 0.0)
        self.merged_adapters = []


def _is_transformed(thetas: Iterable[torch.Tensor]) -> bool:
    """Whether `torch.func` (vmap, jvp, hessian) or forward-mode differentiation traces the computation."""
    forward_mode = any(unpack_dual(theta).tangent is not None for theta in thetas)
    return forward_mode or torch._C._are_functorch_transforms_active()


def find_adapter(model: Any, adapter: str | None) -> str:
    """The adapter of this name, or the active one.

    Raises:
        ValueError: there is none of this name.
    """
    name = adapter or model.active_adapter
    if name not in model.peft_config:
        raise ValueError(f"adapter={name!r} is not attached. Attached are {list(model.peft_config)}.")
    return name
