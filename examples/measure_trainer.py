"""Measure d90 with an existing Trainer script, by adding a function `fit` and one call.

    python examples/measure_trainer.py --model PATH --train train.csv --eval dev.csv --text text --label label

The Trainer is that of examples/text_classification.py; labels are words or integers.
"""

from __future__ import annotations

import argparse

import numpy as np
from peft import get_peft_model
from text_classification import add_data_options, from_files, trainer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.measure import grid, measure_intrinsic_dimension, write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    add_data_options(parser)
    parser.add_argument(
        "--dims", type=int, nargs=3, default=[100, 100_000, 48], metavar=("LOWEST", "HIGHEST", "POINTS")
    )
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--out", default="runs/measure")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data, head = from_files(args, tokenizer)

    def fit(d: int | None, seed: int, learning_rate: float) -> float:
        model = AutoModelForSequenceClassification.from_pretrained(args.model, **head)
        paper = IntrinsicConfig(d=d or 1000, seed=seed, target_modules="all", projection="global", task_type="SEQ_CLS")
        adapted = get_peft_model(model, paper)  # θ is zero, and the new head is the same in every trial
        started = adapted if d else adapted.merge_and_unload().requires_grad_(True)
        run = trainer(started, tokenizer, data, learning_rate=learning_rate, seed=seed, num_train_epochs=args.epochs)
        run.train()
        return run.evaluate()["eval_accuracy"]

    fractions = np.bincount(data["eval"]["labels"]) / len(data["eval"])
    result = measure_intrinsic_dimension(
        fit,
        grid(*args.dims),
        majority=float(fractions.max()),
        learning_rates=("auto", "auto"),
        trials=args.trials,
        out=args.out,
    )
    write_report(result, args.out)
    print(f"{result.name} = {result.d}, 90 % interval {result.interval}; report and plot in {args.out}")


if __name__ == "__main__":
    main()
