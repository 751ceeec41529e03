"""Train an adapter for each user, all of them in the same batches, with Trainer.

python examples/bank_training.py --train train.csv --eval dev.csv --model bert-base-uncased

The files are CSV or JSON lines with the columns `user`, `text` and `label`. The bank of adapters goes to `--out`. The
adapter of `--export` also goes to a folder of its own there, which PEFT loads as any other.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import get_peft_model
from text_classification import LEARNING_RATE, accuracy
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from peft_intrinsic import AdapterBank, IntrinsicConfig, RowAdam


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="CSV or JSON-lines file")
    parser.add_argument("--eval", required=True, help="the same, which training does not see")
    parser.add_argument("--model", default="bert-base-uncased", help="Hub name or folder")
    parser.add_argument("--d", type=int, default=200, help="trainable parameters of each adapter")
    parser.add_argument("--lr", type=float, default=LEARNING_RATE)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch", type=int, default=32, help="samples in a batch, of any users")
    parser.add_argument("--out", default="runs/bank")
    parser.add_argument("--export", metavar="USER", help="also save the adapter of this user")
    args = parser.parse_args()

    kind = "csv" if args.train.endswith(".csv") else "json"
    data = load_dataset(kind, data_files={"train": args.train, "eval": args.eval})
    users = sorted({str(user) for user in data["train"]["user"]})
    labels = sorted({str(label) for label in data["train"]["label"]})
    if args.export and args.export not in users:
        parser.error(f"--export {args.export}: no such user in {args.train}, which has {', '.join(users[:10])}")
    if unknown := {str(label) for label in data["eval"]["label"]}.difference(labels):
        parser.error(f"--eval {args.eval} has labels that {args.train} lacks: {', '.join(sorted(unknown))}")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForSequenceClassification.from_pretrained(args.model, id2label=dict(enumerate(labels)))
    model = get_peft_model(base, IntrinsicConfig(d=args.d, task_type="SEQ_CLS"))
    bank = AdapterBank(model, len(users), names=users)
    print(f"{len(users)} users, {bank.vectors.shape[1]} parameters each")

    def inputs(rows: dict[str, list[Any]]) -> dict[str, Any]:
        return {
            **tokenizer(rows["text"], truncation=True, max_length=128),
            "labels": [labels.index(str(label)) for label in rows["label"]],
            "adapter_index": bank.find(map(str, rows["user"])),
        }

    data = data.map(inputs, batched=True, remove_columns=["user", "text", "label"])
    run = Trainer(
        bank,
        TrainingArguments(
            output_dir=str(Path(args.out, "trainer")),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch,
            logging_steps=20,
            max_grad_norm=0.0,  # the norm over all users of a batch
            dataloader_pin_memory=torch.accelerator.is_available(),
            report_to="none",
        ),
        train_dataset=data["train"],
        eval_dataset=data["eval"],
        data_collator=DataCollatorWithPadding(tokenizer),
        optimizer_cls_and_kwargs=(RowAdam, {"lr": args.lr}),
        compute_metrics=accuracy,
    )
    before = run.evaluate()["eval_accuracy"]
    run.train()
    print(f"accuracy {before:.4f} -> {run.evaluate()['eval_accuracy']:.4f}; bank in {args.out}")
    bank.save_pretrained(args.out)
    if args.export:
        bank.save_adapter(args.export, Path(args.out, "export"))


if __name__ == "__main__":
    main()
