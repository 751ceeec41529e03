"""Checks of the options of a configuration."""

from __future__ import annotations

import re
import reprlib
from math import isfinite
from numbers import Integral
from typing import Any

from peft_intrinsic_autoload.labels import LABELS

from ..projection import ALGORITHM_VERSION, OF_VALUES, PROJECTIONS
from ..version import __version__, pip_install
from .names import KEYWORDS

LISTS = ("target_parameters", "modules_to_save", "reinitialized")
"""Options that are lists of names, but not strings."""


MAX_TEXT = 1000
"""Limit of the characters of a label's text."""

SKETCH_SIZE = 8
"""Number of floats in the sketch of a head, or of the directions of value biases."""


def check(config: Any) -> None:
    """Check the options of an `IntrinsicConfig`, and convert numpy's integers.

    Raises:
        ValueError, TypeError: an option cannot work. The error names it and says what to do.
    """
    optional = ("block_size", "ensemble", "num_labels")
    for name, low in (("d", 1), ("seed", 0), ("algorithm_version", 1), *((name, 1) for name in optional)):
        value = getattr(config, name)
        if name in optional and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}.")
        setattr(config, name, value := int(value))  # numpy's integers cannot be written to a file
        if not low <= value < 2**63:
            raise ValueError(f"{name} must be at least {low} and below 2**63, got {value}.")
    for name, high in (("num_labels", LABELS), ("ensemble", 1024)):
        if (getattr(config, name) or 0) > high:
            raise ValueError(f"{name} must be at most {high}, got {getattr(config, name)}.")
    if config.block_size is not None and config.block_size & (config.block_size - 1):
        below = 1 << (config.block_size.bit_length() - 1)
        raise ValueError(f"block_size must be a power of two, got {config.block_size}. Try {below} or {2 * below}.")
    choices = {
        "lambda_granularity": ("layer", "module", "tensor"),
        "projection": (None, *PROJECTIONS),
        "scale": ("fan_in", "isometric"),
        "head": ("subspace", "keep", "labels"),
        "serving": (None, "lora"),
    }
    check_choices(config, choices)
    for name in ("manifest", "checksum", "requires", "subspace", "subspace_digest"):
        value = getattr(config, name)
        if not isinstance(value, str) and (value is not None or name == "requires"):
            raise TypeError(f"{name} must be a string, got {value!r}.")
    for name in ("said", "add_bias", "init_weights", "embed_subspace"):
        if not isinstance(getattr(config, name), bool):
            raise TypeError(f"{name} must be True or False, got {getattr(config, name)!r}.")
    if config.add_bias and config.projection in OF_VALUES:
        raise ValueError(
            f"add_bias=True does not go with projection={config.projection!r}, which adapts value projections alone. "
            "Leave it out."
        )
    _check_names(config)
    _check_subspace(config)
    _check_labels(config)
    check_layers(config, KEYWORDS)
    _check_effects(config)
    if config.algorithm_version > ALGORITHM_VERSION:
        raise ValueError(
            f"This adapter has algorithm_version={config.algorithm_version}; peft_intrinsic {__version__} knows "
            f"versions up to {ALGORITHM_VERSION}. Upgrade: {pip_install()}"
        )


def check_choices(config: Any, choices: dict[str, tuple[str | None, ...]]) -> None:
    """Raise ValueError if an option is none of its values."""
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {getattr(config, name)!r}.")


def check_layers(config: Any, keywords: tuple[str, ...]) -> None:
    """Raise ValueError if the options of layers go with no other option, or with a regular expression."""
    alone = isinstance(config.target_modules, str) and config.target_modules not in keywords
    if alone and config.layers_to_transform is not None:
        raise ValueError(
            f"layers_to_transform={config.layers_to_transform!r} does not work with the target_modules string "
            f"{config.target_modules!r}. Pass target_modules as a list, or as {' or '.join(map(repr, keywords))}."
        )
    if config.layers_pattern is not None and config.layers_to_transform is None:
        raise ValueError(
            f"layers_pattern={config.layers_pattern!r} needs layers_to_transform: pass the indexes of the blocks."
        )


