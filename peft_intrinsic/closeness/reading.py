"""Parameters of models, state dicts, files and adapters, one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import nn

from ..tuner.layer import IntrinsicLayer, base_places
from ..tuner.targets import canonical

Source = str | os.PathLike | Mapping[str, torch.Tensor] | nn.Module


class Reader:
    """Parameters by name, read one at a time."""

    def __init__(self, source: Source) -> None:
        self.told = str(source) if isinstance(source, str | os.PathLike) else "the model"
        self._model: dict[str, Any] = {}
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        if isinstance(source, Mapping):
            self._model = dict(source)
        elif isinstance(source, nn.Module):
            model = source.get_base_model() if isinstance(source, PeftModel) else source
            seen = _of_adapters(model)
            for name, (module, own) in base_places(model).items():
                parameter: Any = module._parameters[own]
                if id(parameter) not in seen:  # tied: once
                    seen.add(id(parameter))
                    self._model[name] = parameter
        else:
            path = Path(source)
            for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
                self._open(file)
            if not self.shapes:
                raise ValueError(f"{path} holds no weights in safetensors. Save the model with save_pretrained.")
        self.shapes |= {name: tuple(tensor.shape) for name, tensor in self._model.items()}

    def _open(self, file: Path) -> None:
        try:
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    if opened.get_slice(key).get_dtype().startswith(("F", "BF")):
                        self._files[key] = file
                        self.shapes[key] = tuple(opened.get_slice(key).get_shape())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read: {error}. Name a model's folder, or a safetensors file.") from None

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._model:
            return self._model[name].detach()
        with safe_open(self._files[name], "pt") as file:
            return file.get_tensor(name)


def _of_adapters(model: nn.Module) -> set[int]:
    """Parameters that other methods than ours keep in their layers, by id."""
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, IntrinsicLayer)]
    own = {id(p) for layer in layers for p in cast(nn.Module, layer).parameters()}
    return own - {id(p) for layer in layers for p in layer.get_base_layer().parameters()}


def offsets(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What the active adapters of a PEFT model add to its base, parameter by parameter.

    Raises:
        ValueError: its method does not tell the offset of a weight.
    """
    base = model.get_base_model()
    for key, layer in base.named_modules():
        if isinstance(layer, IntrinsicLayer):
            for adapter in layer.active_adapters:
                for own, offset in layer.offsets.get(adapter, {}).items():
                    if offset.merges:
                        yield offset.name, layer.get_delta_weight(adapter, own)
        elif isinstance(layer, BaseTunerLayer):
            if not hasattr(layer, "get_delta_weight"):
                raise ValueError(
                    f"{type(layer).__name__} does not tell its offset. Merge the adapter, and compare the merged model."
                )
            for adapter in layer.active_adapters:
                if adapter in layer._get_available_adapters():
                    yield f"{canonical(key)}.weight", layer.get_delta_weight(adapter)


def prefix(before: Reader, after: Reader) -> str:
    """What precedes all names of `before` in `after`, such as `bert.` where there is a head; empty if nothing does."""
    first = next(iter(before.shapes))
    found = [name.removesuffix(first) for name in after.shapes if name.endswith(f".{first}")]
    return found[0] if first not in after.shapes and len(found) == 1 else ""
