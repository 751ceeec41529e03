"""Notes on a model of what `PreTrainedModel.from_pretrained` reports as missing from the checkpoint.

It imports neither PEFT nor `peft_intrinsic`: the base model of an adapter is often loaded before either is needed.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from .labels import add_stored_labels

NEW = "_intrinsic_fresh"
"""Attribute of a loaded model: a sample of every newly initialized parameter, by name."""

LOADED = "_intrinsic_loaded"
"""Attribute of the head's modules in a loaded model: the shapes of their parameters."""

_MISSING = "_intrinsic_missing"
"""Attribute of a model that is being loaded: names of the parameters that its checkpoint files lack."""

LOADING: ContextVar[bool] = ContextVar("loading", default=False)

HEADS = ("classifier", "score", "qa_outputs")
"""Names of task heads in transformers models."""

_SAMPLE = 2**16


def watch(models: Any) -> None:
    """Let `from_pretrained` of transformers' `PreTrainedModel` note on the model what it reports as missing.

    The report is a return value (`output_loading_info=True`) that few callers request, and is not available later. It
    leaves out what is on the model's ignore list, where TRL puts new heads, so the list before that step is noted too.
    Calling it again changes nothing.

    `load_adapter`, which `from_pretrained` of an adapter's folder calls too, lets `peft_intrinsic` check the values.
    """
    original = models.from_pretrained.__func__
    if getattr(original, "watched", False):
        return
    if load := getattr(models, "load_adapter", None):
        models.load_adapter = _check_loading(load)

    @functools.wraps(original)
    def from_pretrained(cls: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        token = LOADING.set(True)
        try:
            result = original(cls, *args, output_loading_info=True, **add_stored_labels(args, kwargs))
        finally:
            LOADING.reset(token)
        if not isinstance(result, tuple):  # of a library that has replaced transformers' method
            return result
        model, info = result
        try:
            _note(model, info)
        except Exception as error:  # the program may never use an adapter of this package
            logging.getLogger(__name__).warning("Unknown what the checkpoint of %s lacks: %r", cls.__name__, error)
        return (model, info) if output_loading_info else model

    from_pretrained.watched = True  # type: ignore[attr-defined]
    models.from_pretrained = classmethod(from_pretrained)
    if (shorten := getattr(models, "_adjust_missing_and_unexpected_keys", None)) is None:
        return  # transformers may rename it; then only the report is used

    @functools.wraps(shorten)
    def note_missing(model: Any, loading_info: Any) -> None:
        if LOADING.get():
            model.__dict__[_MISSING] = set(loading_info.missing_keys)
        shorten(model, loading_info)

    models._adjust_missing_and_unexpected_keys = note_missing


def _check_loading(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_adapter(model: Any, *args: Any, **kwargs: Any) -> Any:
        info = load(model, *args, **kwargs)
        adapter = inspect.signature(load).bind(model, *args, **kwargs).arguments.get("adapter_name") or "default"
        if (files := sys.modules.get("peft_intrinsic.tuner.files")) is not None:  # else it is another method's adapter
            files.check_loaded(model, adapter, {*getattr(info, "missing_keys", ())})
        return info

    return load_adapter


def _note(model: nn.Module, info: Mapping[str, Any]) -> None:
    reported = info["missing_keys"]
    absent = model.__dict__.pop(_MISSING, reported)
    if hasattr(model, "peft_config"):  # the report includes the adapter that was loaded too
        return
    fixed = getattr(model, "_keys_to_ignore_on_save", None) or ()  # computed by the class, such as Marian's positions
    missing = {*absent, *(key[0] for key in info["mismatched_keys"])}.difference(fixed)
    model.__dict__.setdefault(NEW, {name: sample(p) for name, p in model.named_parameters() if name in missing})
    note_heads(model.named_modules())


def note_heads(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Note the shapes of the task head's parameters, so that a head that replaces it later is recognized."""
    for name, module in modules:
        if name.partition(".")[0] in HEADS:
            module.__dict__[LOADED] = {own: p.shape for own, p in module._parameters.items() if p is not None}


def sample(parameter: torch.Tensor) -> torch.Tensor:
    """Copy enough entries of a parameter to the CPU to notice a change; none where it has no values yet."""
    if parameter.is_meta:
        return torch.empty(0)
    flat = parameter.detach().reshape(-1)
    return flat[:: -(-flat.numel() // _SAMPLE) or 1].to("cpu", copy=True)
