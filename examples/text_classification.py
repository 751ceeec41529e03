"""Fine-tune a text classifier through d numbers with Trainer.

    python examples/text_classification.py --dataset nyu-mll/glue:mrpc --text sentence1 sentence2
    python examples/text_classification.py --model PATH --train train.csv --test dev.csv --text text --label label
    python examples/text_classification.py --evaluate runs/classifier --test dev.csv --text text --label label

`--train` and `--test` take CSV or JSON-lines files. The adapter goes to `--out`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict, load_dataset
from peft import AutoPeftModelForSequenceClassification, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from peft_intrinsic import IntrinsicConfig

LEARNING_RATE = 2e-4  # docs/defaults.md


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of right answers."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def tokenised(data: DatasetDict, tokenizer: Any, text: list[str], label: str) -> DatasetDict:
    """Model inputs and `labels` in place of the raw columns."""
    data = data.rename_column(label, "labels")
    drop = [name for name in next(iter(data.values())).column_names if name != "labels"]
    return data.map(
        lambda rows: tokenizer(*(rows[name] for name in text), truncation=True, max_length=128),
        batched=True,
        remove_columns=drop,
    )


def from_files(args: argparse.Namespace, tokenizer: Any) -> tuple[DatasetDict, int]:
    """Model inputs of `--train` and `--test`, CSV or JSON lines, and the number of labels."""
    kind = "csv" if args.test.endswith(".csv") else "json"
    data = load_dataset(kind, data_files={"train": args.train, "test": args.test})
    labels = len({*data["train"][args.label], *data["test"][args.label]})
    return tokenised(data, tokenizer, args.text, args.label), labels


def trainer(model: Any, tokenizer: Any, data: DatasetDict, **arguments: Any) -> Trainer:
    """A Trainer with the documented learning rate."""
    options: dict[str, Any] = {
        "output_dir": "runs/trainer",
        "learning_rate": LEARNING_RATE,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "warmup_steps": 20,
        "logging_steps": 20,
        "save_strategy": "no",
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "report_to": "none",
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**{**options, **arguments}),
        train_dataset=data.get("train"),
        eval_dataset=data.get("test"),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )


def adapter_size(folder: str | Path) -> int:
    """Bytes of an adapter's weights and configuration."""
    return sum(Path(folder, name).stat().st_size for name in ("adapter_model.safetensors", "adapter_config.json"))


def evaluate(folder: str, data: DatasetDict, text: list[str], label: str, labels: int) -> float:
    """Accuracy of a saved adapter on the test part."""
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
    tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
    return trainer(model, tokenizer, tokenised(data, tokenizer, text, label)).evaluate()["eval_accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bert-base-uncased", help="Hub name or folder")
    parser.add_argument("--dataset", help="Hub name, with its configuration after a colon, such as nyu-mll/glue:mrpc")
    parser.add_argument("--train", help="CSV or JSON-lines file")
    parser.add_argument("--test", help="CSV or JSON-lines file")
    parser.add_argument("--text", nargs="+", default=["text"], help="one column, or two for pairs")
    parser.add_argument("--label", default="label", help="column of integers")
    parser.add_argument("--d", type=int, default=200)
    parser.add_argument("--said", action="store_true")
    parser.add_argument("--lr", type=float, default=LEARNING_RATE)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--out", default="runs/classifier")
    parser.add_argument("--evaluate", metavar="FOLDER", help="only evaluate this adapter")
    args = parser.parse_args()

    if args.dataset:
        name, _, configuration = args.dataset.partition(":")
        loaded = load_dataset(name, configuration or None)
        data = DatasetDict({"train": loaded["train"], "test": loaded.get("validation", loaded.get("test"))})
    elif args.test and (args.train or args.evaluate):
        files = {part: file for part, file in (("train", args.train), ("test", args.test)) if file}
        data = load_dataset("csv" if args.test.endswith(".csv") else "json", data_files=files)
    else:
        parser.error("name the data: --dataset, or --train and --test")
    labels = len(set(data["test"][args.label]) | set(data.get("train", data["test"])[args.label]))
    if args.evaluate:
        print(f"accuracy {evaluate(args.evaluate, data, args.text, args.label, labels):.4f}")
        return

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=labels)
    model = get_peft_model(model, IntrinsicConfig(d=args.d, said=args.said, task_type="SEQ_CLS"))
    model.print_trainable_parameters()
    run = trainer(
        model,
        tokenizer,
        tokenised(data, tokenizer, args.text, args.label),
        learning_rate=args.lr,
        num_train_epochs=args.epochs,
    )
    before = run.evaluate()["eval_accuracy"]
    run.train()
    after = run.evaluate()["eval_accuracy"]
    model.save_pretrained(args.out)
    print(f"accuracy {before:.4f} -> {after:.4f} with d={args.d}; {adapter_size(args.out)} bytes in {args.out}")


if __name__ == "__main__":
    main()
