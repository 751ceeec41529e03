"""The holder of θ and λ on the root of the model."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from peft.utils import get_quantization_kwargs
from torch import nn

from .batches import Choices
from .names import HOLDER


class Vector(nn.Module):
    """A parameter behind a call, so that offloading and sharding hooks see when it is used."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values)

    def __setattr__(self, name: str, value: Any) -> None:
        """A parameter that takes the place of another stays frozen: transformers loads by putting in new ones."""
        if isinstance(value, nn.Parameter) and name in self._parameters:
            value.requires_grad_(self.weight.requires_grad)
        super().__setattr__(name, value)

    def forward(self) -> torch.Tensor:
        return self.weight


class IntrinsicVector(nn.Module):
    """θ and λ of every adapter: the only trained parameters.

    No tuner layer itself: PEFT reaches θ and λ through the layers, which all show the same two dictionaries.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.intrinsic_theta = nn.ModuleDict()
        self.intrinsic_lambda = nn.ModuleDict()
        self.in_place = nn.ModuleList()  # tuner layers of parameters that stay in their own modules
        self.choices = Choices()
        self.replaced: list[Any] = []  # base parameters before they were re-initialized
        self.split: dict[str, str] = {}  # of adapters: a parameter that is only a part on this device
        self.quantization = get_quantization_kwargs(root)
        watched = [root]
        if getattr(getattr(root, "config", None), "is_encoder_decoder", False):
            watched += [cast(Any, root).get_encoder()]  # generate() calls it alone
        self._guards = [
            guard
            for module in dict.fromkeys(watched)
            for guard in (
                module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
                module.register_forward_hook(self._leave, always_call=True),
            )
        ]

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

    def move_to_base(self, adapter: str, device: torch.device | None = None) -> None:
        """After loading without a copy in memory: to the base model's device, dtype untouched."""
        (like,) = self._like
        for vectors in (self.intrinsic_theta, self.intrinsic_lambda):
            if adapter in vectors and not like.is_meta:
                vectors[adapter].to(device or like.device)

    def scaled(self, adapter: str, group: int | None) -> torch.Tensor:
        """θ, or λ_group · θ: `[d − m]`. P is linear, so scaling θ scales the offset."""
        theta = self.intrinsic_theta[adapter]()
        return theta if group is None else theta * self.intrinsic_lambda[adapter]()[group]

    def concatenate(self, adapter: str) -> torch.Tensor:
        """The trainable parameters of an adapter, θ and then λ: `[d]`."""
        return torch.cat([v[adapter]() for v in (self.intrinsic_theta, self.intrinsic_lambda) if adapter in v])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises RuntimeError: the holder is no part of the computation."""
        raise RuntimeError(
            f"The model calls each of its children(), and so the adapter's {HOLDER!r}. Put the model into a module of "
            "its own, as its attribute, and attach the adapter to that."
        )

    def detach_from(self, root: nn.Module) -> None:
        """Leave the model."""
        for guard in self._guards:
            guard.remove()
        delattr(root, HOLDER)

    def _enter(self, root: nn.Module, args: Any, kwargs: Any) -> None:
        """Before each forward pass of the base model.

        Raises:
            RuntimeError: reentrant gradient checkpointing in several processes: DDP then averages the gradient of a
                shared vector before all of its parts have been added, silently. Or DeepSpeed ZeRO-3, or tensor
                parallelism.
        """
        self.choices.enter(root, args, kwargs)
        if hasattr(self._like[0], "ds_id"):
            raise RuntimeError(
                "DeepSpeed ZeRO-3 takes parameters apart that the adapter must read whole. Use ZeRO-2, DDP or FSDP2."
            )
        if split := [name for adapter, name in self.split.items() if adapter in self.intrinsic_theta]:
            raise RuntimeError(
                f"{split[0]} is a DTensor: it was split over devices before the adapter was attached. Tensor "
                "parallelism is not supported: load the model without tp_plan, or choose target_modules that are not "
                "split. With FSDP 2, attach the adapter before fully_shard."
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

    def _leave(self, root: nn.Module, args: Any, output: Any) -> None:
        if self.choices.open:
            self.choices.leave()
