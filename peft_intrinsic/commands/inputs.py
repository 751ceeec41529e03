"""Inputs that several commands share: base models, adapters, output files."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from peft_intrinsic_autoload.labels import LABELS

from ..card import MODEL_CLASSES
from ..codec import PackedAdapter, load_packed
from ..text.documents import Documents
from ..text.labeled import LabeledTexts
from ..text.training import load_with_head
from ..tuner import IntrinsicConfig
from ..tuner.subspace_files import EMBEDDED

SCORES = "scores.json"
"""The report of `peft-intrinsic train` beside the adapter."""

ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, EMBEDDED)
"""Files of an adapter in its folder."""

REPLACED = (*ADAPTER_FILES, "README.md", SCORES, "adapter.pia", "adapter.certificate.json")
"""Files of a former adapter, which `--overwrite` removes."""


def load_base(name: str, task: str | None, labels: int | None, **more: Any) -> Any:
    """Load a base model with the class for the `TaskType` of its adapter, and a head for so many labels if known."""
    loader = getattr(transformers, MODEL_CLASSES.get(task or "", "AutoModel"))
    head: dict[str, Any] = {"num_labels": labels} if labels else {}
    return load_with_head(loader, name, labels, **head, **more)


def load_adapter(args: argparse.Namespace, base: Any, adapter: str, stored: int | None, **more: Any) -> Any:
    """Load an adapter, packed or not. An error advises on `--num-labels` if no number of labels is stored."""
    try:
        if Path(adapter).is_file():
            return load_packed(base, adapter)
        return PeftModel.from_pretrained(base, adapter, **more)
    except (RuntimeError, ValueError) as error:
        change = f"correct --num-labels {args.labels}" if args.labels else "pass --num-labels"
        advice = "" if stored else f" If its head has another number of labels, {change}."
        raise ValueError(" ".join(str(error).split()) + advice) from error


def read_adapter_config(folder: str, types: tuple[type[PeftConfig], ...] = (IntrinsicConfig,)) -> Any:
    """Read the configuration of an adapter, of one of the supported types, from its folder or the Hub."""
    try:
        config = PeftConfig.from_pretrained(folder)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} is no adapter's folder, or cannot be read: {error}") from None
    if not isinstance(config, types):
        kind = getattr(config.peft_type, "value", config.peft_type)
        known = " or ".join(one.__name__ for one in types)
        raise ValueError(f"{folder} holds an adapter of type {kind}. Name an adapter of {known}.")
    weights = Path(folder, SAFETENSORS_WEIGHTS_NAME)
    if Path(folder).exists() and not Path(folder, WEIGHTS_NAME).exists():
        try:
            with safe_open(weights, "np"):
                return config
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{weights} cannot be read: {error}. Save or copy the adapter again.") from None
    return config


def get_labels(file: str | Path, packed: PackedAdapter) -> int | None:
    """Get the number of labels that a packed adapter stores; `None` if it stores none."""
    if packed.classes > LABELS:
        raise ValueError(f"{file} has {packed.classes} labels. At most {LABELS} are supported.")
    return packed.classes or None


def choose_labels(args: argparse.Namespace, stored: int | None) -> int | None:
    """Return the number of labels that the adapter stores, or else that of `--num-labels`."""
    if args.labels and stored and args.labels != stored:
        raise ValueError(f"--num-labels {args.labels}: the adapter has {stored} labels. Leave the option out.")
    return stored or args.labels


def count_adapter_bytes(folder: str | Path) -> int:
    """Count the bytes of an adapter's configuration and parameters."""
    files = (Path(folder, name) for name in ADAPTER_FILES)
    return sum(file.stat().st_size for file in files if file.exists())


def resolve_path(name: str) -> str:
    """Return a file or folder as it is; for a name on the Hub, download its weights and return their folder."""
    if Path(name).exists():
        return name
    try:
        return snapshot_download(name, allow_patterns=["*.safetensors", "*.json"])
    except (OSError, ValueError) as error:  # HFValidationError, RepositoryNotFoundError, no network
        raise ValueError(f"{name!r} is neither a file or folder nor a name that the Hub gives: {error}") from None


