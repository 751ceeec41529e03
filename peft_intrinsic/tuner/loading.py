"""Which parameters transformers did not load from the checkpoint, by the notes that it leaves on the model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from peft_intrinsic_autoload.loading import LOADED as _LOADED
from peft_intrinsic_autoload.loading import NEW as _NEW
from peft_intrinsic_autoload.loading import note_heads
from peft_intrinsic_autoload.loading import sample as _sample

from .base_model import base_modules

Place = tuple[nn.Module, str]
"""A module of the base model and the name of a parameter in it."""

Note = dict[str, torch.Tensor]
"""Samples of newly initialized parameters, by their names below the module that has the note."""


def new_parameters(model: nn.Module, places: Mapping[str, Place]) -> dict[str, tuple[Note, str]]:
    """The notes on newly initialized parameters, and the names of these in them."""
    found = {}
    for prefix, module in base_modules(model):
        note = module.__dict__.get(_NEW, {})
        for key, sample in note.items():
            name = f"{prefix}.{key}" if prefix else key
            if name in places and _is_unchanged(parameter_at(places[name]), sample):
                found[name] = (note, key)
    return found


def _is_unchanged(parameter: torch.Tensor, sample: torch.Tensor) -> bool:
    """Whether a parameter has the noted values, or these rounded to half precision."""
    if len(sample) and sample.unique().numel() < 2:  # constants are the same after every initialization
        return False
    if parameter.is_meta:
        return True
    now = _sample(parameter)
    return any(torch.equal(sample.to(via).to(now.dtype), now) for via in (sample.dtype, torch.float16, torch.bfloat16))


def unmarked_parameters(model: nn.Module, places: Mapping[str, Place]) -> dict[str, tuple[Note, str]]:
    """Parameters that transformers did not mark as loaded, in a model without a note."""
    if any(_NEW in module.__dict__ for _, module in base_modules(model)):
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
    """Parameters of task heads that were put into a model after it was loaded: random or trained elsewhere."""
    return {
        name: ({}, name)
        for name, (module, own) in (places if _NEW in model.__dict__ else {}).items()
        if name.partition(".")[0] in heads
        and module.__dict__.get(_LOADED, {}).get(own) != parameter_at((module, own)).shape
    }


def parameter_at(place: Place) -> torch.Tensor:
    """The parameter itself."""
    module, own = place
    return module._parameters[own]  # type: ignore[return-value]


def clear_notes(model: nn.Module) -> None:
    """Note that no parameter is newly initialized any more, after `merge_and_unload`."""
    for module in model.modules():
        if module is model or _NEW in module.__dict__:
            module.__dict__[_NEW] = {}
    note_heads(base_modules(model))
