"""Files of an adapter bank. As an adapter's file, they are untrusted input and may be damaged."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file

from ..card import BANK_FILE
from .config import IntrinsicConfig
from .files import REMEDY, checksum
from .names import VECTOR


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder, whose files replace those of `folder` when all have been written."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as new:
        yield Path(new)
        for path in sorted(path for path in Path(new).rglob("*") if path.is_file()):
            os.replace(path, folder / path.name)


def describe_rows(rows: torch.Tensor, names: Sequence[str]) -> str:
    """List some rows of a bank by number, `int[n]`, and by name if they have names."""
    some = [f"{row} ({names[row]!r})" if names else str(row) for row in rows[:10].tolist()]
    return ", ".join(some + (["…"] if len(rows) > 10 else []))


def find_broken(vectors: torch.Tensor) -> torch.Tensor:
    """The rows with NaN or infinite values, `int[n]`."""
    return (~vectors.isfinite().all(1)).nonzero().flatten()


def write_bank(config: IntrinsicConfig, vectors: torch.Tensor, names: list[str], folder: Path) -> None:
    """Write the rows of a bank, and the configuration of their adapters.

    Raises:
        ValueError: a row has NaN or infinite values. Nothing is written.
    """
    if len(broken := find_broken(vectors)):
        raise ValueError(
            f"Rows {describe_rows(broken, names)} contain NaN or infinite values, so the bank could not be loaded. "
            "Nothing was written. Replace these rows in bank.vectors, for instance by those of an earlier save."
        )
    config = copy.copy(config)
    config.inference_mode, config.checksum, config.checksum_to_save = True, None, None
    rows = vectors.detach().cpu().contiguous()
    written = {"names": json.dumps(names), "checksum": str(checksum(config, {json.dumps(names): rows}))}
    with _replacing(folder) as new:
        save_file({"rows": rows}, new / BANK_FILE, metadata=written)
        config.save_pretrained(new)


def read_bank(config: IntrinsicConfig, folder: str, options: dict[str, Any]) -> tuple[torch.Tensor, list[str]]:
    """Read the rows of a bank, `[K, d]`, and their names. A bank on the Hub is downloaded with these options.

    Raises:
        ValueError: the folder has no bank, or the file is not what was saved with this configuration.
    """
    path = Path(folder, BANK_FILE)
    if not os.path.isdir(folder):
        with suppress(EntryNotFoundError):
            path = Path(hf_hub_download(folder, BANK_FILE, **options))
    if not path.exists():
        raise ValueError(f"{folder} contains no {BANK_FILE}, so it is no saved bank. Pass saved adapters as a list.")
    with safe_open(path, "pt") as file:
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        shape = found.get("rows", [])
        if list(found) != ["rows"] or len(shape) != 2 or shape[1] != config.d:
            raise ValueError(f"{path} contains {found}, not one matrix 'rows' of {config.d} columns. {REMEDY}")
        vectors, written = file.get_tensor("rows"), file.metadata() or {}
    if written.get("checksum") != checksum(config, {written.get("names", ""): vectors}):
        raise ValueError(f"{path}: these are not the rows, names and options that were saved. {REMEDY}")
    if not vectors.is_floating_point():
        raise ValueError(f"{path} contains {vectors.dtype}, not floating-point numbers. {REMEDY}")
    try:
        names = json.loads(written.get("names", ""))
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: the names of the rows are not a list of strings. {REMEDY}")
    if len(broken := find_broken(vectors)):
        raise ValueError(f"{path}: rows {describe_rows(broken, names)} contain NaN or infinite values. {REMEDY}")
    return vectors, names


def save_adapter(model: Any, adapter: str, vector: torch.Tensor, folder: Path) -> None:
    """Save θ and then λ, `[d]`, as an adapter with the configuration of an attached one."""
    own = {name: getattr(model.base_model.vector, name) for name in ("intrinsic_theta", "intrinsic_lambda")}
    kinds = [name for name, vectors in own.items() if adapter in vectors]
    parts = vector.detach().split([len(own[name][adapter].weight) for name in kinds])
    state = {f"{VECTOR}.{name}.{adapter}.weight": part.clone() for name, part in zip(kinds, parts, strict=True)}
    with _replacing(folder) as new:
        if (card := folder / "README.md").exists():  # which PEFT completes
            shutil.copy(card, new)
        model.save_pretrained(str(new), selected_adapters=[adapter], state_dict=state)
