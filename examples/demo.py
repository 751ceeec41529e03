"""The demo: a real pretrained encoder learns to judge film reviews through a few numbers, in minutes on a CPU.

    make demo

Prints the accuracy before and after, d, and the adapter's size; loads the adapter in a fresh process and compares.
Beside it a logistic regression on the features of the frozen encoder, and how many weights that trains. Draws the loss
and the accuracies into OUT/demo.png.
"""

# ruff: noqa: E402 - some packages warn when they are imported
from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

# The head for the two classes is new, and meant to be: no need to report it.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("peft_intrinsic").setLevel(logging.ERROR)
# Packages for quantisation, unused here and only there after `make test`, miss kernels of other machines.
for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
# PEFT asks a model for it by the old name, as long as it supports transformers that have no other.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

import matplotlib as mpl
import numpy as np
import torch
from carriers import minilm, rotten_tomatoes
from datasets import Dataset, DatasetDict
from peft import get_peft_model
from sklearn.linear_model import LogisticRegression
from text_classification import accuracy_after, adapter_size, evaluate, save, tokenised, trainer
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.text.tasks import Task

mpl.use("Agg")
import matplotlib.pyplot as plt


def logistic_regression(model: Any, tokenizer: Any, data: DatasetDict) -> tuple[float, int]:
    """Accuracy on the mean of the frozen encoder's last states, and how many weights were trained for it."""
    collate = DataCollatorWithPadding(tokenizer)

    @torch.no_grad()
    def features(part: Dataset) -> np.ndarray:
        order = np.argsort([len(ids) for ids in part["input_ids"]])
        rows = []
        for index in np.array_split(order, -(-len(order) // 64)):
            batch = collate([{"input_ids": part[int(i)]["input_ids"]} for i in index])
            mask = batch["attention_mask"].unsqueeze(-1)
            states = model(**batch).last_hidden_state
            rows.append(((states * mask).sum(1) / mask.sum(1)).numpy())
        return np.concatenate(rows)[np.argsort(order)]

    found = LogisticRegression(max_iter=1000).fit(features(data["train"]), data["train"]["labels"])
    score = found.score(features(data["eval"]), data["eval"]["labels"])
    return float(score), found.coef_.size + found.intercept_.size


def plot(log: list[dict[str, float]], before: float, after: float, d: int, frozen: float, path: Path) -> None:
    """Training loss against steps, and accuracy before and after."""
    points = [(row["step"], row["loss"]) for row in log if "loss" in row]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    left.plot(*zip(*points, strict=True), color="black")
    left.set(xlabel="step", ylabel="training loss", title=f"{d} trained numbers")
    bars = right.bar(["before", "after"], [before, after], color=["lightgrey", "black"])
    right.bar_label(bars, fmt="%.3f")
    right.axhline(0.5, color="grey", linestyle=":", label="majority class")
    right.axhline(frozen, color="grey", linestyle="--", label="logistic regression, encoder frozen")
    right.set(ylim=(0, 1), ylabel="accuracy on 1,000 held-out sentences")
    right.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub name or folder; the packaged all-MiniLM-L6-v2 without it")
    parser.add_argument("--d", type=int, default=200)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--train", type=int, default=7530, help="training sentences")
    parser.add_argument("--eval", type=int, default=1000, help="sentences to evaluate on")
    parser.add_argument("--out", default="runs/demo")
    parser.add_argument("--evaluate", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()

    task = Task(rotten_tomatoes(train=args.train, eval=args.eval), ("text",), "label", "accuracy")
    if args.evaluate:
        del task.data["train"]
        print(f"accuracy {evaluate(args.evaluate, task):.4f}")
        return
    set_seed(0)
    path = args.model or minilm()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, **task.head_options())
    model = get_peft_model(model, IntrinsicConfig(d=args.d, task_type="SEQ_CLS"))
    model.print_trainable_parameters()
    data = tokenised(task, tokenizer, model.config.label2id)
    # Sentences of one length together, so that little is computed on padding.
    options = {"train_sampling_strategy": "group_by_length", "disable_tqdm": False}
    run = trainer(model, tokenizer, data, max_steps=args.steps, **options)
    before = run.evaluate()["eval_accuracy"]
    run.train()
    after = accuracy_after(run)
    save(model, args.out)
    frozen, weights = logistic_regression(AutoModel.from_pretrained(path), tokenizer, data)
    plot(run.state.log_history, before, after, args.d, frozen, Path(args.out, "demo.png"))

    command = [sys.executable, __file__, "--evaluate", args.out, "--eval", str(args.eval)]
    here = {**os.environ, "HF_HUB_OFFLINE": "1"}  # the model is on this machine by now; PEFT would look for a tokenizer
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=here).stdout
    fresh = told.split("accuracy ")[-1].strip()
    print(f"\ntrained numbers       d = {args.d}")
    print(f"accuracy before       {before:.4f}")
    print(f"accuracy after        {after:.4f}")
    print(f"frozen encoder        {frozen:.4f} by a logistic regression with {weights} weights")
    print(f"in a fresh process    {fresh}")
    print(f"adapter               {adapter_size(args.out)} bytes in {args.out}")
    print(f"plot                  {args.out}/demo.png")
    if fresh != f"{after:.4f}":
        raise SystemExit("The reloaded adapter does not give the same accuracy.")


if __name__ == "__main__":
    main()
