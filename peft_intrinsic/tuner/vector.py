"""The holder of θ and λ on the root of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import get_quantization_kwargs
from torch import nn

from .layer import CURRENT, IntrinsicLayer, Route


class Vector(nn.Module):
    """A parameter behind a call, so that offloading and sharding hooks see when it is used."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values)

    def forward(self) -> torch.Tensor:
        return self.weight


class IntrinsicVector(nn.Module, IntrinsicLayer):
    """θ and λ of every adapter: the only trained parameters. Attribute `intrinsic` on the root of the base model."""

    adapter_layer_names = ("intrinsic_theta", "intrinsic_lambda")
    other_param_names = ()

    def __init__(self, root: nn.Module) -> None:
        nn.Module.__init__(self)
        IntrinsicLayer.__init__(self, self)
        self.intrinsic_theta = nn.ModuleDict()
        self.intrinsic_lambda = nn.ModuleDict()
        self.hooked = nn.ModuleList()
        self.quantization = get_quantization_kwargs(root)
        self.guard = root.register_forward_pre_hook(self._refuse)

    def add(self, adapter: str, theta: np.ndarray, scales: np.ndarray, like: torch.Tensor, width: int) -> None:
        """Give an adapter its θ (`[d − m]`) and λ (`[m]`): float32, on the device of `like`, a base parameter.

        `width` is the largest rank that every offset can have.
        """
        self._like = (like,)
        self.width = width
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

    def numbers(self, adapter: str) -> torch.Tensor:
        """All that an adapter has learned, θ and then λ: `[d]`."""
        return torch.cat([v[adapter]() for v in (self.intrinsic_theta, self.intrinsic_lambda) if adapter in v])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's converter asks every tuner layer; the holder does not stand in its way."""
        return True

    def get_delta_weight(self, adapter: str, parameter: str = "weight") -> torch.Tensor:
        """The holder moves nothing by itself: zeros, of a size that PEFT's converter can cut to any rank."""
        return torch.zeros(self.width, self.width)

    @contextmanager
    def routed(self, routes: list[Route]) -> Iterator[None]:
        """In this thread, give each sample its own numbers in place of the active adapters'."""
        before = CURRENT.routes
        CURRENT.routes = {**before, self: routes}
        try:
            yield
        finally:
            CURRENT.routes = before

    def _refuse(self, root: nn.Module, args: Any) -> None:
        """Before each forward pass of the base model.

        Raises:
            RuntimeError: reentrant gradient checkpointing in several processes: DDP then averages the gradient of a
                shared vector before all of its parts have been added, without a word. Or DeepSpeed ZeRO-3.
        """
        if hasattr(self._like[0], "ds_id"):
            raise RuntimeError(
                "DeepSpeed ZeRO-3 takes parameters apart that the adapter must read whole. Use ZeRO-2, DDP or FSDP2."
            )
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not self.training or not distributed or torch.distributed.get_world_size() < 2:
            return
        for module in root.modules():
            if not getattr(module, "gradient_checkpointing", False):
                continue
            settings = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
            if settings.get("use_reentrant") is not False:
                raise RuntimeError(
                    "Reentrant gradient checkpointing in several processes gives wrong gradients for a shared θ. Pass "
                    "gradient_checkpointing_kwargs={'use_reentrant': False} to TrainingArguments, to "
                    "gradient_checkpointing_enable() or to prepare_model_for_kbit_training()."
                )

    def _get_available_adapters(self) -> set[str]:
        return set(self.intrinsic_theta)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        self.merged_adapters += [a for a in check_adapters_to_merge(self, adapter_names) if a in self.intrinsic_theta]

    def unmerge(self) -> None:
        self.merged_adapters = []

    def __repr__(self) -> str:
        return "intrinsic." + super().__repr__()
