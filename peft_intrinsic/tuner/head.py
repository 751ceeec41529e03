"""The task head: its re-initialization from a fixed seed, its labels, and their checks when an adapter is loaded.

A parameter is newly initialized if transformers reported it as missing from the checkpoint and nothing has changed it
since. Only such parameters are re-initialized, from a seed that is the same for every adapter and in every process.
`IntrinsicConfig.reinitialized` stores their names.
"""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Mapping

import torch
from peft.utils import TaskType
from torch import nn

from peft_intrinsic_autoload.labels import LABELS
from peft_intrinsic_autoload.loading import HEADS
from peft_intrinsic_autoload.loading import LOADING as _LOADING
from peft_intrinsic_autoload.loading import sample as _sample

from ..projection.randomness import normals, words
from .base_model import base_parameters
from .config import IntrinsicConfig
from .layer import IntrinsicLayer
from .loading import Note, Place, new_parameters, parameter_at, replaced_heads, unmarked_parameters
from .names import is_inside
from .targets import HEAD_NAMES

logger = logging.getLogger(__name__)

LABEL_NOTE = "_intrinsic_labels"
"""Attribute of a model after `init_head_from_labels`: name of the head's weight, the labels' texts, and the sketch."""

Replaced = tuple[Place, torch.Tensor, Note, str]
"""A re-initialized parameter, its value before, the note on it and its name in that note."""


