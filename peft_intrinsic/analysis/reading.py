"""Readers of models, state dicts, files and adapters, one tensor at a time."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from torch import nn

from ..tuner.base_model import base_parameters
from ..tuner.layer import IntrinsicLayer
from ..tuner.names import canonical

Source = str | os.PathLike | Mapping[str, torch.Tensor] | nn.Module


class Reader:
    """Parameters by name, read one at a time. Tied parameters appear once; `first` has the first name of each.

    Raises:
        ValueError: the folder holds no weights, or a file cannot be read.
    """

    def __init__(self, source: Source) -> None:
        self.label = str(source) if isinstance(source, str | os.PathLike) else "the model"
        self._model: dict[str, Any] = {}
        self._files: dict[str, tuple[Path, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.first: dict[str, str] = {}
        if isinstance(source, Mapping):
            self._model = {name: tensor for name, tensor in source.items() if tensor.is_floating_point()}
        elif isinstance(source, nn.Module):
            model = source.get_base_model() if isinstance(source, PeftModel) else source
            added = _adapter_parameters(model)
            parameters = {name: module._parameters[own] for name, (module, own) in base_parameters(model).items()}
            self._model = {name: p for name, p in parameters.items() if id(p) not in added}
            if isinstance(source, PeftModel):
                self._model |= _fully_trained(model)
        else:
            path = Path(source)
            for file in _files(path) if path.is_dir() else [path]:
                self._open(file)
            if not self.shapes:
                raise ValueError(f"{path} holds no weights in safetensors. Save the model with save_pretrained.")
        firsts: dict[int, str] = {}
        for name, tensor in list(self._model.items()):
            key = id(tensor) if isinstance(tensor, nn.Parameter) else tensor.data_ptr()
            self.first[name] = firsts.setdefault(key, name)
            if self.first[name] != name and tensor.numel():
                del self._model[name]
        self.shapes |= {name: tuple(tensor.shape) for name, tensor in self._model.items()}

    def _open(self, file: Path) -> None:
        try:
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    if opened.get_slice(key).get_dtype().startswith(("F", "BF")):
                        # Old names of BERT, which transformers reads too.
                        name = key.replace("LayerNorm.gamma", "LayerNorm.weight")
                        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
                        self._files[name] = file, key
                        self.shapes[name] = tuple(opened.get_slice(key).get_shape())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read: {error}. Name a model's folder, or a safetensors file.") from None

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._model:
            return self._model[name].detach()
        path, key = self._files[name]
        with safe_open(path, "pt") as file:
            return file.get_tensor(key)


def _adapter_parameters(model: nn.Module) -> set[int]:
    """Find the parameters that other tuners store in their layers, by id."""
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, IntrinsicLayer)]
    added = {id(p) for layer in layers for p in cast(nn.Module, layer).parameters()}
    return added - {id(p) for layer in layers for p in layer.get_base_layer().parameters()}


def _fully_trained(model: nn.Module) -> dict[str, Any]:
    """Find the parameters that the active adapters train fully (`modules_to_save`), by name in the base model."""
    return {
        f"{canonical(key, model)}.{own}": parameter
        for key, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
        for adapter in module.active_adapters
        if adapter in module.modules_to_save
        for own, parameter in module.modules_to_save[adapter].named_parameters()
    }


def _files(folder: Path) -> list[Path]:
    """List the files of a saved model: one file, those of its index, or all."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return sorted({folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    return sorted(folder.glob("*.safetensors"))


@torch.no_grad()
def iterate_offsets(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and offsets of the parameters that the active adapters of a PEFT model change.

    Offsets of intrinsic adapters are computed. Layers of other tuners are merged and restored bitwise.

    Raises:
        ValueError: an adapter is merged.
    """
    base = model.get_base_model()
    for key, layer in base.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if layer.merged:
            raise ValueError("An adapter is merged into the model. Call unmerge_adapter(), or merge_and_unload().")
        if isinstance(layer, IntrinsicLayer):
            for adapter in layer.active_adapters:
                for own, offset in layer.offsets.get(adapter, {}).items():
                    if offset.merges:
                        yield offset.name, layer.get_delta_weight(adapter, own)
            continue
        _unmerge(layer)  # a supermask in inference writes its zeros into the weight
        before = {own: p.detach().clone() for own, p in layer.get_base_layer().named_parameters(recurse=False)}
        layer.merge()
        after = {own: p.detach().clone() for own, p in layer.get_base_layer().named_parameters(recurse=False)}
        _unmerge(layer)
        for own, parameter in layer.get_base_layer().named_parameters(recurse=False):
            parameter.copy_(before[own])
            if not torch.equal(after[own], before[own]):
                yield f"{canonical(key, base)}.{own}", after[own].double() - before[own].double()


def _unmerge(layer: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing is merged, or unmerging is inexact, which is corrected
        layer.unmerge()


def find_prefix(before: Reader, after: Reader) -> str:
    """Find the prefix of the names of `before` in `after`, such as `bert.` in a model with a head, or `""`."""
    first = next(iter(before.shapes))
    prefixes = [name.removesuffix(first) for name in after.shapes if name.endswith(f".{first}")]
    return prefixes[0] if first not in after.shapes and len(prefixes) == 1 else ""
