"""The file of a learned subspace: its location, and whether it fits the base model."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from torch import nn

from ..projection.subspace import Subspace
from .base_model import base_modules, known_digest
from .module_types import logical_shape
from .names import is_inside

logger = logging.getLogger(__name__)

EMBEDDED = "subspace.safetensors"
"""The name of a subspace file that is saved with its adapter."""


def find_subspace(folder: str, subfolder: str | None, config: Any, options: Mapping[str, Any]) -> str:
    """Find the subspace file of a saved adapter: in its folder or on the Hub, or at the path in its configuration."""
    here = Path(folder, subfolder or "", Path(config.subspace).name)
    if here.exists() and not config.embed_subspace and Path(config.subspace).exists():
        return str(here) if Subspace(here).digest == config.subspace_digest else config.subspace
    if here.exists() or not config.embed_subspace:
        return str(here) if here.exists() else config.subspace
    wanted = {name: options[name] for name in ("revision", "cache_dir", "token", "local_files_only") if name in options}
    try:
        return hf_hub_download(folder, EMBEDDED, subfolder=subfolder, **wanted)
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        return config.subspace  # attaching raises an error if it is missing there too


def copy_file(source: Path, target: Path) -> None:
    """Copy a file atomically. A file is not copied onto itself."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and target.samefile(source):
        return
    new = target.with_name(target.name + ".new")
    shutil.copyfile(source, new)
    os.replace(new, target)


def read_subspace(model: nn.Module, config: Any) -> tuple[str, list[str]]:
    """Read the digest of a subspace file and the names of the parameters that it adapts, and check the base model.

    Values are compared if all are floating point and in memory. Of a quantized or offloaded base model, only names and
    shapes are compared.

    Raises:
        ValueError: the file is not the one that the adapter was trained with, or does not fit the model.
    """
    subspace = Subspace(config.subspace)
    subspace.verify()
    if config.subspace_digest not in (None, subspace.digest):
        raise ValueError(
            f"subspace={config.subspace!r} has the digest {subspace.digest}, but the adapter was trained with "
            f"{config.subspace_digest}. Restore the subspace file of the adapter."
        )
    modules = dict(base_modules(model))
    for name, shape in subspace.shapes.items():
        key, _, own = name.rpartition(".")
        found = None
        if key in modules and own in modules[key]._parameters:
            found, _ = logical_shape(modules[key], own)
        if found != shape:
            raise ValueError(
                f"subspace={config.subspace!r} adapts {name} {shape}, but this model has {found or 'none'} there. Load "
                "the model that the subspace was recorded on."
            )
    if subspace.base and (here := known_digest(model, subspace.shapes)) not in (None, subspace.base):
        raise ValueError(
            f"subspace={config.subspace!r} was recorded from other weights (digest {subspace.base}, here {here}). "
            "Load the checkpoint that the recording began with, or record on this one."
        )
    names = [name for name in subspace.shapes if not is_inside(config.full_modules or (), name)]
    if not names:
        raise ValueError(
            f"modules_to_save={config.full_modules} includes all parameters that the subspace adapts. Leave some out."
        )
    if again := [name for name in config.reinitialized or () if name in names]:
        logger.warning(
            "The subspace adapts parameters that are re-initialized from a fixed seed: %s. Their directions fit only a "
            "recording that started from the same values, as `peft-intrinsic trajectory record` does.",
            ", ".join(again),
        )
    return subspace.digest, names