def prepare_output_file(option: str, name: str | Path) -> Path:
    """Make the folder of a file that an option names, and return the path of the file."""
    path = Path(name)
    if path.is_dir():
        raise ValueError(f"{option} {name} is a folder. Name a file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def prepare_adapter_folder(folder: Path, overwrite: bool) -> None:
    """Make the folder of an adapter, before hours are spent. Only an adapter's folder is overwritten."""
    if folder.is_file():
        raise ValueError(f"--out {folder} is a file. Name a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (overwrite and (folder / CONFIG_NAME).exists()):
        hint = "It holds no adapter that --overwrite could replace" if overwrite else "--overwrite replaces an adapter"
        raise ValueError(f"--out {folder} is in use. {hint}. Name a new folder.")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--out {folder} cannot be written to. Name another folder.")


def replace_adapter(folder: Path, write: Callable[[Path], None]) -> None:
    """Write an adapter, and replace a former one when all is written."""
    with tempfile.TemporaryDirectory() as saved:
        write(Path(saved))
        for name in REPLACED:
            (folder / name).unlink(missing_ok=True)
        for file in Path(saved).iterdir():
            shutil.copy(file, folder)


def find_base_name(args: argparse.Namespace, own: str | None) -> str:
    """Return the name of the base model: that of `--model`, or else the adapter's own, if it can be found."""
    if args.model:
        return args.model
    if not own:
        raise ValueError("The adapter does not name its base model. Name it: --model.")
    try:
        AutoConfig.from_pretrained(own)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The adapter names {own!r} as its base model, which is neither a model's folder here nor on the Hub. Name "
            f"it: --model. (A packed adapter holds only the last part of a folder's path. {error})"
        ) from error
    return own


def load_texts(
    args: argparse.Namespace,
    named: str | None = None,
    labels: int | None = None,
    names: Sequence[str] = (),
    max_length: int | None = None,
) -> LabeledTexts:
    """Load the labeled texts and the base model; without `--train` or `--eval` the other one serves.

    Args:
        args: options of `add_texts`, `model` and `eval`.
        named: name of the base model that the adapter stores.
        labels: number of labels of its head, if it is not that of the training data.
        names: names of these labels in the order of its head, if they are known.
        max_length: tokens of a text that it was trained on, which `--max-length` overrides; 128 if unknown.
    """
    held_out, length = getattr(args, "eval", None), getattr(args, "max_length", None)
    if length is None:
        length = max_length or 128
    train: Any = args.train or held_out
    base = find_base_name(args, named)
    return LabeledTexts(base, train, held_out, args.text, args.label, args.batch, labels, names, length)


def read_scores(folder: str | Path) -> dict[str, Any]:
    """Read from the folder of an adapter how `peft-intrinsic train` trained it: labels and length of the texts."""
    path = Path(folder, SCORES)
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {"names": stored.get("labels", ()), "max_length": stored.get("max_length")}


def load_documents(args: argparse.Namespace, named: str | None = None, **more: Any) -> Documents:
    """Load the documents of `--train` and `--eval`, and the base model. See `load_texts` and `Documents`."""
    if len(args.text) > 1:
        raise ValueError(f"--text {','.join(args.text)}: a language model reads one column. Name one.")
    held_out = getattr(args, "eval", None)
    return Documents(find_base_name(args, named), args.train, held_out, args.text[0], batch=args.batch, **more)


def build_text_options(args: argparse.Namespace, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Build the arguments of `TextOptions` from the options for data and training, with further `TrainingArguments`."""
    names = ("task", "train", "eval", "dataset", "label", "metric", "task_type", "max_length")
    training = {
        "num_train_epochs": args.epochs,
        "per_device_train_batch_size": args.batch,
        "per_device_eval_batch_size": args.batch,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
    }
    given = {name: getattr(args, name) for name in names}
    return {**given, "columns": tuple(args.text), "arguments": {**training, **arguments}}
