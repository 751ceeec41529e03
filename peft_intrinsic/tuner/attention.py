"""The value projections of a model's attention layers, and what the base weights say about a bias of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache, partial
from typing import Any, cast

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..projection import ValueBias
from ..projection.randomness import words
from .base_model import base_modules, evaluation_mode
from .merging import dequantize
from .module_types import is_linear, linear_features

OUTPUTS = {
    "v_proj": ("o_proj", "out_proj", "dense"),
    "self.value": ("output.dense",),
    "v_lin": ("out_lin",),
    "v": ("o",),
    "c_attn": ("c_proj",),
}
"""Names of value projections, and of the output projections beside each. GPT-2's `c_attn` has the values last."""

SAMPLES = (8, 64)
"""Sequences of random tokens, and most tokens in each, for which the value projections are measured."""

RIDGE = 0.01
"""Penalty of the regression on their inputs, in multiples of the mean square."""


def find_value_projections(model: nn.Module, projection: str | None = None) -> dict[str, ValueBias]:
    """Find the value projections of attention layers, by the names of the parameters to adapt.

    These are weights under `"value_lora"`, and otherwise biases, whether the layers have one or not. What base weights
    say about them is read later, by `ValueBias.read_map` and `measure`. Attention to an encoder counts only where the
    model has one.
    """
    modules = dict(base_modules(model))
    folded = projection == "value_lora"
    layers: dict[str, tuple[nn.Module, int]] = {}
    measured = cache(partial(_measure, model, layers, folded))
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", True)

    def find(parent: str, names: Iterable[str]) -> str | None:
        return next((name for each in names if (name := f"{parent}.{each}".lstrip(".")) in modules), None)

    result = {}
    for name, value in modules.items():
        own = next((own for own in OUTPUTS if f".{name}".endswith(f".{own}")), "")
        attention, fused = name.removesuffix(own).rstrip("."), own == "c_attn"
        output = find(attention, OUTPUTS.get(own, ()))
        layer = attention.rpartition(".")[2]
        crosses = "cross" in layer or layer in ("encoder_attn", "EncDecAttention")
        if output is None or fused != isinstance(value, Conv1D) or (crosses and not encodes):
            continue
        if not (is_linear(value) and is_linear(modules[output])):
            continue
        rows, read = linear_features(value)[1], linear_features(modules[output])[0]
        size = read if fused else rows
        head = size if read == size else getattr(modules[attention], "head_dim", None)
        differs = hasattr(modules[attention], "lambda_q1")  # DiffLlama, which subtracts two maps and normalizes
        if differs or not head or size % head or read % size:  # the values do not reach the output as they are
            continue
        layers[name] = value, size
        read_map = partial(_read_map, model, output, modules[output], size, head)
        measure = partial(lambda name: measured()[name], name)
        result[f"{name}.{'weight' if folded else 'bias'}"] = ValueBias(rows - size, size, folded, read_map, measure)
    return result


