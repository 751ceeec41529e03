"""The demo: a real pretrained encoder learns to classify questions with 2,000 trainable parameters, on a CPU.

    make demo

The task is TREC: classify questions by the kind of their answer, which is a person, a location, a number, a
description, an entity or the meaning of an abbreviation. The demo prints the accuracy before and after training, the
accuracy of the same adapter loaded in a fresh process, and the size of the adapter. The baseline is a logistic
regression on features of the frozen encoder. A figure of the training loss and the accuracies goes to OUT/demo.png.
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

# The classification head is newly initialized, as intended: no need to report it.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("peft_intrinsic").setLevel(logging.ERROR)
# Quantization packages, which `make test` installs and the demo does not use, report missing kernels.
for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
# PEFT uses the old name as long as it supports versions of transformers without the new one.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

import numpy as np
import torch
from carriers import minilm, questions
from datasets import DatasetDict
from matplotlib.figure import Figure
from peft import get_peft_model
from sklearn.linear_model import LogisticRegression
from text_classification import accuracy_after, adapter_size, evaluate, save, tokenize, trainer
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, set_seed

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.figures import save_figure, styled
from peft_intrinsic.text.tasks import Task


@torch.inference_mode()
def frozen_features(model: Any, tokenizer: Any, texts: list[Any]) -> np.ndarray:
    """Mean of the encoder's last states beside the state of the first token, shape (texts, 2 × hidden size).

    A text is a string or a pair of strings.
    """
    order = np.argsort([len(ids) for ids in tokenizer(texts)["input_ids"]])
    rows = []
    for index in np.array_split(order, -(-len(order) // 64)):
        batch = tokenizer([texts[i] for i in index], truncation=True, max_length=128, padding=True, return_tensors="pt")
        states, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
        rows.append(torch.cat([(states * mask).sum(1) / mask.sum(1), states[:, 0]], dim=1).numpy())
    return np.concatenate(rows)[np.argsort(order)]


def logistic_regression(model: Any, tokenizer: Any, data: DatasetDict) -> tuple[float, int]:
    """Accuracy of a logistic regression on features of the frozen encoder, and the number of its weights.

    C, the inverse of the regularization, is the best on validation data (benchmarks/demos.py).
    """
    train, test = (frozen_features(model, tokenizer, list(data[part]["text"])) for part in ("train", "eval"))
    fitted = LogisticRegression(C=0.1, max_iter=3000).fit(train, data["train"]["label"])
    return float(fitted.score(test, data["eval"]["label"])), fitted.coef_.size + fitted.intercept_.size


@styled
def plot(log: list[dict[str, float]], accuracies: dict[str, float], d: int, path: Path) -> None:
    """Training loss against steps, and the accuracies."""
    points = [(row["step"], row["loss"]) for row in log if "loss" in row]
    figure = Figure(figsize=(8, 3))
    left, right = figure.subplots(1, 2)
    left.plot(*zip(*points, strict=True))
    left.set(xlabel="step", ylabel="training loss", title=f"{d:,} trainable parameters")
    bars = right.bar(list(accuracies), list(accuracies.values()), color=["lightgrey", "C0", "grey"])
    right.bar_label(bars, fmt="%.3f")
    right.set(ylim=(0, 1), ylabel="accuracy on held-out questions")
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub name or folder (default: the packaged all-MiniLM-L6-v2)")
    parser.add_argument("--d", type=int, default=2000, help="trainable parameters (default: 2000)")
    parser.add_argument("--steps", type=int, default=1000, help="training steps (default: 1000)")
    parser.add_argument("--train", type=int, default=4376, help="questions to train on (default: 4376)")
    parser.add_argument("--eval", type=int, default=1000, help="questions to evaluate on (default: 1000)")
    parser.add_argument("--out", default="runs/demo", help="folder for the adapter (default: runs/demo)")
    parser.add_argument("--evaluate", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()

    task = Task(questions(train=args.train, eval=args.eval), ("text",), "label", "accuracy")
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
    data = tokenize(task, tokenizer, model.config.label2id)
    # Batches of sentences of similar length waste little time on padding.
    options = {"train_sampling_strategy": "group_by_length", "disable_tqdm": False}
    # The learning rate is the best on validation data (benchmarks/demos.py).
    options |= {"learning_rate": 4e-4, "max_steps": args.steps, "per_device_train_batch_size": 16}
    run = trainer(model, tokenizer, data, **options)
    before = run.evaluate()["eval_accuracy"]
    run.train()
    after = accuracy_after(run)
    save(model, args.out)
    frozen, weights = logistic_regression(AutoModel.from_pretrained(path), tokenizer, task.data)
    accuracies = {"before": before, "after": after, "logistic regression": frozen}
    plot(run.state.log_history, accuracies, args.d, Path(args.out, "demo.png"))

    command = [sys.executable, __file__, "--evaluate", args.out, "--eval", str(args.eval)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}  # the model is local by now; PEFT would look for a tokenizer
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=offline).stdout
    reloaded = output.split("accuracy ")[-1].strip()
    print(f"\ntrainable parameters  d = {args.d}")
    print(f"accuracy before       {before:.4f}")
    print(f"accuracy after        {after:.4f}")
    print(f"in a fresh process    {reloaded}")
    print(f"logistic regression   {frozen:.4f} on the frozen encoder, {weights} weights")
    print(f"adapter               {adapter_size(args.out)} bytes, weights and configuration, in {args.out}")
    print(f"plot                  {args.out}/demo.png")
    if reloaded != f"{after:.4f}":
        raise SystemExit("The reloaded adapter does not give the same accuracy.")


if __name__ == "__main__":
    main()
