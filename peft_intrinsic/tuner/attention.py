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
from .base_model import base_modules
from .module_types import is_linear, is_norm, linear_features, own_class

OUTPUTS = {
    "v_proj": ("o_proj", "out_proj", "dense"),
    "self.value": ("output.dense",),
    "v_lin": ("out_lin",),
    "v": ("o",),
    "c_attn": ("c_proj",),
}
"""Names of value projections, and of the output projections beside each. GPT-2's `c_attn` has the values last."""

NORMS = ("input_layernorm", "ln_1")
"""Names of norms beside an attention layer that compute its input in every class that has them."""


MAX_SPREAD = 3.0
"""Largest `read_spread` at which the size of values is known from weights.

SmolLM2-135M has 1.8 at most, and Gemma 3 270M has 8.0: there the size is estimated far too large, because the inputs
with large gains are small.
"""

SAMPLES = (8, 64)
"""Sequences of random tokens, and tokens in each, whose inputs of the value projections `"value_lora"` measures."""

RIDGE = 0.01
"""Penalty of the regression on these inputs, in multiples of their mean square."""


def find_value_projections(model: nn.Module, projection: str | None = None) -> dict[str, ValueBias]:
    """Find the value projections of attention layers, by the names of the parameters to adapt.

    These are weights under `"value_lora"`, and otherwise biases, whether the layers have one or not. What base weights
    say about them is read later, by `ValueBias.read` and `read_input`. Attention to an encoder counts only where the
    model has one.
    """
    modules = dict(base_modules(model))
    folded = projection == "value_lora"
    layers: dict[str, nn.Module] = {}
    inputs = cache(partial(_fit_inputs, model, layers))
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", True)

    def find(parent: str, names: Iterable[str]) -> str | None:
        return next((name for each in names if (name := f"{parent}.{each}".lstrip(".")) in modules), None)

    result = {}
    for name, value in modules.items():
        own = next((own for own in OUTPUTS if f".{name}".endswith(f".{own}")), "")
        attention, fused = name.removesuffix(own).rstrip("."), own == "c_attn"
        output = find(attention, OUTPUTS.get(own, ()))
        block, _, layer = attention.rpartition(".")
        crosses = "cross" in layer or layer in ("encoder_attn", "EncDecAttention")
        if output is None or fused != isinstance(value, Conv1D) or (crosses and not encodes):
            continue
        if not (is_linear(value) and is_linear(modules[output])):
            continue
        rows, read = linear_features(value)[1], linear_features(modules[output])[0]
        size = read if fused else rows
        head = size if read == size else getattr(modules[attention], "head_dim", None)
        if not head or size % head or read % size:  # the values do not reach the output as they are
            continue
        norm = None if crosses else find(block, NORMS)  # there it computes the input of the queries
        read_all = partial(_read, model, modules, name, output, norm, size, head)
        read_input = partial(lambda name: inputs()[name], name) if folded else None
        layers[name] = value
        read_spread = cache(partial(_read_spread, model, modules, name, norm, size))
        own = "weight" if folded else "bias"
        result[f"{name}.{own}"] = ValueBias(rows - size, size, read_all, read_input, read_spread)
    return result


