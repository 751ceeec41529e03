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

from peft_intrinsic_autoload.labels import LABELS

from ..codec import PackedAdapter
from ..text.labeled import LabeledTexts
from ..tuner import IntrinsicConfig
from ..tuner.subspace_files import EMBEDDED

MODEL_CLASSES = {
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
    return getattr(transformers, MODEL_CLASSES.get(task or "", "AutoModel")).from_pretrained(name, **options)


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


def get_labels(file: str | Path, packed: PackedAdapter) -> int | None:
    """Get the number of labels that a packed adapter stores; `None` if it stores none.

    Raises:
        ValueError: there are too many for a head in memory.
    """
    if packed.classes > LABELS:
        raise ValueError(f"{file} has {packed.classes} labels. At most {LABELS} are supported.")
    return packed.classes or None


def count_adapter_bytes(folder: str | Path) -> int:
    """Count the bytes of an adapter's configuration and parameters."""
    files = (Path(folder, name) for name in ADAPTER_FILES)
    return sum(file.stat().st_size for file in files if file.exists())


def resolve_path(name: str) -> str:
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


def prepare_output_file(option: str, name: str | Path) -> Path:
    """Make the folder of a file to write, and return the path of the file.

    Raises:
        ValueError: the path is a folder; the message names the option.
    """
    path = Path(name)
    if path.is_dir():
        raise ValueError(f"{option} {name} is a folder. Name a file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def find_base_name(args: argparse.Namespace, own: str | None) -> str:
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


def load_texts(args: argparse.Namespace, named: str | None = None, labels: int | None = None) -> LabeledTexts:
    """Load the labeled texts and the base model that the options name.

    Args:
        args: `model`, `train`, `eval`, `text`, `label` and `batch`; without `train` or `eval` the other one serves.
        named: name of the base model that the adapter stores.
        labels: number of labels of its head, if it is not that of the training data.
    """
    held_out = getattr(args, "eval", None)
    train: Any = args.train or held_out
    return LabeledTexts(find_base_name(args, named), train, held_out, args.text, args.label, args.batch, labels)


def build_training_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The `TrainingArguments` that follow from `--epochs` and `--batch`."""
    return {
        "num_train_epochs": args.epochs,
        "per_device_train_batch_size": args.batch,
        "per_device_eval_batch_size": args.batch,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
    }
