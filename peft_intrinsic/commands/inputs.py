"""Inputs that several commands share: base models, adapters, output files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import transformers
from peft import PeftConfig
from transformers import AutoConfig

from ..tuner import IntrinsicConfig

CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


def load_base(name: str, task: str | None, labels: int | None = None) -> Any:
    """A base model with the class for its task.

    Args:
        name: on the Hub, or folder.
        task: `TaskType` of its adapter; None is a model without a head.
        labels: of its head, where its configuration says something else.
    """
    options = {"num_labels": labels} if labels else {}
    return getattr(transformers, CLASSES.get(task or "", "AutoModel")).from_pretrained(name, **options)


def adapter_config(folder: str) -> IntrinsicConfig:
    """The configuration of an adapter.

    Raises:
        ValueError: it is of another method, or there is none.
    """
    try:
        config = PeftConfig.from_pretrained(folder)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} is no adapter's folder, or cannot be read: {error}") from None
    if not isinstance(config, IntrinsicConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"{folder} holds an adapter of type {kind}. Name one of IntrinsicConfig.")
    return config


def output_file(option: str, place: str | Path) -> Path:
    """Where a file will be written: its folder is made.

    Raises:
        ValueError: a folder is there.
    """
    path = Path(place)
    if path.is_dir():
        raise ValueError(f"{option} {place} is a folder. Name a file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def base_name(args: argparse.Namespace, own: str | None) -> str:
    """The name of the base model: the user's, or else the adapter's.

    Raises:
        ValueError: neither says, or what the adapter says cannot be found.
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
