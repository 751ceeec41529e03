"""Record full fine-tuning, fit a subspace to its trajectory, and fine-tune again in that subspace.

    python examples/trajectory.py --model bert-base-uncased --train train.csv --eval dev.csv --text text --label label

`--train` and `--eval` take CSV, TSV, JSON-lines or Parquet files. Recording, subspace and adapter are saved in `--out`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from peft import get_peft_model
from text_classification import LEARNING_RATE, accuracy_after, adapter_size, add_data_options, from_files, save, trainer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.analysis import find_outliers
from peft_intrinsic.trajectory import TrajectoryCallback, fit_subspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bert-base-uncased", help="Hub name or folder")
    add_data_options(parser)
    parser.add_argument("--steps", type=int, default=320, help="steps of each training run")
    parser.add_argument("--snapshots", type=int, default=16)
    parser.add_argument("--dim", type=int, default=8, help="directions for each layer")
    parser.add_argument("--full-lr", type=float, default=1e-4, help="learning rate of full fine-tuning")
    parser.add_argument("--lr", type=float, default=LEARNING_RATE, help="learning rate in the subspace")
    parser.add_argument("--out", type=Path, default=Path("runs/trajectory"))
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data, head = from_files(args, tokenizer)

    def base() -> Any:
        set_seed(0)  # the same new head both times
        return AutoModelForSequenceClassification.from_pretrained(args.model, **head)

    full = trainer(base(), tokenizer, data, max_steps=args.steps, learning_rate=args.full_lr)
    full.add_callback(TrajectoryCallback(args.out / "recording", every=max(1, args.steps // args.snapshots)))
    full.train()
    before = accuracy_after(full)

    subspace = fit_subspace(args.out / "recording", args.dim, out=args.out / "subspace.safetensors")
    for group in subspace.groups:
        print(f"{group.name}: {args.dim} directions explain {sum(group.explained):.1%} of the change")

    config = IntrinsicConfig(
        d=subspace.dim,
        projection="trajectory",
        subspace=str(subspace.path),
        modules_to_save=["classifier"],
        task_type="SEQ_CLS",
    )
    model: Any = get_peft_model(base(), config)
    run = trainer(model, tokenizer, data, max_steps=args.steps, learning_rate=args.lr)
    run.train()
    after = accuracy_after(run)
    save(model, args.out / "adapter")
    size = adapter_size(args.out / "adapter")
    print(f"accuracy {before:.4f} fully fine-tuned, {after:.4f} with d={subspace.dim} and the head; {size} bytes")
    print(find_outliers(model).report(top=5))


if __name__ == "__main__":
    main()
