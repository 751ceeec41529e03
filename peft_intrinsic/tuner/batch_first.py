"""Modules whose first axis is the batch, so that each sample can have its own adapter there."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain, count, islice
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from .module_types import LAYER

STATE = ("past_key_values", "cache_params")
"""Names of arguments that a forward pass changes."""

SIZED = ("mask", "position_ids", "cache_position")
"""Ends of the names of arguments whose length can include that of the state."""


def named_arguments(root: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a forward pass by name, or by number if the name is unknown."""
    try:
        bound = inspect.signature(root.forward).bind(*args, **kwargs)
    except TypeError:  # the pass itself raises the error
        return {**{str(i): value for i, value in enumerate(args)}, **kwargs}
    result: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            result |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            result |= {str(i): each for i, each in enumerate(value)}
        else:
            result[name] = value
    return result


def count_samples(root: nn.Module, arguments: dict[str, Any]) -> int | None:
    """Count the samples of a forward pass: the length of its main input, otherwise of the first tensor with axes."""
    for name in (getattr(root, "main_input_name", None), "input_ids", "inputs_embeds"):
        if isinstance(value := arguments.get(str(name)), torch.Tensor) and value.dim() > 1:
            return len(value)
    tensors = [leaf for leaf in tree_leaves(list(arguments.values())) if isinstance(leaf, torch.Tensor)]
    sized = [tensor for tensor in tensors if tensor.dim() > 1] or [tensor for tensor in tensors if tensor.dim()]
    return len(sized[0]) if sized else None  # rather not of positions, `[tokens]`


def _variants(arguments: dict[str, Any], rows: int, size: int) -> Iterator[dict[str, Any]]:
    """Arguments for a batch of `size` samples, made from those of a batch of `rows`, in the order of the attempts:
    without tensors of one axis, which may have an entry for each token; with them; without those that fit a state."""
    usable = {}
    for name, value in arguments.items():
        plain = all(isinstance(leaf, torch.Tensor | bool | int | float | str | None) for leaf in tree_leaves(value))
        if plain and name not in STATE:
            usable[name] = value
    index = torch.arange(size) % rows

    def resized(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[index.to(tensor.device)] if tensor.dim() and len(tensor) == rows else tensor

    longer = {k: v for k, v in usable.items() if not (isinstance(v, torch.Tensor) and v.dim() == 1)}
    tried: list[set[str]] = []
    for some in (longer, usable, {k: v for k, v in longer.items() if not k.endswith(SIZED)}):
        if set(some) not in tried:
            tried.append(set(some))
            yield tree_map_only(torch.Tensor, resized, some)


@contextmanager
def _unchanged(root: nn.Module) -> Iterator[None]:
    """Within this context, forward passes do not change buffers and random states."""
    buffers = [
        (module, name, b, b.clone(), None if b.is_inference() else b._version)
        for module in root.modules()
        for name, b in module._buffers.items()
        if b is not None
    ]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        for module, name, buffer, value, version in buffers:
            if version is None or buffer._version != version:  # a write would break an earlier graph's backward pass
                buffer.copy_(value)
            module._buffers[name] = buffer


def _is_first(shape: torch.Size, size: int) -> bool | None:
    """Whether the first of these axes is the batch; None where one row serves all samples, as for positions."""
    return None if shape[:1] == (1,) and size not in shape[1:] else len(shape) > 0 and shape[0] == size


def batch_first(
    root: nn.Module, rows: int, arguments: dict[str, Any], is_own: Callable[[], bool] = lambda: True
) -> dict[str, bool]:
    """Find out whether the first axis of a module's input is the batch in every call, by adapted parameter.

    Two forward passes with other batch sizes prove or disprove it, by whether the length of that axis follows. A pass
    that fails proves nothing for the modules that it has not called. torch's own attention layers have an attribute
    (`batch_first`).

    Args:
        rows: number of samples in the batch.
        arguments: of the forward pass, by name.
        is_own: whether the running pass is one of these two, and not of another thread.
    """
    found = dict.fromkeys(each for module in root.modules() for each in (module, module.__dict__.get(LAYER)))
    layers: list[Any] = [layer for layer in found if getattr(layer, "mixable", False)]
    tensors = [leaf for leaf in tree_leaves(list(arguments.values())) if isinstance(leaf, torch.Tensor)]
    lengths = {size for tensor in tensors for size in tensor.shape}
    result: dict[str, bool] = {}

    def conclude(layer: Any, first: bool) -> None:
        for offset in chain(*(own.values() for own in layer.offsets.values())):
            result[offset.name] = first and result.get(offset.name, True)

    def note(module: nn.Module, inputs: Any, layer: Any, size: int) -> None:
        shape = inputs[0].shape if isinstance(module, nn.Embedding) else inputs[0].shape[:-1]
        first = _is_first(shape, size) if inputs[0].dim() > 1 else False
        if first is not None and is_own():
            conclude(layer, first)

    with _unchanged(root):
        for size in islice((size for size in count(2) if size not in lengths), 2):
            with ExitStack() as stack:
                for layer in layers:
                    hook = partial(note, layer=layer, size=size)
                    stack.callback(layer.get_base_layer().register_forward_pre_hook(hook).remove)
                for variant in _variants(arguments, rows, size):
                    numbered = [variant.pop(str(i)) for i in range(len(variant)) if str(i) in variant]
                    try:
                        root.forward(*numbered, **variant)
                        break
                    except Exception:  # modules that were called are known
                        continue
    attention = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    late = [m for m in root.modules() if isinstance(m, attention) and not m.self_attn.batch_first]
    inside = {module for each in late for module in each.modules()}
    for layer in layers:
        if layer.get_base_layer() in inside:
            conclude(layer, False)
    return result


def without_samples(root: nn.Module) -> set[nn.Module]:
    """The modules whose rows need not be the samples, of models for several kinds of input, such as text and images.

    A sample can have several images or sounds. The part with the word embeddings gets them as tokens of their samples.
    If the sound or image is the sample itself, as in Whisper, the rows of encoder and decoder are the samples.
    """
    models = [module for module in root.modules() if isinstance(module, PreTrainedModel)]
    inner = {module for model in models for module in model.modules() if module is not model}
    outer = [model for model in models if model not in inner]
    return {module for model in outer if _has_several_inputs(model) for module in set(model.modules()) - _text(model)}


def _has_several_inputs(model: PreTrainedModel) -> bool:
    kinds = getattr(model, "input_modalities", "text")
    inputs = {str(module.main_input_name) for module in model.modules() if isinstance(module, PreTrainedModel)}
    return len(inputs) > 1 or (not isinstance(kinds, str) and "text" in kinds and len(kinds) > 1)


def _text(model: PreTrainedModel) -> set[nn.Module]:
    """The modules whose rows are the samples; none if it is unknown which part reads text."""
    try:
        words = model.get_input_embeddings()
    except NotImplementedError:
        return set()
    parts = [words, model.get_output_embeddings()]
    models = [m for m in model.modules() if isinstance(m, PreTrainedModel) and words in set(m.modules())]
    for inner in models[1:][-1:]:  # the innermost: modules come from the outside in
        if {m.main_input_name for m in inner.modules() if isinstance(m, PreTrainedModel)} == {"input_ids"}:
            parts.append(inner)
    if getattr(model.config, "is_encoder_decoder", False) and model.main_input_name != "input_ids":
        parts += [model.get_encoder(), model.get_decoder()]
    return {module for part in parts if part is not None for module in part.modules()}