def _check_effects(config: Any) -> None:
    """Raise ValueError if an option of a new adapter would have no effect."""
    if config.manifest is not None:
        return
    layers, names = config.layers_to_transform, config.target_parameters
    if layers not in (None, []) and names and config.target_modules is None:
        raise ValueError(
            f"layers_to_transform={layers!r} selects among target_modules, not among target_parameters={names!r}. Name "
            "the layers in target_parameters, such as 'layers.0.self_attn.q_proj.weight'."
        )
    if config.block_size is not None and config.projection in ("dense", "trajectory"):
        raise ValueError(
            f"block_size={config.block_size} has no effect on projection={config.projection!r}, which has no blocks. "
            "Leave it out."
        )


def _check_names(config: Any) -> None:
    for name in ("target_modules", "exclude_modules", "layers_pattern", *LISTS):
        value = getattr(config, name)
        listed = isinstance(value, list | set | tuple) and all(isinstance(item, str) for item in value)
        if not (value is None or listed or (name not in LISTS and isinstance(value, str))):
            kinds = "a list of strings" if name in LISTS else "a string or a list of strings"
            raise TypeError(f"{name} must be None or {kinds}, got {value!r}.")
        patterns = [value] if isinstance(value, str) else value if name == "layers_pattern" else ()
        for pattern in patterns or ():
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"{name}={pattern!r} is not a regular expression: {error}.") from None
    indexes = config.layers_to_transform
    for index in indexes if isinstance(indexes, list | tuple) else [0 if indexes is None else indexes]:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"layers_to_transform must be None, an int or a list of ints, got {indexes!r}.")


def _check_labels(config: Any) -> None:
    texts = config.label_texts
    if texts is not None and config.head != "labels":
        raise ValueError(f"label_texts={reprlib.repr(texts)} needs head='labels', got head={config.head!r}.")
    if texts is not None and not (isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts)):
        raise TypeError(f"label_texts must be None or a list of strings, got {reprlib.repr(texts)}.")
    if texts is not None and len(texts) > LABELS:
        raise ValueError(f"label_texts must be at most {LABELS} texts, got {len(texts)}.")
    for text in texts or ():
        if not text.strip() or len(text) > MAX_TEXT:
            raise ValueError(f"label_texts must have from 1 to {MAX_TEXT} characters each, got {text[:50]!r}.")
    for name in ("label_sketch", "value_sketch"):
        sketch = getattr(config, name)
        floats = isinstance(sketch, list) and all(isinstance(value, float) and isfinite(value) for value in sketch)
        if sketch is not None and not (floats and len(sketch) == SKETCH_SIZE):
            raise TypeError(f"{name} must be None or a list of {SKETCH_SIZE} floats, got {sketch!r}.")


def _check_subspace(config: Any) -> None:
    learned = config.projection == "trajectory"
    if learned != (config.subspace is not None):
        raise ValueError(
            f"projection={config.projection!r} and subspace={config.subspace!r}: the projection 'trajectory' needs a "
            "subspace file (peft_intrinsic.trajectory.fit_subspace writes it), and no other takes one."
        )
    if config.embed_subspace and not learned:
        raise ValueError("embed_subspace=True needs projection='trajectory', which has a subspace file.")
    names = ("target_modules", "exclude_modules", "layers_to_transform", "target_parameters")
    given = [name for name in names if getattr(config, name) is not None]
    if learned and config.manifest is None and given:
        raise ValueError(
            f"{given[0]}={getattr(config, given[0])!r} does not go with projection='trajectory': the subspace file "
            "lists the adapted parameters. Leave it out, and select them when recording (parameters=)."
        )
    if learned and config.add_bias:
        raise ValueError("add_bias=True does not go with projection='trajectory', whose file has no such biases.")
