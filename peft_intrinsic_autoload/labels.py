"""The number of labels that an adapter stores, for transformers, which would otherwise make a head for two.

Like `loading`, it imports neither PEFT nor `peft_intrinsic`.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LABELS = 100_000
"""Limit of the labels that an adapter stores and a head is made for: an adapter's file is untrusted input."""


def add_stored_labels(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Add the number of labels of an adapter to the options of `PreTrainedModel.from_pretrained`.

    An adapter's configuration names a base model, whose own configuration does not describe the adapter's head.
    """
    options = kwargs.get("adapter_kwargs") or {}
    folder = options.get("_adapter_model_path") or next(iter(args), None)
    stored, base = _stored(folder, options)
    config: Any = kwargs.get("config")
    if stored is None:
        return kwargs
    if not hasattr(config, "num_labels"):
        return {"num_labels": stored, **kwargs}
    if config.num_labels != _base_labels(base):  # the caller's
        return kwargs
    config = copy.deepcopy(config)
    config.num_labels = stored
    return {**kwargs, "config": config}


def _base_labels(base: Any) -> int | None:
    """The number of labels of a base model, if its configuration can be read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(base).num_labels
    except (OSError, ValueError, AttributeError):
        return None


def _stored(folder: Any, options: Mapping[str, Any]) -> tuple[int | None, Any]:
    """The labels in an adapter's configuration and the name of its base model; None without such an adapter."""
    if not isinstance(folder, str | os.PathLike):
        return None, None
    if not (options.get("_adapter_model_path") or Path(folder, "adapter_config.json").exists()):
        return None, None
    from transformers.utils import find_adapter_config_file

    download = {name: value for name, value in options.items() if not name.startswith("_")}
    try:
        written = json.loads(Path(str(find_adapter_config_file(str(folder), **download))).read_text(encoding="utf-8"))
        stored = written.get("num_labels") if written.get("peft_type") == "INTRINSIC" else None
    except (OSError, ValueError, AttributeError):
        return None, None  # loading the adapter raises the error
    known = type(stored) is int and 0 < stored <= LABELS
    return (stored if known else None), written.get("base_model_name_or_path")
