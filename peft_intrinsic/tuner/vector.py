"""The module on the root of the model that contains θ and λ."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import numpy as np
import torch
from peft.utils import get_quantization_kwargs
from torch import nn

from .batches import Choices
from .names import VECTOR


class Vector(nn.Module):
    """A parameter that is read by a call, so that offloading and sharding hooks notice it."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values)

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep a parameter frozen when another one replaces it, as transformers does when it loads."""
        if isinstance(value, nn.Parameter) and name in self._parameters:
            value.requires_grad_(self.weight.requires_grad)
        super().__setattr__(name, value)

    def forward(self) -> torch.Tensor:
        return self.weight


class IntrinsicVector(nn.Module):
    """θ and λ of every adapter, the only trainable parameters.

    It is not a tuner layer: PEFT accesses θ and λ through the layers, which all have the same two dictionaries.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.intrinsic_theta = nn.ModuleDict()
        self.intrinsic_lambda = nn.ModuleDict()
        self.in_place = nn.ModuleList()  # tuner layers of modules that are not wrapped
        self.choices = Choices()
        self.replaced: list[Any] = []  # base parameters before they were re-initialized
        self.split: dict[str, str] = {}  # by adapter: a parameter of which this device has only a part
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
        """Add the θ (`[d − m]`) and λ (`[m]`) of an adapter: float32, on the device of `like`, a base parameter."""
        self._like = (like,)
        device = "cpu" if like.is_meta else like.device
        for values, vectors in ((theta, self.intrinsic_theta), (scales, self.intrinsic_lambda)):
            if len(values):
                vectors[adapter] = Vector(torch.from_numpy(values).to(device, torch.float32))

    def cast_to_base(self, adapter: str) -> None:
        """Cast θ and λ to the dtype of the base model."""
        (like,) = self._like
        for vectors in (self.intrinsic_theta, self.intrinsic_lambda):
            if adapter in vectors and like.is_floating_point():
                vectors[adapter].to(like.dtype)

    def move_to_base(self, adapter: str, device: torch.device | None = None) -> None:
        """Put θ and λ on the base model's device, in their dtype, after loading without a copy in memory."""
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
        """Raise RuntimeError: this module is no part of the computation."""
        raise RuntimeError(
            f"The model calls each of its children(), {VECTOR!r} of the adapter included. Make the model an attribute "
            "of another module, and attach the adapter to that one."
        )

    def detach_from(self, root: nn.Module) -> None:
        """Remove this module and its hooks from the model."""
        for guard in self._guards:
            guard.remove()
        for module in root.modules():
            function = module.__dict__.get("_gradient_checkpointing_func")
            if isinstance(function, partial) and function.func == self.choices.checkpoint:
                call, *args = function.args
                module.__dict__["_gradient_checkpointing_func"] = partial(call, *args, **function.keywords)
        delattr(root, VECTOR)

    def _enter(self, root: nn.Module, args: Any, kwargs: Any) -> None:
        """Check the model before each forward pass.

        Raises:
            RuntimeError: gradient checkpointing is reentrant in several processes, where DDP silently averages the
                gradient of a shared vector before all of its parts have been added, or in a mixed batch, whose vectors
                it would not reach; or the model uses DeepSpeed ZeRO-3 or tensor parallelism.
        """
        self.choices.enter(root, args, kwargs)
        if hasattr(self._like[0], "ds_id"):
            raise RuntimeError(
                "DeepSpeed ZeRO-3 splits parameters that the adapter must read whole. Use ZeRO-2, DDP or FSDP2."
            )
        if split := [name for adapter, name in self.split.items() if adapter in self.intrinsic_theta]:
            raise RuntimeError(
                f"{split[0]} is a DTensor: it was split over devices before the adapter was attached. Tensor "
                "parallelism is not supported: load the model without tp_plan, or choose target_modules that are not "
                "split. With FSDP 2, attach the adapter before fully_shard."
            )
        choices, distributed = self.choices, torch.distributed.is_available() and torch.distributed.is_initialized()
        several = distributed and torch.distributed.get_world_size() > 1
        if not self.training or not (several or choices.differentiated):
            return
        for module in root.modules():
            if not getattr(module, "gradient_checkpointing", False):
                continue
            function = getattr(module, "_gradient_checkpointing_func", None)
            if (several or choices.open) and getattr(function, "keywords", {}).get("use_reentrant") is not False:
                raise RuntimeError(
                    "Reentrant gradient checkpointing in several processes, or of a batch with several adapters, gives "
                    "wrong gradients for a shared θ. Pass gradient_checkpointing_kwargs={'use_reentrant': False} to "
                    "TrainingArguments, to gradient_checkpointing_enable() or to prepare_model_for_kbit_training()."
                )
            if (
                not isinstance(function, partial)
                or function.func == choices.checkpoint
                or torch.compiler.is_compiling()
            ):
                continue
            checkpoint = partial(choices.checkpoint, function.func, *function.args, **function.keywords)
            module.__dict__["_gradient_checkpointing_func"] = checkpoint

    def _leave(self, root: nn.Module, args: Any, output: Any) -> None:
        if self.choices.open:
            self.choices.leave()
