"""The task head: what the checkpoint did not bring, its fixed start, and what is checked when an adapter is loaded.

A parameter is fresh if transformers reported it as missing from the checkpoint and nothing has changed it since. Only
fresh parameters are drawn again, from a stream that is the same for every adapter and in every process. Which they were
for an adapter stands in `IntrinsicConfig.reinitialized`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import nn

from peft_intrinsic_autoload.loading import LOADING as _LOADING
from peft_intrinsic_autoload.loading import sample as _sample

from ..projection.randomness import normals, words
from .base_model import base_places
from .config import IntrinsicConfig
from .layer import IntrinsicLayer
from .loading import Note, Place, fresh_parameters, parameter_at, replaced_heads, unmarked_parameters
from .names import inside
from .targets import HEAD_NAMES

logger = logging.getLogger(__name__)

Drawn = tuple[Place, torch.Tensor, Note, str]
"""A parameter that was drawn again, its value before, the note of it and its name in that note."""


class Head:
    """The parameters of one adapter that start from a fixed seed.

    Args:
        model: the base model, with or without adapters.
        config: of the new adapter.
        attached: the configurations of the adapters that the model has already.

    Attributes:
        reinitialized: names of all parameters that start from the fixed seed under this adapter, for its configuration.
        start: those of them that do not have these values yet.

    Raises:
        ValueError: it is not known what the checkpoint brought; the base model does not start where a loaded adapter,
            or one that is already attached, starts; or a module to save in full is already moved.
    """

    def __init__(self, model: nn.Module, config: IntrinsicConfig, attached: Mapping[str, IntrinsicConfig]) -> None:
        whole = config.full_modules or ()
        layers = [module for module in model.modules() if isinstance(module, IntrinsicLayer)]
        adapted = {offset.name for layer in layers for own in layer.offsets.values() for offset in own.values()}
        if clash := sorted(name for name in adapted if inside(whole, name)):
            raise ValueError(
                f"modules_to_save={config.full_modules}: another adapter already adapts {', '.join(clash)}. Attach "
                "this adapter first, or leave these out of the other one (exclude_modules; head='keep' for a head)."
            )
        self._model = model
        self._places = places = base_places(model)
        replaced = replaced_heads(model, places, HEAD_NAMES.get(config.task_type or "", ()))
        unknown = unmarked_parameters(model, places) | replaced
        started = {name: replaced[name] for name in config.reinitialized or () if name in replaced}
        self._fresh = unknown if _LOADING.get() else fresh_parameters(model, places) | started
        drawn = {name for known in attached.values() for name in known.reinitialized or []}
        fresh = [name for name in places if name in self._fresh and name not in drawn and not inside(whole, name)]
        if config.reinitialized is not None and config.manifest is not None:
            self._check_loaded(config, fresh, drawn)
            self.reinitialized, self.start = (
                config.reinitialized,
                [name for name in config.reinitialized if name in fresh],
            )
        elif config.reinitialized is not None:
            if absent := sorted(set(config.reinitialized) - set(places)):
                raise ValueError(f"reinitialized={absent} are no parameters of the model.")
            self.reinitialized, self.start = (
                config.reinitialized,
                [name for name in config.reinitialized if name not in drawn],
            )
        elif config.head == "keep":
            self.reinitialized, self.start = [], []
        else:
            unsure = [name for name in unknown if name not in drawn and not inside(whole, name)]
            if unsure and not _LOADING.get():
                raise ValueError(
                    f"It is not known whether these were loaded, trained or drawn at random: {', '.join(unsure)}. "
                    "Import peft_intrinsic before the model is loaded, with the head that it keeps. Or decide: "
                    "reinitialized=[names] starts them from the fixed stream, reinitialized=[] leaves all as they are."
                )
            self.reinitialized = [name for name in places if name in {*fresh, *drawn} and not inside(whole, name)]
            self.start = fresh
            if fresh:
                logger.warning(
                    "Not from the checkpoint, so drawn again from a fixed stream (head='keep' leaves it as it is): %s",
                    ", ".join(fresh),
                )
        for adapter, known in attached.items():
            if self.start and not known.full_modules:
                raise ValueError(
                    f"{', '.join(self.start)} would be drawn again under adapter {adapter!r}, which was attached with "
                    f"head={known.head!r} and relies on the present values. Pass head={known.head!r} here too."
                )

    def _check_loaded(self, config: IntrinsicConfig, fresh: list[str], drawn: set[str]) -> None:
        """Whether the base starts where the adapter's did."""
        reinitialized = config.reinitialized or []
        absent = [name for name in reinitialized if name not in self._places]
        known = {*fresh, *drawn, *absent}
        trained = [name for name in reinitialized if name not in known and not self._as_drawn(name)]
        if absent or trained:
            raise ValueError(
                f"The adapter starts {', '.join(absent + trained)} from the fixed stream, but this base model "
                + ("lacks it." if absent else "has values of its own there, loaded or trained.")
                + " Load the checkpoint that the adapter was trained on, after importing peft_intrinsic."
            )
        lacking = [name for name in fresh if name not in reinitialized]
        if lacking and config.head == "subspace":
            raise ValueError(
                f"{', '.join(lacking)} was drawn at random when this base model was loaded, but the adapter was "
                "trained on a base model that had it. Load that checkpoint, head included."
            )
        if lacking:
            logger.warning("Drawn at random, and not part of the adapter (head='keep'): %s", ", ".join(lacking))

    def _stream(self, name: str) -> torch.Tensor:
        """The fixed start of a parameter. The adapter's seed is left out: adapters of all seeds share one base."""
        parameter = parameter_at(self._places[name])
        std = getattr(getattr(self._model, "config", None), "initializer_range", None) or 0.02  # BERT's and GPT-2's
        values = normals(words(0, "head", name, parameter.numel())) * std
        return torch.from_numpy(values).view(parameter.shape).to(parameter.dtype)

    def _as_drawn(self, name: str) -> bool:
        parameter = parameter_at(self._places[name])
        return not parameter.is_meta and torch.equal(_sample(parameter), _sample(self._stream(name)))

    def check_reachable(self) -> None:
        """Raises ValueError where a parameter that must start anew is offloaded."""
        for name in self.start:
            module, own = self._places[name]
            if parameter_at((module, own)).is_meta and hasattr(module, "_hf_hook"):
                raise ValueError(
                    f"{name} is offloaded and was not in the checkpoint, so it must be drawn again. Keep its module in "
                    "memory (device_map), or pass head='keep'."
                )

    @torch.no_grad()
    def draw(self, drawn: list[Drawn]) -> None:
        """Put the parameters at their fixed start. `drawn` gets what `restore` needs."""
        for name in self.start:
            place = self._places[name]
            if not (parameter := parameter_at(place)).is_meta:
                note, key = self._fresh.get(name, ({}, name))
                drawn.append((place, parameter.detach().clone(), note, key))
                parameter.copy_(self._stream(name))
                note[key] = _sample(parameter)


@torch.no_grad()
def restore(drawn: list[Drawn]) -> None:
    """Put back what `Head.draw` replaced."""
    for place, value, note, key in drawn:
        parameter_at(place).copy_(value)
        note[key] = _sample(value)
