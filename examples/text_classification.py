"""Fine-tune a text classifier with Trainer by training only d parameters.

    python examples/text_classification.py --dataset nyu-mll/glue:mrpc --text sentence1,sentence2
    python examples/text_classification.py --model PATH --train train.csv --eval dev.csv --text text --label label
    python examples/text_classification.py --evaluate runs/classifier --eval dev.csv --text text --label label

`--train` and `--eval` take CSV, TSV, JSON-lines or Parquet files, or splits of `--dataset`. Labels are words or
integers. The adapter goes to `--out`, with the names of the labels.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from collapse import report_collapse
from datasets import DatasetDict
from peft import AutoPeftModelForSequenceClassification, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.text.tasks import Task, load_files

LEARNING_RATE = 2e-4  # docs/defaults.md
LABELS = "labels.json"


def accuracy(prediction: Any) -> dict[str, float]:
    """Compute the fraction of correct predictions."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def add_data_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add options that name the data, for `load`."""
    kinds = "CSV, TSV, JSON-lines or Parquet file"
    parser.add_argument("--train", required=required, help=kinds)
    parser.add_argument("--eval", required=required, help=f"{kinds} that training does not see")
    parser.add_argument(
        "--text", type=lambda text: text.split(","), default=["text"], help="one column, or two with a comma for pairs"
    )
    parser.add_argument("--label", default="label", help="column of words or integers")


def load(train: str, eval: str, text: list[str], label: str, dataset: str | None = None) -> Task:
    """Load and check data of files, or of splits of a dataset.

    Raises:
        SystemExit: the data cannot be used.
    """
    try:
        return load_files(train, eval, text, label, dataset=dataset)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None


def tokenize(task: Task, tokenizer: Any, label2id: dict[str, int]) -> DatasetDict:
    """Tokenize the data into model inputs, with `labels` as indices.

    Raises:
        SystemExit: the data have a label that the model lacks.
    """

    def inputs(rows: dict[str, list[Any]]) -> dict[str, Any]:
        names = [task.name_class(value) for value in rows[str(task.label)]]
        if unknown := sorted({*names} - {*label2id}):
            raise SystemExit(f"The model has no labels {unknown}, only {list(label2id)}. Use data with its labels.")
        texts = [rows[column] for column in task.columns]
        return {**tokenizer(*texts, truncation=True, max_length=128), "labels": [label2id[name] for name in names]}

    return task.data.map(inputs, batched=True, remove_columns=next(iter(task.data.values())).column_names)


def from_files(args: argparse.Namespace, tokenizer: Any) -> tuple[DatasetDict, dict[str, Any]]:
    """Load `--train` and `--eval` as model inputs, with the arguments of `from_pretrained` that name the labels."""
    task = load(args.train, args.eval, args.text, args.label)
    return tokenize(task, tokenizer, task.head_options()["label2id"]), task.head_options()


def trainer(model: Any, tokenizer: Any, data: DatasetDict, **arguments: Any) -> Trainer:
    """Make a Trainer with the documented learning rate."""
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
        eval_dataset=data.get("eval"),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )


def adapter_size(folder: str | Path) -> int:
    """Return the size of an adapter's weights and configuration in bytes."""
    return sum(Path(folder, name).stat().st_size for name in ("adapter_model.safetensors", "adapter_config.json"))


def accuracy_after(run: Trainer) -> float:
    """Compute the accuracy of a trained model on the eval part, and report a collapse."""
    output = run.predict(run.eval_dataset, metric_key_prefix="eval")
    report_collapse(output.predictions.argmax(-1), output.label_ids, run.args.learning_rate)
    return output.metrics["eval_accuracy"]


def save(model: Any, folder: str | Path) -> None:
    """Save the adapter with the names of the labels, which its own files lack."""
    model.save_pretrained(folder)
    Path(folder, LABELS).write_text(json.dumps(list(model.config.label2id)), encoding="utf-8")


def evaluate(folder: str, task: Task) -> float:
    """Compute the accuracy of a saved adapter on the eval part."""
    if (saved := Path(folder, LABELS)).exists():
        names = json.loads(saved.read_text(encoding="utf-8"))
        head = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    else:  # another program saved the adapter
        head = task.head_options()
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder, **head)
    tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
    return trainer(model, tokenizer, tokenize(task, tokenizer, head["label2id"])).evaluate()["eval_accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bert-base-uncased", help="Hub name or folder")
    parser.add_argument(
        "--dataset",
        help="Hub name, with its configuration after a colon, such as nyu-mll/glue:mrpc; --train and --eval are then "
        "its splits (train, validation)",
    )
    add_data_options(parser, required=False)
    parser.add_argument("--d", type=int, default=200)
    parser.add_argument("--said", action="store_true")
    parser.add_argument("--lr", type=float, default=LEARNING_RATE)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--out", default="runs/classifier")
    parser.add_argument("--evaluate", metavar="FOLDER", help="only evaluate this adapter")
    args = parser.parse_args()

    held_out = args.eval or (args.dataset and "validation")
    train = held_out if args.evaluate else args.train or (args.dataset and "train")
    if not (train and held_out):
        parser.error("no data: pass --dataset, or --train and --eval")
    task = load(train, held_out, args.text, args.label, args.dataset)
    if args.evaluate:
        print(f"accuracy {evaluate(args.evaluate, task):.4f}")
        return

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, **task.head_options())
    model = get_peft_model(model, IntrinsicConfig(d=args.d, said=args.said, task_type="SEQ_CLS"))
    model.print_trainable_parameters()
    print(f"labels: {', '.join(model.config.label2id)}")
    run = trainer(
        model,
        tokenizer,
        tokenize(task, tokenizer, model.config.label2id),
        learning_rate=args.lr,
        num_train_epochs=args.epochs,
    )
    before = run.evaluate()["eval_accuracy"]
    run.train()
    after = accuracy_after(run)
    save(model, args.out)
    print(f"accuracy {before:.4f} -> {after:.4f} with d={args.d}; {adapter_size(args.out)} bytes in {args.out}")


if __name__ == "__main__":
    main()
