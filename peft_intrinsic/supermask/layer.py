"""`SupermaskLinear`: a linear layer with masks on its weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from ..tuner.module_types import linear_features
from ..tuner.vector import Vector
from .config import SupermaskConfig
from .masks import bits_to_mask, initialize_scores, make_mask, make_training_mask, mask_to_bits


class SupermaskLinear(nn.Module, BaseTunerLayer):
    """A linear layer or Conv1D with a mask for each adapter.

    A trainable adapter has scores, from which every forward pass makes the mask. An adapter loaded for inference has
    bits: its zeros are written into the weight once, and the values under them are stored, to be restored bitwise.
    The masks of several active adapters are multiplied.

    Args:
        base_layer: layer whose weight is masked.
        name: its name in the base model.
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
        self.configs: dict[str, SupermaskConfig] = {}
        self.awaited: set[str] = set()  # adapters whose saved mask has not been loaded yet
        self.merged_adapters: list[str] = []
        self._written: list[str] = []  # adapters whose zeros are in the weight
        self._replaced: tuple[torch.Tensor, torch.Tensor] | None = None  # bits of their mask, values under its zeros

    def update_layer(self, adapter: str, config: SupermaskConfig) -> None:
        """Add the scores of an adapter, or its mask for inference (all ones until a saved one is loaded)."""
        self.configs[adapter] = config
        saved = config.base_digest is not None or config.final_sparsity is not None
        if saved:
            self.awaited.add(adapter)
        weight = self.base_layer.weight
        if config.inference_mode and saved:
            self.set_mask(adapter, torch.ones(weight.shape, dtype=torch.bool))
            return
        scores = initialize_scores(weight, self.name, config)
        if config.inference_mode:
            self.set_mask(adapter, make_mask(scores, config))
        else:
            self.supermask_scores[adapter] = Vector(scores)

    def set_mask(self, adapter: str, mask: torch.Tensor) -> None:
        """Set the mask of an adapter for inference: `bool`, shape of the weight."""
        self.write_zeros([name for name in self._written if name != adapter])
        self.supermask_bits[adapter] = mask_to_bits(mask)

    def get_mask(self, adapter: str, scores: torch.Tensor | None = None) -> torch.Tensor:
        """Get the mask of an adapter in evaluation and in the file: `bool`, shape of the weight.

        Args:
            adapter: name of the adapter.
            scores: scores instead of those of the layer, in the shape of the weight.

        Raises:
            ValueError: the scores are not finite, or the saved mask of the adapter was not loaded.
        """
        self._check_loaded(adapter)
        if adapter in self.supermask_bits:
            return bits_to_mask(self.supermask_bits[adapter], self.base_layer.weight.shape)
        scores = self.supermask_scores[adapter]() if scores is None else scores
        if not torch.isfinite(scores).all():
            raise ValueError(f"The scores of {self.name} are NaN or infinite. Lower the learning rate.")
        return make_mask(scores, self.configs[adapter])

    def _check_loaded(self, adapter: str) -> None:
        if adapter not in self.awaited:
            return
        if adapter in self.supermask_scores:  # TRL copies scores into its reference adapter
            scores = self.supermask_scores[adapter]()
            initial = initialize_scores(self._base_weight(), self.name, self.configs[adapter])
            if not torch.equal(scores, initial.to(scores)):
                self.awaited.discard(adapter)
                return
        raise ValueError(
            f"The saved mask of adapter {adapter!r} was not loaded, only its configuration. Load it with "
            "PeftModel.from_pretrained or PeftModel.load_adapter. (For a new adapter with this configuration, "
            "set its base_digest and final_sparsity to None.)"
        )

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Get the change of the weight by an adapter's mask, in the weight's shape and dtype."""
        weight = self._base_weight()
        return torch.where(self.get_mask(adapter).to(weight.device), torch.zeros_like(weight), -weight)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        weight = self.base_layer.weight
        if adapter_name in self.supermask_scores and not weight.is_meta:
            self.supermask_scores[adapter_name].to(device or weight.device)  # stays float32

    def _get_available_adapters(self) -> set[str]:
        return set(self.configs)

    def _base_weight(self) -> torch.Tensor:
        """The base weight without masks (a copy if zeros are written)."""
        weight = self.base_layer.weight.data
        if self._replaced is None:
            return weight
        bits, values = self._replaced
        weight = weight.clone()
        weight[~bits_to_mask(bits.to(weight.device), weight.shape)] = values.to(weight)
        return weight

    @torch.no_grad()
    def write_zeros(self, adapters: list[str]) -> None:
        """Write the zeros of these adapters into the weight, and restore the values under those of all others."""
        if adapters == self._written:
            return
        weight = self.base_layer.weight.data
        weight.copy_(self._base_weight())
        self._written, self._replaced = [], None
        if not adapters:
            return
        mask = torch.ones_like(weight, dtype=torch.bool)
        for adapter in adapters:
            mask &= self.get_mask(adapter).to(weight.device)
        self._replaced = mask_to_bits(mask), weight[~mask]
        weight[~mask] = 0
        self._written = list(adapters)

    def get_masked_weight(self) -> torch.Tensor:
        """Get the weight under the masks of the active adapters, with a gradient for trainable scores.

        Raises:
            ValueError: the scores are not finite, or a saved mask was not loaded.
            RuntimeError: DeepSpeed ZeRO-3 has split the weight over devices.
        """
        if hasattr(self.base_layer.weight, "ds_id"):
            raise RuntimeError("DeepSpeed ZeRO-3 splits weights, and masks need them whole. Use ZeRO-2 or DDP.")
        if self.merged:
            return self.base_layer.weight
        active = [] if self.disable_adapters else self.active_adapters
        self.write_zeros([name for name in active if name in self.supermask_bits])
        weight = self.base_layer.weight
        for adapter in active:
            if adapter not in self.supermask_scores:
                continue
            self._check_loaded(adapter)
            scores = self.supermask_scores[adapter]()
            mask = make_training_mask(scores, self.configs[adapter]) if self.training else self.get_mask(adapter)
            weight = weight * mask.to(weight.dtype)
        return weight

    @property
    def weight(self) -> torch.Tensor:
        """The masked weight, for modules that read it without calling the layer."""
        return self.get_masked_weight()

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        weight = self.get_masked_weight()
        if weight is self.base_layer.weight:
            return self.base_layer(x, *args, **kwargs)
        return torch.func.functional_call(self.base_layer, {"weight": weight}, (x, *args), kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the zeros into the base weight; `unmerge` restores it bitwise.

        Raises:
            ValueError: scores are not finite.
        """
        known = {*self.supermask_scores, *self.supermask_bits}
        adapters = [name for name in check_adapters_to_merge(self, adapter_names) if name in known]
        self.write_zeros([*self.merged_adapters, *adapters])
        self.merged_adapters = [*self.merged_adapters, *adapters]

    def unmerge(self) -> None:
        """Restore the base weight bitwise."""
        self.merged_adapters = []
        self.write_zeros([])

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable the adapters; disabling restores the base weight."""
        if not enabled:
            self.unmerge()
        super().enable_adapters(enabled)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable or freeze them.

        Raises:
            ValueError: an adapter was loaded for inference, so it has no scores to train.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if requires_grad and (bare := [name for name in names if name in self.supermask_bits]):
            raise ValueError(
                f"Adapter {bare[0]!r} was loaded for inference and has no scores to train. Load it with "
                "is_trainable=True."
            )
        super().set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and restore the values under its zeros."""
        if adapter_name in self._written:
            self.write_zeros([name for name in self._written if name != adapter_name])
        self.configs.pop(adapter_name, None)
        self.awaited.discard(adapter_name)
        super().delete_adapter(adapter_name)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Save the base weight without masks, unless they are merged."""
        if not self.merged:
            self.write_zeros([])
        super()._save_to_state_dict(*args, **kwargs)

    def __repr__(self) -> str:
        return "supermask." + super().__repr__()
