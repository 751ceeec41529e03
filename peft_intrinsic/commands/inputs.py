"""Inputs that several commands share: base models, adapters, output files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from transformers import AutoConfig

from ..tuner import IntrinsicConfig
from ..tuner.subspace_files import EMBEDDED

CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
"""Model classes of transformers by the `TaskType` of an adapter."""

ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, EMBEDDED)
"""Files of an adapter in its folder."""


def load_base(name: str, task: str | None, labels: int | None = None, **more: Any) -> Any:
    """Load a base model with the class for its task.

    Args:
        name: on the Hub, or a folder.
        task: `TaskType` of its adapter; `None` loads a model without a head.
        labels: number of labels of its head, where its configuration has another.
        more: further arguments of `from_pretrained`.
    """
    options = {"num_labels": labels, **more} if labels else more
    return getattr(transformers, CLASSES.get(task or "", "AutoModel")).from_pretrained(name, **options)


def read_adapter_config(folder: str, types: tuple[type[PeftConfig], ...] = (IntrinsicConfig,)) -> Any:
    """Read the configuration of an adapter.

    Args:
        folder: of the adapter, or its name on the Hub.
        types: configuration classes that are supported.

    Raises:
        ValueError: there is no adapter, or its method is not supported.
    """
    try:
        config = PeftConfig.from_pretrained(folder)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} is no adapter's folder, or cannot be read: {error}") from None
    if not isinstance(config, types):
        kind = getattr(config.peft_type, "value", config.peft_type)
        known = " or ".join(one.__name__ for one in types)
        raise ValueError(f"{folder} holds an adapter of type {kind}. Name an adapter of {known}.")
    return config


def adapter_size(folder: str | Path) -> int:
    """Count the bytes of an adapter's configuration and parameters."""
    files = (Path(folder, name) for name in ADAPTER_FILES)
    return sum(file.stat().st_size for file in files if file.exists())


def local_path(name: str) -> str:
    """Return a file or folder as it is; for a name on the Hub, download its weights and return their folder.

    Raises:
        ValueError: it is neither.
    """
    if Path(name).exists():
        return name
    try:
        return snapshot_download(name, allow_patterns=["*.safetensors", "*.json"])
    except (OSError, ValueError) as error:  # HFValidationError, RepositoryNotFoundError, no network
        raise ValueError(f"{name!r} is neither a file or folder nor a name that the Hub gives: {error}") from None


def output_file(option: str, name: str | Path) -> Path:
    """Return the path of a file to write, and make its folder.

    Raises:
        ValueError: it is a folder.
    """
    path = Path(name)
    if path.is_dir():
        raise ValueError(f"{option} {name} is a folder. Name a file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def base_name(args: argparse.Namespace, own: str | None) -> str:
    """Return the name of the base model: that of `--model`, or else that of the adapter.

    Raises:
        ValueError: there is neither, or the one of the adapter cannot be found.
    """
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


def training_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The `TrainingArguments` that follow from `--epochs` and `--batch`."""
    return {
        "num_train_epochs": args.epochs,
        "per_device_train_batch_size": args.batch,
        "per_device_eval_batch_size": args.batch,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
    }