class Reinitialization:
    """The parameters that start from a fixed seed under one adapter.

    Attributes:
        names: of all these parameters, for the configuration.
        pending: the names of those that do not have their start values yet.
        texts: the labels' texts, and `sketch` that of the head's rows; None without `head="labels"`.

    Raises:
        ValueError: it is unknown which parameters the checkpoint contains; the base model differs at the start from
            that of a loaded adapter, or of an attached one; a parameter to re-initialize is offloaded; or another
            adapter adapts a module of `modules_to_save`.
    """

    texts: list[str] | None = None
    sketch: list[float] | None = None

    def __init__(self, model: nn.Module, config: IntrinsicConfig, attached: Mapping[str, IntrinsicConfig]) -> None:
        whole = config.full_modules or ()
        layers = [module for module in model.modules() if isinstance(module, IntrinsicLayer)]
        adapted = {offset.name for layer in layers for own in layer.offsets.values() for offset in own.values()}
        if clash := sorted(name for name in adapted if is_inside(whole, name)):
            raise ValueError(
                f"modules_to_save={config.full_modules}: another adapter already adapts {', '.join(clash)}. Attach "
                "this adapter first, or leave these out of the other one (exclude_modules; head='keep' for a head)."
                + ("" if config.task_type else " PEFT adds the head if task_type=None: pass that of the other adapter.")
            )
        self._model = model
        self._places = places = base_parameters(model)
        replaced = replaced_heads(model, places, HEAD_NAMES.get(config.task_type, ()) if config.task_type else HEADS)
        unknown = unmarked_parameters(model, places) | replaced
        chosen = {name: replaced[name] for name in config.reinitialized or () if name in replaced}
        self._new = unknown if _LOADING.get() else new_parameters(model, places) | chosen
        done = {name for other in attached.values() for name in other.reinitialized or []}
        new = [name for name in places if name in self._new and name not in done and not is_inside(whole, name)]
        if config.reinitialized is not None and config.manifest is not None:
            self._check_loaded(config, new, done)
            self.names = config.reinitialized
            self.pending = [name for name in self.names if name in new]
        elif config.reinitialized is not None:
            if absent := sorted(set(config.reinitialized) - set(places)):
                raise ValueError(f"reinitialized={absent} are no parameters of the model.")
            self.names = config.reinitialized
            self.pending = [name for name in self.names if name not in done]
        elif config.head == "keep":
            self.names, self.pending = [], []
        else:
            unsure = [name for name in unknown if name not in done and not is_inside(whole, name)]
            if unsure and not _LOADING.get():
                raise ValueError(
                    f"It is unknown whether the checkpoint contains these parameters: {', '.join(unsure)}. Import "
                    "peft_intrinsic before you load the model with its head, or pass reinitialized=[names] to start "
                    "them from a fixed seed, reinitialized=[] to keep their values."
                )
            self.names = [name for name in places if name in {*new, *done} and not is_inside(whole, name)]
            self.pending = new
            if new:
                logger.info(
                    "Re-initialized from %s because the checkpoint does not contain them: %s. Pass head='keep' to keep "
                    "the current values.",
                    self._origin,
                    ", ".join(new),
                )
        note = model.__dict__.get(LABEL_NOTE)
        if note and self.texts is None and note[0] in self.pending:
            raise ValueError(
                f"head={config.head!r} would replace the head that init_head_from_labels made. Pass head='labels' to "
                "store its texts with the adapter."
            )
        for adapter, other in attached.items():
            if other.label_texts != self.texts and {*self.names} & {*(other.reinitialized or ())}:
                raise ValueError(
                    f"head={config.head!r} with label_texts={reprlib.repr(self.texts)} does not go with adapter "
                    f"{adapter!r}, which has head={other.head!r} with label_texts={reprlib.repr(other.label_texts)}: "
                    "all adapters of a model share its new head. Pass the same values."
                )
            if self.pending and not other.full_modules:
                raise ValueError(
                    f"{', '.join(self.pending)} would be re-initialized, but adapter {adapter!r} was attached with "
                    f"head={other.head!r} and uses the current values. Pass head={other.head!r} here too."
                )
        for name in self.pending:
            module, own = places[name]
            if parameter_at((module, own)).is_meta and hasattr(module, "_hf_hook"):
                raise ValueError(
                    f"{name} is offloaded and missing from the checkpoint, so it cannot be re-initialized. Keep its "
                    "module in memory (device_map), or pass head='keep'."
                )

    def _check_loaded(self, config: IntrinsicConfig, new: list[str], done: set[str]) -> None:
        """Check that the base model starts from the same values as the one of the adapter."""
        names = config.reinitialized or []
        absent = [name for name in names if name not in self._places]
        known = {*new, *done, *absent}
        changed = [name for name in names if name not in known and not self._has_start(name)]
        if absent or changed:
            raise ValueError(
                f"The adapter starts {', '.join(absent + changed)} from {self._origin}, but this base model "
                + ("lacks it." if absent else "has loaded or trained values there.")
                + " Load the checkpoint that the adapter was trained on, after importing peft_intrinsic."
            )
        lacking = [name for name in new if name not in names]
        if lacking and config.head != "keep":
            raise ValueError(
                f"{', '.join(lacking)} is missing from the checkpoint of this base model, but the adapter was trained "
                "on a base model that had it. Load that checkpoint, head included."
            )
        if lacking:
            logger.warning("Random values, not stored with the adapter (head='keep'): %s", ", ".join(lacking))

    @property
    def _origin(self) -> str:
        return "a fixed seed" if self.texts is None else "the labels' texts and a fixed seed"

    def _start(self, name: str) -> torch.Tensor:
        """The start values of a parameter. They do not depend on the adapter's seed: all adapters share one base."""
        parameter = parameter_at(self._places[name])
        std = getattr(getattr(self._model, "config", None), "initializer_range", None) or 0.02  # BERT's and GPT-2's
        values = normals(words(0, "head", name, parameter.numel())) * std
        return torch.from_numpy(values).view(parameter.shape).to(parameter.dtype)

    def _has_start(self, name: str) -> bool:
        parameter = parameter_at(self._places[name])
        return not parameter.is_meta and torch.equal(_sample(parameter), _sample(self._start(name)))

    @torch.no_grad()
    def apply(self, replaced: list[Replaced]) -> None:
        """Set the pending parameters to their start values. `replaced` gets what `restore_values` needs."""
        for name in self.pending:
            place = self._places[name]
            if not (parameter := parameter_at(place)).is_meta:
                note, key = self._new.get(name, ({}, name))
                replaced.append((place, parameter.detach().clone(), note, key))
                parameter.copy_(self._start(name))
                note[key] = _sample(parameter)


@torch.no_grad()
def restore_values(replaced: list[Replaced]) -> None:
    """Undo `Reinitialization.apply`, the latest one first."""
    for place, value, note, key in reversed(replaced):
        parameter_at(place).copy_(value)
        note[key] = _sample(value)


def count_labels(model: nn.Module, task: str | None) -> int | None:
    """The labels of a model with a head for classes; None for other models, and where there are more than `LABELS`."""
    classifies = task in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS) or "Classification" in type(model).__name__
    labels = getattr(getattr(model, "config", None), "num_labels", None) if classifies else None
    return labels if labels is not None and 0 < labels <= LABELS else None


def explain_labels(stored: int | None, model: nn.Module, task: str | None) -> str | None:
    """An error message if the head has another number of labels than the adapter, otherwise None."""
    here = count_labels(model, task)
    if None in (stored, here) or stored == here:
        return None
    return f"The adapter has {stored} labels, this model {here}. Load the base model with num_labels={stored}."