def _read_map(model: Any, name: str, module: Any, size: int, head: int) -> np.ndarray:
    """Read the map from a bias of the values to the layer's output, `float64[hidden, n_v]`.

    Query heads that use the values of the same head are summed.

    Raises:
        ValueError: an adapter is merged into the output projection, or it has no finite weights here.
    """
    if any(each.get_base_layer() is module for each in model.modules() if getattr(each, "merged_adapters", None)):
        raise ValueError(
            f"projection='value_bias' reads the weights of {name}, but an adapter is merged into them. Call "
            "unmerge_adapter() first, or use projection='fastfood'."
        )
    weight = _read_weight(model, name, module)
    return weight.reshape(len(weight), size // head, -1, head).sum(2).reshape(len(weight), size)


@torch.no_grad()
def _measure(
    model: Any, layers: Mapping[str, tuple[nn.Module, int]], folded: bool
) -> dict[str, tuple[float, np.ndarray | None]]:
    """Measure the root mean square of the values of each layer, and for `"value_lora"` fit a constant to its inputs.

    The base model runs on random tokens, the same for every adapter.

    Raises:
        ValueError: the model does not run on tokens alone, or an adapter is merged.
    """
    inner = getattr(model, "base_model", model)
    wrappers: list[Any] = [
        each for each in model.modules() if isinstance(each, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    if any(getattr(each, "merged_adapters", None) for each in wrappers):
        raise ValueError(
            "Value biases are scaled by a run of the base model, but an adapter is merged into it. Call "
            "unmerge_adapter() first, or use projection='fastfood'."
        )
    active = [each for each in wrappers if not each.disable_adapters]
    result: dict[str, tuple[float, np.ndarray | None]] = {}

    def record(name: str, size: int, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        values = _to_double(f"the values of {name}", output)[..., -size:]
        inputs = _to_double(f"the inputs of {name}", args[0]).flatten(0, -2).numpy() if folded else None
        result[name] = float(values.square().mean().sqrt()), None if inputs is None else _fit_constant(inputs)

    hooks = [module.register_forward_hook(partial(record, name, size)) for name, (module, size) in layers.items()]
    try:
        for each in active:
            each._disable_adapters = True
        vocabulary = 1 << (model.get_input_embeddings().num_embeddings.bit_length() - 1)  # without most added tokens
        count, limit = SAMPLES[0], getattr(model.config.get_text_config(), "max_position_embeddings", SAMPLES[1])
        tokens = words(0, "tokens", "", count * min(SAMPLES[1], limit)) % np.uint64(vocabulary)
        device = next((p.device for p in model.parameters() if not p.is_meta), "cpu")  # offloaded ones are on meta
        ids = torch.from_numpy(tokens.astype(np.int64)).view(count, -1).to(device)
        decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        with evaluation_mode(model):
            inner(input_ids=ids, **decoder)
    except Exception as error:
        raise ValueError(
            f"Value biases are scaled by a run of the base model on tokens, which failed for {type(model).__name__}: "
            f"{error}. Load the whole base model, or use projection='fastfood'."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for each in active:
            each._disable_adapters = False
    return result


def _fit_constant(x: np.ndarray) -> np.ndarray:
    """Fit a with x a ≈ 1 by ridge regression, in the dual form: `float64[samples, cols] -> float64[cols]`."""
    gram = x @ x.T
    penalty = RIDGE * np.trace(gram) / x.shape[1]
    return cast(np.ndarray, x.T @ np.linalg.solve(gram + penalty * np.eye(len(x)), np.ones(len(x))))


def _read_weight(model: Any, name: str, module: Any) -> np.ndarray:
    """Read the weight of a linear layer, dequantized: `float64[out, in]`."""
    data = _stored(module, "weight")
    if type(data) is not torch.Tensor or not data.is_floating_point() or data.element_size() < 2:
        try:
            backend: Any = resolve_quantization_backend(module, **get_quantization_kwargs(model))
            data = dequantize(backend, module)
        except (AttributeError, NotImplementedError, TypeError, ValueError):
            data = None
    values = _to_double(f"{name}.weight", data).numpy()
    return values.T if isinstance(module, Conv1D) else values


def _stored(module: Any, own: str) -> Any:
    """The data of a parameter, also where accelerate has offloaded it."""
    parameter = module._parameters.get(own)
    offloaded = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    if offloaded is not None and parameter is not None and parameter.is_meta:
        parameter = offloaded[own]
    return getattr(parameter, "data", None)


def _to_double(name: str, data: Any) -> torch.Tensor:
    """Copy values to the CPU, in float64.

    Raises:
        ValueError: there are none, or not all are finite.
    """
    if type(data) is not torch.Tensor or data.is_meta or not data.numel():  # ZeRO-3 leaves empty ones
        raise ValueError(
            f"projection='value_bias' needs the values of {name}, but they are on the meta device, split over devices, "
            "or quantized in a way that PEFT cannot undo. Load the whole base model, or use projection='fastfood'."
        )
    values = data.detach().to("cpu", torch.float64)
    if not values.isfinite().all():
        raise ValueError(f"{name} contains values that are not finite. Load a base model without them.")
    return values
