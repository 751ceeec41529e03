"""Wrappers of linear layers and embeddings, which never materialize a whole offset."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..projection import TensorProjection
from .batches import spread
from .layer import IntrinsicLayer
from .module_types import linear_features
from .vector import IntrinsicVector


class IntrinsicModule(nn.Module, IntrinsicLayer):
    """A wrapper that computes `base_layer(x)` plus the contribution of P.

    Attributes that it lacks are those of the base layer. Its parameters are read with their offsets.
    """

    mixable = True
    base_layer: Any

    def __init__(self, base_layer: nn.Module, vector: IntrinsicVector) -> None:
        nn.Module.__init__(self)
        IntrinsicLayer.__init__(self, vector)
        self.base_layer = base_layer
        self.train(base_layer.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not there yet, or never
                raise
            return getattr(self.base_layer, name)

    def base_parameter(self, name: str) -> Any:
        """A parameter of the base layer, also if accelerate has offloaded it."""
        parameter = super().base_parameter(name)
        offloaded = getattr(getattr(self.base_layer, "_hf_hook", None), "weights_map", None)
        if offloaded is None or parameter is None or not parameter.is_meta:
            return parameter
        return offloaded[name].to(self.base_layer._hf_hook.execution_device)

    def __repr__(self) -> str:
        return "intrinsic." + super().__repr__()


class IntrinsicLinear(IntrinsicModule):
    """Wrapper of a linear or Conv1D layer, plain or quantized. The factored form never reads the base weight."""

    def __init__(self, base_layer: Any, vector: IntrinsicVector) -> None:
        super().__init__(base_layer, vector)
        self.in_features, self.out_features = linear_features(base_layer)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        applied, base = self.applied(), self.base_layer
        biases = [one for one in applied if one[0] == "bias" and one[2].dim() == 1]
        if biases and _is_plain(base):  # add to the bias instead of to the outputs, which are many more
            bias = base.bias
            for _, offset, each in biases:
                added = offset.materialize(each.to(x.device)).to(base.weight.dtype)
                bias = added if bias is None else bias + added
            result = F.linear(x, base.weight, bias)
            applied = [one for one in applied if one[0] == "weight"]
        else:
            result = base(x, *args, **kwargs)
        for name, offset, each in applied:
            theta, rows = self.vector.choices.match(offset.name, each, x)
            added = (
                offset.projection.linear(rows, theta) if name == "weight" else spread(offset.materialize(theta), rows)
            )
            result = result + added.to(result.dtype)
        return result

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's converter can represent the offset: it converts only weights."""
        return list(self.offsets.get(adapter_name, {})) == ["weight"]


def _is_plain(layer: nn.Module) -> bool:
    """Whether a call of the layer is a call of `F.linear`: no quantized layer, no hook that has to see the call."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return type(layer) is nn.Linear and not hooked and "forward" not in layer.__dict__


class IntrinsicEmbedding(IntrinsicModule):
    """Wrapper of an embedding. Only the rows that are looked up are computed."""

    def __init__(self, base_layer: Any, vector: IntrinsicVector) -> None:
        super().__init__(base_layer, vector)
        self.in_features, self.out_features = base_layer.num_embeddings, base_layer.embedding_dim

    def forward(self, index: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(index, *args, **kwargs)
        for _, offset, each in self.applied():
            theta, rows = self.vector.choices.match(offset.name, each, index)
            added = self._without_padding(offset.projection, rows, theta)
            scale = self._get_embed_scale()
            result = result + (added if scale is None else added * scale).to(result.dtype)
        return result

    def _without_padding(self, projection: TensorProjection, index: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        """The rows of the offset, without a gradient of the padding row, as in torch."""
        added, padding = projection.gather(index, theta), self.base_layer.padding_idx
        if padding is None:
            return added
        if theta.dim() > 1:  # one padding row for each sample
            return torch.where(index.unsqueeze(-1) == padding, added.detach(), added)
        # torch's own lookup, so that function transforms work as with a plain embedding.
        row = projection.gather(index.new_full((1,), padding), theta)
        position = torch.arange(index.numel(), device=index.device).view(index.shape)
        table = torch.cat([added.flatten(0, -2), row])
        return F.embedding(torch.where(index == padding, index.numel(), position), table, padding_idx=index.numel())