def _read(
    model: Any, modules: Mapping[str, Any], name: str, output: str, norm: str | None, size: int, head: int
) -> tuple[np.ndarray, float]:
    """Read the map from a bias of the values to the layer's output, `float64[hidden, n_v]`, and the size of the values.

    Query heads that use the values of the same head are summed. The size is half the root mean square of the values of
    inputs with independent entries of variance one before the gain of the norm.

    Raises:
        ValueError: an adapter is merged into these weights, or they have no finite values here.
    """
    merged = [layer.get_base_layer() for layer in model.modules() if getattr(layer, "merged_adapters", None)]
    for key in (output, name, norm):
        if key and any(modules[key] is base for base in merged):
            raise ValueError(
                f"projection='value_bias' reads the weights of {key}, but an adapter is merged into them. Call "
                "unmerge_adapter() first, or use projection='fastfood'."
            )
    read, weight = (_read_weight(model, key, modules[key]) for key in (output, name))
    summed = read.reshape(len(read), size // head, -1, head).sum(2).reshape(len(read), size)
    weight = weight[-size:] * (_read_gain(norm, modules[norm]) if norm and is_norm(modules[norm]) else 1.0)
    return summed, float(np.sqrt(np.square(weight).sum() / size)) / 2


@torch.no_grad()
def _fit_inputs(model: Any, layers: Mapping[str, nn.Module]) -> dict[str, np.ndarray]:
    """Fit a vector for each layer whose product with all inputs is about one, by ridge regression.

    The inputs are those of the base model for random tokens, the same for every adapter.

    Raises:
        ValueError: the model does not run on tokens alone, or an adapter is merged.
    """
    inner = getattr(model, "base_model", model)
    wrappers: list[Any] = [
        each for each in model.modules() if isinstance(each, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    if any(getattr(each, "merged_adapters", None) for each in wrappers):
        raise ValueError("projection='value_lora' runs the base model, but an adapter is merged into it. Unmerge it.")
    active = [each for each in wrappers if not each.disable_adapters]
    training = [module for module in model.modules() if module.training]
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        for name, module in layers.items()
    ]
    try:
        for each in active:
            each._disable_adapters = True
        model.eval()
        vocabulary = model.get_input_embeddings().num_embeddings
        tokens = words(0, "tokens", "", SAMPLES[0] * SAMPLES[1]) % np.uint64(vocabulary)
        device = next(model.parameters()).device
        ids = torch.from_numpy(tokens.astype(np.int64)).view(SAMPLES).to(device)
        decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        inner(input_ids=ids, **decoder)
    except Exception as error:
        raise ValueError(
            f"projection='value_lora' runs the base model on tokens when it is attached, which failed for "
            f"{type(model).__name__}: {error}. Load the whole base model, or use another projection."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for each in active:
            each._disable_adapters = False
        for module in training:
            module.training = True
    return {
        name: _fit_constant(_to_double(f"the inputs of {name}", x).flatten(0, -2).numpy()) for name, x in seen.items()
    }


def _fit_constant(x: np.ndarray) -> np.ndarray:
    """Fit a with x a ≈ 1 by ridge regression, in the dual form: `float64[samples, cols] -> float64[cols]`."""
    gram = x @ x.T
    penalty = RIDGE * np.trace(gram) / x.shape[1]
    return cast(np.ndarray, x.T @ np.linalg.solve(gram + penalty * np.eye(len(x)), np.ones(len(x))))


def _read_spread(model: Any, modules: Mapping[str, Any], name: str, norm: str | None, size: int) -> float:
    """Compare the root mean square of the columns' sizes with their median: 1 where all inputs count alike."""
    weight = _read_weight(model, name, modules[name])[-size:]
    gain = np.abs(_read_gain(norm, modules[norm])) if norm and is_norm(modules[norm]) else 1.0
    columns = np.sqrt(np.square(weight).mean(0)) * gain
    return float(np.sqrt(np.square(columns).mean()) / max(np.median(columns), 1e-30))


def _read_weight(model: Any, name: str, module: Any) -> np.ndarray:
    """Read the weight of a linear layer, dequantized: `float64[out, in]`."""
    data = _stored(module, "weight")
    if type(data) is not torch.Tensor or not data.is_floating_point() or data.element_size() < 2:
        try:
            backend: Any = resolve_quantization_backend(module, **get_quantization_kwargs(model))
            data = backend.get_base_weight(module)
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


def _read_gain(name: str, norm: Any) -> Any:
    """Measure by how much a norm multiplies each entry, up to the sign: `float64[hidden]`, or 1 without parameters.

    Its class decides whether that is the weight, or the weight plus one as in Gemma. It is applied without its adapters
    to a vector of ±1 and to its negative, so that the bias of the norm cancels. If the class runs
    on GPUs alone, its weight is returned.
    """
    present = [own for own, parameter in norm._parameters.items() if parameter is not None]
    values = {own: _to_double(f"{name}.{own}", _stored(norm, own)) for own in present}
    if not values:
        return 1.0
    plain: Any = object.__new__(own_class(norm))
    plain.__dict__.update({**norm.__dict__, "_parameters": {**norm._parameters, **values}})
    x = torch.ones(len(values[present[0]]), dtype=torch.float64, device="cpu")
    x[1::2] = -1
    forward = type(plain).forward
    try:
        return ((forward(plain, x) - forward(plain, -x)) / 2).numpy()
    except Exception:  # from any kernel
        return values["weight"].numpy() if "weight" in values else 1.0
