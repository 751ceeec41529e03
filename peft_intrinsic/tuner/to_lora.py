"""Exact conversion to LoRA: the offset of a linear layer or an embedding has rank n by construction."""

from __future__ import annotations

import logging
import math
import os
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from ..projection import FastfoodTensor, RankOneTensor, TensorProjection
from .base_model import base_modules, base_parameters
from .layer import IntrinsicLayer, find_adapter
from .modules import IntrinsicEmbedding, IntrinsicLinear
from .names import canonical, is_named
from .targets import HEAD_NAMES

logger = logging.getLogger(__name__)

PREFIX = "base_model.model."
KEYS: dict[type, tuple[str, str]] = {
    IntrinsicLinear: ("lora_A.weight", "lora_B.weight"),
    IntrinsicEmbedding: ("lora_embedding_A", "lora_embedding_B"),
}


@torch.no_grad()
def convert_to_lora(
    model: Any, adapter_name: str = "default", accept_loss: bool = False, dtype: torch.dtype | None = None
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Convert an intrinsic adapter to a LoRA with equal outputs within rounding, without a decomposition.

    The rank is the block size n (times the chunks of a tensor of more than 16,384 rows), or one under `"value_lora"`.
    Alpha equals the rank. An adapted or newly initialized head becomes one of `modules_to_save`, as do fully trained
    modules. With a head that stays as in the base model, the LoRA has no task type: PEFT would look for the head in it.

    Args:
        model: a `PeftModel` with an intrinsic adapter.
        adapter_name: name of the adapter.
        accept_loss: leave out what a LoRA cannot represent (biases, norms, convolutions, direct parameters).
        dtype: of the LoRA's weights; by default that of the base model.

    Returns:
        The configuration and the state dict, as from PEFT's own `convert_to_lora`.

    Raises:
        ValueError: the adapter adapts parameters that a LoRA cannot represent and `accept_loss` is False (the error
            lists them with their fraction of the offset's norm); nothing can be converted; an adapter is merged; or
            the adapter is not attached.
    """
    config = model.peft_config[find_adapter(model, adapter_name)]
    base = model.get_base_model()
    names = {id(module): name for name, module in base_modules(base)}
    beside = {
        key: cast(Any, module).adapter_state_dict(adapter_name, module.state_dict())
        for key, module in base.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._get_available_adapters()
    }
    state: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    lost: list[str] = []
    layers = [m for m in base.modules() if isinstance(m, IntrinsicLayer) and adapter_name in m.offsets]
    full = {key for key in beside if is_named(config.full_modules or (), key)}
    heads = {name for name in HEAD_NAMES.get(config.task_type or "", ()) if hasattr(base, name)}

    def outer(module: str) -> str:  # PEFT looks for the whole head
        head = module.partition(".")[0]
        return head if head in heads else module

    adapted = {outer(names[id(layer.get_base_layer())]) for layer in layers}
    new = {outer(name.rpartition(".")[0]) for name in config.reinitialized or []}
    whole = new | (heads & {*adapted, *map(outer, full)})
    if any(layer.merged for layer in layers):
        raise ValueError("An adapter is merged, so its offset would count twice. Call unmerge_adapter() first.")
    for layer in layers:
        module = names[id(layer.get_base_layer())]
        for own, offset in layer.offsets[adapter_name].items():
            if outer(module) in whole:
                delta = layer.get_delta_weight(adapter_name, own)
                state[f"{PREFIX}{module}.{own}"] = layer.base_parameter(own) + delta
            elif _rank(layer, own, offset.projection):
                theta = layer.vector.scaled(adapter_name, offset.group).float()
                left, right = cast(FastfoodTensor | RankOneTensor, offset.projection).factors(theta)
                ranks[module] = len(right)
                for key, value in zip(KEYS[type(layer)], _arranged(layer, left, right), strict=True):
                    state[f"{PREFIX}{module}.{key}"] = value.contiguous()
            else:
                lost.append(f"{module}.{own}")
    for name, (owner, own) in base_parameters(base).items():
        if outer(name.rpartition(".")[0]) in whole:  # a plain base model also lacks the parameters that are not adapted
            state.setdefault(PREFIX + name, owner._parameters[own].detach().clone())  # type: ignore[union-attr]
    for key, trained in beside.items():
        state |= {f"{PREFIX}{canonical(key, base)}.{own}": value.clone() for own, value in trained.items()}
    if lost and not accept_loss:
        norms = {
            f"{names[id(layer.get_base_layer())]}.{own}": float(
                layer.get_delta_weight(adapter_name, own).square().sum()
            )
            for layer in layers
            for own, offset in layer.offsets[adapter_name].items()
            if offset.merges
        }
        share = math.sqrt(sum(norms.get(name, 0.0) for name in lost) / max(sum(norms.values()), 1e-30))
        raise ValueError(
            f"A LoRA cannot represent {len(lost)} of the adapted parameters, with {share:.1%} of the offset's norm: "
            f"{', '.join(lost)}. Merge the adapter instead, train with serving='lora', or pass "
            "accept_loss=True to leave them out."
        )
    if not ranks:
        raise ValueError(f"Adapter {adapter_name!r} adapts no linear layer or embedding that a LoRA can represent.")
    rank = max(ranks.values())  # servers that check only r must not admit more than they can hold
    smaller = {name: r for name, r in ranks.items() if r != rank}
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(ranks),
        rank_pattern=smaller,
        alpha_pattern=smaller,
        fan_in_fan_out=all(isinstance(base.get_submodule(name).base_layer, Conv1D) for name in ranks),
        modules_to_save=sorted({*whole, *map(outer, full)}) or None,
        trainable_token_indices=config.trainable_token_indices or None,
        task_type=config.task_type if heads <= whole else None,  # with one, PEFT looks for the head in the file
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )
    dtype = dtype or _dtype_of(base)
    return lora, {name: value.to(dtype) for name, value in state.items()}


def _rank(layer: IntrinsicLayer, own: str, projection: TensorProjection) -> int | None:
    """The rank of an offset as a LoRA, or None if a LoRA cannot represent it."""
    if own != "weight" or type(layer) not in KEYS:
        return None
    if isinstance(projection, FastfoodTensor):
        return projection.tiling.chunks * projection.n
    return 1 if isinstance(projection, RankOneTensor) else None


def report_lora(model: Any, adapter: str) -> None:
    """Report the rank and the size of the LoRA that a newly attached adapter is.

    Args:
        model: the base model.
        adapter: name of the adapter.

    Raises:
        ValueError: a LoRA cannot represent a part of it.
    """
    ranks, size = [], 0
    for layer in model.modules():
        for own, offset in layer.offsets.get(adapter, {}).items() if isinstance(layer, IntrinsicLayer) else ():
            rank = _rank(layer, own, offset.projection)
            if rank is None:
                raise ValueError(
                    f"serving='lora': a LoRA cannot represent the offset of {offset.name}. Leave its module out "
                    "(exclude_modules)."
                )
            ranks.append(rank)
            size += rank * (offset.projection.rows + offset.projection.cols)
    dtype = _dtype_of(model)
    logger.info(
        "serving='lora': the adapter is a LoRA of rank %d on %d layers, of %d bytes in %s.",
        *(max(ranks), len(ranks), size * dtype.itemsize, dtype),
    )


def _dtype_of(base: Any) -> torch.dtype:
    """The dtype of the weights of a base model."""
    return getattr(base, "dtype", None) or next(p.dtype for p in base.parameters() if p.is_floating_point())


def _arranged(layer: IntrinsicLayer, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's A and B. For an embedding both are transposed."""
    return (left.T, right.T) if isinstance(layer, IntrinsicEmbedding) else (right, left)


def save_as_lora(
    path: str | os.PathLike,
    model: Any,
    adapter_name: str = "default",
    accept_loss: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Convert an intrinsic adapter to a LoRA and save it in a folder that PEFT loads without this package.

    Args:
        path: the folder.
        model: a `PeftModel` with an intrinsic adapter.
        adapter_name: name of the adapter.
        accept_loss: leave out what a LoRA cannot represent (biases, norms, convolutions, direct parameters).
        dtype: of the LoRA's weights; by default that of the base model.

    Raises:
        ValueError: see `convert_to_lora`.
    """
    config, state = convert_to_lora(model, adapter_name, accept_loss, dtype)
    os.makedirs(path, exist_ok=True)
    save_file(state, os.path.join(path, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
    config.save_pretrained(str(path))
