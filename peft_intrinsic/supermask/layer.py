"""A linear layer some of whose weights are zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from ..tuner.module_types import linear_features
from ..tuner.vector import Vector
from .masks import binary, initial_scores, packed, straight_through, unpacked


class SupermaskLinear(nn.Module, BaseTunerLayer):
    """A linear layer or Conv1D with a mask for each adapter.

    An adapter that trains has scores, and its mask is made in every forward pass. One that was loaded for inference
    has bits, and its zeros are written into the weight once; what stood there is kept, so that it comes back to the
    bit. The masks of several active adapters are multiplied.
    """

    adapter_layer_names: tuple[str, ...] = ("supermask_scores",)
    other_param_names: tuple[str, ...] = ("supermask_bits",)
    cast_input_dtype_enabled = False  # PEFT's disable_input_dtype_casting has nothing to switch off
    base_layer: Any

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.in_features, self.out_features = linear_features(base_layer)
        self.supermask_scores = nn.ModuleDict()
        self.supermask_bits: dict[str, torch.Tensor] = {}
        self.configs: dict[str, Any] = {}
        self.awaited: set[str] = set()  # adapters whose saved mask has not been loaded yet
        self.merged_adapters: list[str] = []
        self._written: list[str] = []  # adapters whose zeros are in the weight
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None  # bits of their mask, what the zeros replaced

    def update_layer(self, adapter: str, config: Any) -> None:
        """Give an adapter its scores, or for inference its mask, which is all ones until a saved one is loaded."""
        self.configs[adapter] = config
        saved = config.base_digest is not None or config.final_sparsity is not None
        if saved:
            self.awaited.add(adapter)
        weight = self.base_layer.weight
        if config.inference_mode and saved:
            self.set_mask(adapter, torch.ones(weight.shape, dtype=torch.bool))
            return
        scores = initial_scores(weight, self.name, config)
        if config.inference_mode:
            self.set_mask(adapter, binary(scores, config))
        else:
            self.supermask_scores[adapter] = Vector(scores)

    def set_mask(self, adapter: str, mask: torch.Tensor) -> None:
        """The mask of an adapter for inference: `bool`, in the shape of the weight."""
        self._write([name for name in self._written if name != adapter])
        self.supermask_bits[adapter] = packed(mask)

    def mask(self, adapter: str, scores: torch.Tensor | None = None) -> torch.Tensor:
        """The mask of an adapter in evaluation and on disk: `bool`, in the shape of the weight.

        Args:
            adapter: its name.
            scores: to be used in place of its own.

        Raises:
            ValueError: the scores are not finite, or the saved mask of the adapter was not loaded.
        """
        self._check_loaded(adapter)
        if adapter in self.supermask_bits:
            return unpacked(self.supermask_bits[adapter], self.base_layer.weight.shape)
        scores = self._scores(adapter) if scores is None else scores
        if not torch.isfinite(scores).all():
            raise ValueError(f"The scores of {self.name} are NaN or infinite. Lower the learning rate.")
        return binary(scores, self.configs[adapter])

    def _scores(self, adapter: str) -> torch.Tensor:
        return self.supermask_scores[adapter]()

    def _check_loaded(self, adapter: str) -> None:
        if adapter not in self.awaited:
            return
        if adapter in self.supermask_scores:  # other scores may have been copied in, as TRL does for a reference
            scores = self._scores(adapter)
            if not torch.equal(scores, initial_scores(self._original(), self.name, self.configs[adapter]).to(scores)):
                self.awaited.discard(adapter)
                return
        raise ValueError(
            f"The saved mask of adapter {adapter!r} was not loaded, only its configuration. Load it with "
            "PeftModel.from_pretrained or PeftModel.load_adapter. (For a new adapter with this configuration, "
            "set its base_digest and final_sparsity to None.)"
        )

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What the mask takes off the weight, in its own shape and type."""
        weight = self._original()
        return torch.where(self.mask(adapter).to(weight.device), torch.zeros_like(weight), -weight)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        weight = self.base_layer.weight
        if adapter_name in self.supermask_scores and not weight.is_meta:
            self.supermask_scores[adapter_name].to(device or weight.device)  # in float32 whatever the weight's type

    def _get_available_adapters(self) -> set[str]:
        return set(self.configs)

    def _original(self) -> torch.Tensor:
        """The base weight; a copy, with what the zeros replaced, where some are written."""
        weight = self.base_layer.weight.data
        if self._kept is None:
            return weight
        bits, values = self._kept
        weight = weight.clone()
        weight[~unpacked(bits.to(weight.device), weight.shape)] = values.to(weight)
        return weight

    @torch.no_grad()
    def _write(self, adapters: list[str]) -> None:
        """Write the zeros of exactly these adapters into the weight; those of others leave it."""
        if adapters == self._written:
            return
        weight = self.base_layer.weight.data
        weight.copy_(self._original())
        self._written, self._kept = [], None
        if not adapters:
            return
        mask = torch.ones_like(weight, dtype=torch.bool)
        for adapter in adapters:
            mask &= self.mask(adapter).to(weight.device)
        self._kept = packed(mask), weight[~mask]
        weight[~mask] = 0
        self._written = list(adapters)

    def effective_weight(self) -> torch.Tensor:
        """The weight as the active adapters have it, with a gradient for the scores of those that train.

        Raises:
            ValueError: see `mask`.
            RuntimeError: DeepSpeed ZeRO-3 has split the weight over devices.
        """
        if hasattr(self.base_layer.weight, "ds_id"):
            raise RuntimeError("DeepSpeed ZeRO-3 splits weights that a mask must read whole. Use ZeRO-2 or DDP.")
        if self.merged:
            return self.base_layer.weight
        active = [] if self.disable_adapters else self.active_adapters
        self._write([name for name in active if name in self.supermask_bits])
        weight = self.base_layer.weight
        for adapter in active:
            if adapter not in self.supermask_scores:
                continue
            self._check_loaded(adapter)
            scores = self._scores(adapter)
            mask = straight_through(scores, self.configs[adapter]) if self.training else self.mask(adapter)
            weight = weight * mask.to(weight.dtype)
        return weight

    @property
    def weight(self) -> torch.Tensor:
        """For readers that do not call the layer."""
        return self.effective_weight()

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        weight = self.effective_weight()
        if weight is self.base_layer.weight:
            return self.base_layer(x, *args, **kwargs)
        return torch.func.functional_call(self.base_layer, {"weight": weight}, (x, *args), kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the zeros into the base weight. `unmerge` puts back what they replaced, to the bit.

        Raises:
            ValueError: scores are not finite.
        """
        known = {*self.supermask_scores, *self.supermask_bits}
        adapters = [name for name in check_adapters_to_merge(self, adapter_names) if name in known]
        self._write([*self.merged_adapters, *adapters])
        self.merged_adapters = [*self.merged_adapters, *adapters]

    def unmerge(self) -> None:
        """Put the original weights back."""
        self.merged_adapters = []
        self._write([])

    def enable_adapters(self, enabled: bool) -> None:
        """As in PEFT; without adapters the weight is the base's."""
        if not enabled:
            self.unmerge()
        super().enable_adapters(enabled)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """As in PEFT.

        Raises:
            ValueError: an adapter was loaded for inference, so that it has no scores to train.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if requires_grad and (bare := [name for name in names if name in self.supermask_bits]):
            raise ValueError(
                f"Adapter {bare[0]!r} was loaded for inference and has no scores to train. Load it with "
                "is_trainable=True."
            )
        super().set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT; its zeros leave the weight."""
        if adapter_name in self._written:
            self._write([name for name in self._written if name != adapter_name])
        self.configs.pop(adapter_name, None)
        self.awaited.discard(adapter_name)
        super().delete_adapter(adapter_name)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """The base weight is saved as it is without adapters, unless they are merged."""
        if not self.merged:
            self._write([])
        super()._save_to_state_dict(*args, **kwargs)

    def __repr__(self) -> str:
        return "supermask." + super().__repr__()
