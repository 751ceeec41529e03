"""Kinds of modules, and the matrix view of their parameters."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..projection import Kind, Shape

QUANTIZED = (
    *("bitsandbytes", "hqq", "aqlm", "eetq", "gptqmodel", "awq", "vptq", "spqr_quant", "auto_round"),
    *("compressed_tensors", "optimum", "neural_compressor"),
)
"""Packages whose layers named …Linear… compute x·Wᵀ + b from weights that only they can read."""

LAYER = "_intrinsic_layer"
"""The attribute with the tuner layer of a module that is not wrapped, but whose parameters are adapted."""


def own_class(module: nn.Module) -> type:
    """The class of a module before its parameters were adapted without a wrapper."""
    layer = module.__dict__.get(LAYER)
    return type(module) if layer is None else layer.kind


def is_linear(module: nn.Module) -> bool:
    """Whether the layer's own forward is known to compute x·Wᵀ + b.

    These are plain layers, quantized tensors in plain layers (torchao), and the layers of known quantization libraries.
    A subclass may compute anything from its weight (a router, a mask, a cosine), and so may a layer whose forward was
    replaced or whose weight is made by a hook (weight norm, pruning).
    """
    kind = own_class(module)
    if kind in (nn.Linear, Conv1D, nn.modules.linear.NonDynamicallyQuantizableLinear):
        replaced = "forward" in module.__dict__ and not hasattr(module, "_hf_hook")  # accelerate calls the layer's own
        return not replaced and "weight" in module._parameters
    known = kind.__module__.partition(".")[0] in QUANTIZED or kind.__module__.startswith("transformers.integrations.")
    return known and "Linear" in kind.__name__ and hasattr(module, "in_features") and hasattr(module, "out_features")


def is_embedding(module: nn.Module) -> bool:
    """Whether the layer's own forward is known to look up rows and at most to scale them."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None or "forward" in module.__dict__:
        return False
    kind = own_class(module)
    scaled = kind.__module__.startswith("transformers.models.") and kind.__name__.endswith("ScaledWordEmbedding")
    return (kind is nn.Embedding or scaled) and "weight" in module._parameters


def is_norm(module: nn.Module) -> bool:
    """Whether the module multiplies and adds its parameters along the last axis."""
    kind = own_class(module)
    if kind in (nn.LayerNorm, nn.RMSNorm):
        return len(module.normalized_shape) == 1  # type: ignore[arg-type]
    named = "RMSNorm" in kind.__name__ or kind.__name__.endswith("LayerNorm")
    return named and not isinstance(module, nn.LayerNorm) and all(p.dim() == 1 for p in module.parameters())


def linear_features(layer: Any) -> tuple[int, int]:
    """(in, out) features of a linear layer, plain, Conv1D or quantized."""
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    nx, nf = layer.weight.shape  # Conv1D stores [in, out]
    return nx, nf


def adaptable_names(module: nn.Module) -> list[str]:
    """Names of the parameters of the module itself, without its children, that can get an offset."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    real = [name for name, p in own.items() if p.is_floating_point() and p.element_size() > 1]
    return ["weight", *(name for name in real if name == "bias")] if is_linear(module) else real


def logical_shape(module: nn.Module, name: str) -> tuple[tuple[int, ...], bool]:
    """Shape of a parameter, unpacked where it is quantized, and whether its matrix view is transposed."""
    if name == "weight" and is_linear(module):
        cols, rows = linear_features(module)
        return ((cols, rows), True) if isinstance(module, Conv1D) else ((rows, cols), False)
    if dict(module._parameters).get(name) is None:  # an added bias; scripted modules hold no dictionary
        return (linear_features(module)[1],), False
    return tuple(module._parameters[name].shape), False  # type: ignore[union-attr]


def is_vector(module: nn.Module, name: str) -> bool:
    """Whether a parameter has at most one axis: a bias, or the weight of a norm."""
    return len(logical_shape(module, name)[0]) < 2


def matrix_view(module: nn.Module, name: str, head: bool = False) -> Shape:
    """The matrix that P sees for a parameter, and its kind (definition: README of the projection)."""
    shape, transposed = logical_shape(module, name)
    size = math.prod(shape)
    if len(shape) < 2:
        return Shape(size, 1, "norm" if is_norm(module) else "bias")
    cols = shape[0] if transposed else shape[-1]
    if isinstance(module, nn.modules.conv._ConvNd):
        cols = size // shape[0]
    kind: Kind = "head" if head else "embedding" if isinstance(module, nn.Embedding) else "matrix"
    return Shape(size // cols, cols, kind, transposed)
