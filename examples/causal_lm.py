"""Fine-tune a causal language model with Trainer by training only d parameters.

python examples/causal_lm.py --model HuggingFaceTB/SmolLM2-135M --dataset wikitext/wikitext-2-raw-v1
python examples/causal_lm.py --model PATH --train corpus.txt
"""

from __future__ import annotations

import argparse
from itertools import chain
from typing import Any

from datasets import Dataset, load_dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

from peft_intrinsic import IntrinsicConfig


def blocks(data: Dataset, tokenizer: Any, length: int) -> Dataset:
    """Cut the text into token blocks of equal length."""

    def cut(rows: dict[str, list]) -> dict[str, list]:
        tokens = list(chain.from_iterable(tokenizer(rows["text"])["input_ids"]))
        pieces = [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
        return {"input_ids": pieces, "labels": pieces}

    return data.map(cut, batched=True, remove_columns=data.column_names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="Hub name or folder")
    parser.add_argument("--dataset", help="Hub name, with its configuration after a colon")
    parser.add_argument("--train", help="text file")
    parser.add_argument("--d", type=int, default=1000)
    parser.add_argument("--targets", help="such as all-linear (default: the values of all attention layers)")
    parser.add_argument("--length", type=int, default=128, help="tokens in a block")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--out", default="runs/causal_lm")
    args = parser.parse_args()
    if args.dataset:
        name, _, configuration = args.dataset.partition(":")
        data = load_dataset(name, configuration or None, split="train")
    elif args.train:
        data = load_dataset("text", data_files=args.train, split="train")
    else:
        parser.error("no data: pass --dataset or --train")

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    model = get_peft_model(model, IntrinsicConfig(d=args.d, target_modules=args.targets, task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    parts = blocks(data, tokenizer, args.length).train_test_split(0.1, seed=0)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.out,
            learning_rate=args.lr,
            max_steps=args.steps,
            warmup_steps=args.steps // 10,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        data_collator=default_data_collator,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    model.save_pretrained(args.out)
    print(f"held-out loss {before:.4f} -> {after:.4f} with d={args.d}; adapter in {args.out}")


if __name__ == "__main__":
    main()
