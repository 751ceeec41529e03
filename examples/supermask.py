"""Fine-tune a text classifier by setting some of its weights to zero, and measure which layers are critical.

    python examples/supermask.py --model bert-base-uncased --train train.csv --eval dev.csv --text text --label label

`--train` and `--eval` take CSV, TSV, JSON-lines or Parquet files. The adapter goes to `--out`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from text_classification import LEARNING_RATE, accuracy_after, adapter_size, add_data_options, from_files, save, trainer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from peft_intrinsic import SupermaskConfig
from peft_intrinsic.analysis import critical_layers, parameter_distance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bert-base-uncased", help="Hub name or folder")
    add_data_options(parser)
    parser.add_argument("--steps", type=int, default=300, help="training steps (default: 300)")
    parser.add_argument("--lr", type=float, default=LEARNING_RATE, help=f"learning rate (default: {LEARNING_RATE})")
    parser.add_argument("--sparsity", type=float, default=0.03, help="fraction of zeros at the start (default: 0.03)")
    parser.add_argument("--out", type=Path, default=Path("runs/supermask"), help="folder of the adapter")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data, head = from_files(args, tokenizer)

    def base() -> Any:
        set_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(args.model, **head)

    model: Any = get_peft_model(base(), SupermaskConfig(initial_sparsity=args.sparsity, task_type="SEQ_CLS"))
    run = trainer(model, tokenizer, data, max_steps=args.steps, learning_rate=args.lr)
    run.train()
    accuracy = accuracy_after(run)
    save(model, args.out)
    print(
        f"accuracy {accuracy:.4f} with {model.base_model.sparsity()['all']:.1%} zeros; {adapter_size(args.out)} bytes"
    )

    merged = PeftModel.from_pretrained(base(), args.out).merge_and_unload()
    print(f"angular distance from the base {parameter_distance(base(), merged).total.angular:.4f}")

    def score(candidate: Any) -> float:
        return trainer(candidate, tokenizer, data).evaluate()["eval_accuracy"]

    print(critical_layers(base(), merged, score).report())


if __name__ == "__main__":
    main()
