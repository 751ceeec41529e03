"""A wrapper, or a pair of hooks, for each kind of targeted module."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from .layer import IntrinsicLayer
from .vector import IntrinsicVector


def linear_features(layer: Any) -> tuple[int, int]:
    """(in, out) features of a linear layer, plain, Conv1D or quantised."""
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    nx, nf = layer.weight.shape  # Conv1D stores [in, out]
    return nx, nf


def per_sample(theta: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """θ on x's device. Where every sample has its own, θ and x brought to the same length.

    Beams and returned sequences repeat each sample; positions and the like come once for all.

    Raises:
        ValueError: the batch is no multiple of the chosen samples.
    """
    theta = theta.to(x.device)
    if theta.dim() == 1 or len(theta) == len(x):
        return theta, x
    if len(x) == 1:
        return theta, x.expand(len(theta), *x.shape[1:])
    if x.dim() < 2 or len(x) % len(theta):
        raise ValueError(
            f"Adapters were chosen for {len(theta)} samples, but a layer got an input of shape {tuple(x.shape)}. "
            "Choose one per sample. Layers whose input is not batch first cannot be mixed: exclude them."
        )
    return theta.repeat_interleave(len(x) // len(theta), 0), x


def spread(vectors: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A vector for every sample, `[batch, k]`, shaped to broadcast over x, `[batch, …, k]`. A single one as it is."""
    return vectors if vectors.dim() == 1 else vectors.view(len(x), *[1] * (x.dim() - 2), -1)


def affine(module: nn.Module) -> bool:
    """A norm that multiplies and adds its parameters along the last axis."""
    if type(module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward):
        return len(module.normalized_shape) == 1  # type: ignore[arg-type]
    named = "RMSNorm" in type(module).__name__ or type(module).__name__.endswith("LayerNorm")
    return named and not isinstance(module, nn.LayerNorm) and all(p.dim() == 1 for p in module.parameters())


class IntrinsicModule(nn.Module, IntrinsicLayer):
    """Any leaf module, its parameters materialised: norms, convolutions, and whatever has no factored form."""

    base_layer: Any

    def __init__(self, base_layer: nn.Module, vector: IntrinsicVector) -> None:
        nn.Module.__init__(self)
        IntrinsicLayer.__init__(self, vector)
        self.base_layer = base_layer
        self.shallow = False  # a parent looks at the type of the weight: not worth making it

    def __getattr__(self, name: str) -> Any:
        """What the wrapper lacks is the base layer's: parameters with offsets, methods that see them, and the rest."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not there yet, or never
                raise
            found = getattr(self.base_layer, name)
            if isinstance(found, nn.Parameter):
                return self._value(name, found)
            return self._with_offsets(found) if getattr(found, "__self__", None) is self.base_layer else found

    def _value(self, name: str, base: Any) -> Any:
        """A parameter for readers that do not call the layer: with its offset, unless it is quantised or offloaded."""
        plain = isinstance(base, torch.Tensor) and base.is_floating_point() and not base.is_meta
        return self._effective().get(name, base) if plain and not self.shallow else base

    def _with_offsets(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._in_place():
                return method(*args, **kwargs)

        return run

    @property
    def weight(self) -> Any:
        """The weight with its offset, for readers that do not call the layer."""
        return self._value("weight", self.base_layer.weight)

    @property
    def bias(self) -> Any:
        """Likewise."""
        return self._value("bias", self.base_layer.bias)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        base = self.base_layer
        hook = getattr(base, "_hf_hook", None)
        if hook is None:
            with self._in_place():
                return base(*args, **kwargs)
        # accelerate: an offloaded layer has its parameters only between these two calls.
        args, kwargs = hook.pre_forward(base, *args, **kwargs)
        with self._in_place():
            output = cast(Any, base)._old_forward(*args, **kwargs)
        return hook.post_forward(base, output)

    def __repr__(self) -> str:
        return "intrinsic." + super().__repr__()


class IntrinsicNorm(IntrinsicModule):
    """Norms over the last axis. In a mixed batch the parameters get a batch axis of their own."""

    mixable = True

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        applied = self._applied()
        if not applied or applied[0][2].dim() == 1:
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        values: dict[str, Any] = dict(base.named_parameters())
        for name, offset, each in applied:
            theta, x = per_sample(each, x)
            values[name] = values[name] + spread(offset.materialise(theta), x).to(x.dtype)
        if not isinstance(base, nn.LayerNorm | nn.RMSNorm):
            with self._in_place(values):
                return base(x, *args, **kwargs)
        # torch's own kernels insist on the shape of the parameters: normalise without any, then apply them.
        with self._in_place(dict.fromkeys(values)):
            x = base(x) * values["weight"]
        return x if values.get("bias") is None else x + values["bias"]


class IntrinsicLinear(IntrinsicModule):
    """Linear and Conv1D layers, plain or quantised. The factored form never reads the base weight."""

    mixable = True

    def __init__(self, base_layer: Any, vector: IntrinsicVector) -> None:
        super().__init__(base_layer, vector)
        self.in_features, self.out_features = linear_features(base_layer)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        for name, offset, each in self._applied():
            theta, x = per_sample(each, x)
            if name == "weight":
                added = offset.projection.linear(x.to(theta.dtype), theta)
            else:
                added = spread(offset.materialise(theta), x)
            result = result + added.to(result.dtype)
        return result

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's converter can hold the offset: it looks at the weight alone."""
        return list(self.offsets.get(adapter_name, {})) == ["weight"]


class IntrinsicEmbedding(IntrinsicModule):
    """Embeddings: only the rows that are looked up are made."""

    mixable = True

    def __init__(self, base_layer: Any, vector: IntrinsicVector) -> None:
        super().__init__(base_layer, vector)
        self.in_features, self.out_features = base_layer.num_embeddings, base_layer.embedding_dim

    def forward(self, index: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(index, *args, **kwargs)
        for _, offset, each in self._applied():
            theta, index = per_sample(each, index)
            added = offset.projection.gather(index, theta)
            if self.base_layer.padding_idx is not None and theta.requires_grad:  # torch gives that row no gradient
                added = torch.where(index.unsqueeze(-1) == self.base_layer.padding_idx, added.detach(), added)
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
        scope = self._in_place()
        scope.__enter__()
        self._open.append(scope)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._open:
            self._open.pop().__exit__(None, None, None)

    def remove(self) -> None:
        """Leave the model."""
        for handle in self._handles:
            handle.remove()
        self.vector.hooked = nn.ModuleList(layer for layer in self.vector.hooked if layer is not self)
