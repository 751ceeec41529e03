"""Which modules get one row for each sample of a batch, so that samples can have adapters of their own there."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from functools import partial
from itertools import chain, count, islice
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

STATE = ("past_key_values", "cache_params")
"""Arguments that a forward pass changes."""


def _with_rows(value: Any, rows: int, size: int) -> Any:
    """An argument for a batch of `size` samples, made from those of a batch of `rows`."""
    index = torch.arange(size) % rows
    return tree_map_only(torch.Tensor, lambda t: t[index.to(t.device)] if t.dim() > 1 and len(t) == rows else t, value)


def _is_usable(name: str, value: Any) -> bool:
    """Whether an argument means the same for a batch of another size, and is not changed by the pass."""
    leaves = tree_leaves(value)
    plain = all(leaf is None or isinstance(leaf, torch.Tensor | bool | int | float | str) for leaf in leaves)
    return plain and name not in STATE and not (isinstance(value, torch.Tensor) and value.dim() == 1)


def _is_first(shape: torch.Size, size: int) -> bool | None:
    """Whether the samples are the first of these axes; None where a row stands for all samples, as positions do."""
    return None if shape[:1] == (1,) and size not in shape[1:] else len(shape) > 0 and shape[0] == size


@torch.no_grad()
def batch_first(root: nn.Module, rows: int, args: Any, kwargs: Any) -> dict[str, bool]:
    """Whether modules get the samples as the first axis of their input in every call, by adapted parameter.

    Two forward passes over other numbers of samples prove or disprove it: the length of that axis follows, or does not.
    A pass that fails says nothing of the modules that it has not reached.

    Args:
        root: the model, whose adapters are off meanwhile.
        rows: number of samples in its batch.
        args, kwargs: of its forward pass.
    """
    layers: list[Any] = [module for module in root.modules() if getattr(module, "mixable", False)]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    lengths = {size for tensor in tensors for size in tensor.shape}
    usable = {name: value for name, value in kwargs.items() if _is_usable(name, value)}
    result: dict[str, bool] = {}

    def note(module: nn.Module, inputs: Any, layer: Any, size: int) -> None:
        shape = inputs[0].shape if isinstance(module, nn.Embedding) else inputs[0].shape[:-1]
        first = _is_first(shape, size) if inputs[0].dim() > 1 else False
        if first is not None:
            for offset in chain(*(own.values() for own in layer.offsets.values())):
                result[offset.name] = first and result.get(offset.name, True)

    for size in islice((size for size in count(2) if size not in lengths), 2):
        with ExitStack() as stack:
            for layer in layers:
                hook = partial(note, layer=layer, size=size)
                stack.callback(layer.get_base_layer().register_forward_pre_hook(hook).remove)
            stack.enter_context(suppress(Exception))
            cast(Any, root).forward(*_with_rows(args, rows, size), **_with_rows(usable, rows, size))
    return result


def text_modules(root: nn.Module) -> set[nn.Module] | None:
    """The modules of a model for several kinds of input (text and images, say) whose rows are the samples.

    Images and sounds need not come one for each sample. The part that holds the embedding of words sees them as tokens
    of their samples. Where sound or an image is the sample itself, as in Whisper, encoder and decoder belong to it.
    None for other models, all of whose modules count.
    """
    kinds = getattr(root, "input_modalities", "text")
    if not isinstance(root, PreTrainedModel) or isinstance(kinds, str) or "text" not in kinds or len(kinds) < 2:
        return None
    try:
        words = root.get_input_embeddings()
    except NotImplementedError:  # which part reads text is not known
        return set()
    parts = [words, root.get_output_embeddings()]
    holders = [m for m in root.modules() if isinstance(m, PreTrainedModel) and words in set(m.modules())]
    for inner in holders[1:][-1:]:  # the innermost: modules come from the outside in
        if {m.main_input_name for m in inner.modules() if isinstance(m, PreTrainedModel)} == {"input_ids"}:
            parts.append(inner)
    if getattr(root.config, "is_encoder_decoder", False) and root.main_input_name != "input_ids":
        parts += [root.get_encoder(), root.get_decoder()]
    return {module for part in parts if part is not None for module in part.modules()}
