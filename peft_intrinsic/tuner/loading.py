"""Which parameters transformers did not load from the checkpoint, noted while it loads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from peft_intrinsic_autoload.loading import FRESH as _FRESH
from peft_intrinsic_autoload.loading import LOADED as _LOADED
from peft_intrinsic_autoload.loading import mark
from peft_intrinsic_autoload.loading import sample as _sample

from .base_model import base_modules

Place = tuple[nn.Module, str]
"""Where a parameter of the base model is: its module and its name there."""

Note = dict[str, torch.Tensor]


def fresh_parameters(model: nn.Module, places: Mapping[str, Place]) -> dict[str, tuple[Note, str]]:
    """The notes of fresh parameters, and their names in them."""
    found = {}
    for prefix, module in base_modules(model):
        note = module.__dict__.get(_FRESH, {})
        for key, sample in note.items():
            name = f"{prefix}.{key}" if prefix else key
            if name in places and _as_noted(parameter_at(places[name]), sample):
                found[name] = (note, key)
    return found


def _as_noted(parameter: torch.Tensor, sample: torch.Tensor) -> bool:
    """Whether a parameter is what its note says, or what a way through half precision left of it."""
    if len(sample) and sample.unique().numel() < 2:  # what is constant starts the same everywhere
        return False
    if parameter.is_meta:
        return True
    now = _sample(parameter)
    return any(torch.equal(sample.to(way).to(now.dtype), now) for way in (sample.dtype, torch.float16, torch.bfloat16))


def unmarked_parameters(model: nn.Module, places: Mapping[str, Place]) -> dict[str, tuple[Note, str]]:
    """What transformers did not mark as loaded, in a model of whose loading there is no note."""
    if any(_FRESH in module.__dict__ for _, module in base_modules(model)):
        return {}
    loaded = {name: getattr(parameter_at(place), "_is_hf_initialized", False) for name, place in places.items()}
    note: Note = {}
    return {
        name: (note, name)
        for name, mark in loaded.items()
        if not mark
        and any(loaded.values())
        and not (p := parameter_at(places[name])).is_meta
        and p.unique().numel() > 1
    }


def replaced_heads(
    model: nn.Module, places: Mapping[str, Place], heads: tuple[str, ...]
) -> dict[str, tuple[Note, str]]:
    """Parameters of task heads that were put into a model after it was loaded: drawn, or trained elsewhere."""
    return {
        name: ({}, name)
        for name, (module, own) in (places if _FRESH in model.__dict__ else {}).items()
        if name.partition(".")[0] in heads
        and module.__dict__.get(_LOADED, {}).get(own) != parameter_at((module, own)).shape
    }


def parameter_at(place: Place) -> torch.Tensor:
    module, own = place
    return module._parameters[own]  # type: ignore[return-value]


def settle(model: nn.Module) -> None:
    """After a merge for good: nothing in the model is fresh any more."""
    for module in model.modules():
        if module is model or _FRESH in module.__dict__:
            module.__dict__[_FRESH] = {}
    mark(base_modules(model))
