"""Accuracy against trainable parameters: this tuner and baselines, each at a learning rate tuned in the same way.

    python benchmarks/quality.py run GROUP [--data FOLDER] [--model FOLDER] [--threads N]
    python benchmarks/quality.py table GROUP
    python benchmarks/quality.py plot FILE.svg

A group is heads, rates, sizes, places, plateau, peers, free or smallest, a dash, and a task: benchmarks/groups.py lists
its runs. Each run appends one JSON line to benchmarks/results/quality.jsonl. Stored runs are skipped, so an interrupted
group resumes. Several processes can work on one group.

Protocol: AdamW without weight decay, Trainer's default schedule (linear decay, no warm-up), dropout on, batches of
sentences of about the same length, on the accelerator where there is one (rows without "device" are of a CPU), bfloat16
autocast unless the processor has no bfloat16 (rows with "dtype"). sst2: 4,000 phrases, 250 batches of 32, accuracy and
cross-entropy on the 872 of the validation set; sst2_150, for larger encoders: 150 batches. rotten_tomatoes: 4,000
sentences, as many batches, 1,000 held out; rotten_tomatoes_apart: without those that contain a sentence of sst2's
validation set. mrpc: 3,668 pairs, 500 batches of 16, on validation and test together (2,133); mrpc_250: 250 of them.
reviews, for decoders: the words of rotten_tomatoes, 150 batches of 8, accuracy and cross-entropy of the next token;
reviews_40, for decoders with a large vocabulary: 40 batches, and 250 test reviews. words_40, likewise: the word for the
sentiment after a review, the one token with a loss. python_40, likewise: the next token of Python's standard library,
in pieces of 12 lines, tests from other files. scored_100: a decoder with a head, the classes of rotten_tomatoes, 100
batches of 8. sst2 and mrpc are read from --data, which has GLUE's files as JSON lines. The encoders are sentence
encoders, tuned on pairs of sentences.

"Jump" is the highest mean training loss over 25 steps, minus the lowest one before it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import numpy as np
import torch
from filelock import FileLock, Timeout
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
)

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "examples"))
from carriers import minilm, rotten_tomatoes
from groups import find_row, list_runs, plot, table
from methods import attach, count_trainable

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
BFLOAT16 = DEVICE.type != "cpu" or any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)
LOCKS: list[FileLock] = []
RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
MANY_CLASSES = RESULTS.with_name("many_classes.jsonl")
Row = dict[str, Any]
TASKS: Row = {
    "sst2": {"text": ("sentence",), "train": 4000, "steps": 250, "batch": 32},
    "rotten_tomatoes": {"text": ("text",), "train": 4000, "steps": 250, "batch": 32},
    "rotten_tomatoes_apart": {"text": ("text",), "train": 4000, "steps": 250, "batch": 32},
    "mrpc": {"text": ("sentence1", "sentence2"), "train": 3668, "steps": 500, "batch": 16},
    "mrpc_250": {"text": ("sentence1", "sentence2"), "train": 3668, "steps": 250, "batch": 16},
    "sst2_150": {"text": ("sentence",), "train": 4000, "steps": 150, "batch": 32},
    "reviews": {"text": ("text",), "train": 4000, "steps": 150, "batch": 8},
    **{task: {"text": ("text",), "steps": 40, "batch": 8} for task in ("reviews_40", "words_40", "python_40")},
    "scored_100": {"text": ("text",), "steps": 100, "batch": 8},
}


CAUSAL = ("reviews", "reviews_40", "words_40", "python_40")
"""Tasks of decoders without a head."""


DTYPE: Row = {} if BFLOAT16 else {"dtype": "float32"}
"""What a row says of computations without bfloat16."""


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def strip(text: str) -> str:
    """Reduce a text to letters and digits, to find the same sentence in another spelling."""
    return "".join(character for character in text.lower() if character.isalnum())


def is_in(text: str, held_out: list[str]) -> bool:
    """Whether a held-out sentence equals, contains or is part of the text; parts of up to 15 letters do not count."""
    long = [sentence for sentence in held_out if len(sentence) > 15]
    return text in held_out or any(s in text for s in long) or (len(text) > 15 and any(text in s for s in long))


def load(task: str, folder: Path | None) -> tuple[list[Row], list[Row]]:
    """Load training and test examples."""
    if task == "rotten_tomatoes_apart" and folder:
        held_out = [strip(row["sentence"]) for row in read_rows(folder / "sst2" / "validation.jsonl")]
        data = rotten_tomatoes(train=7530, eval=1000)
        return [row for row in data["train"] if not is_in(strip(row["text"]), held_out)][:4000], list(data["eval"])
    if task == "python_40":
        files = [file.read_text().splitlines() for file in sorted(Path(os.__file__).parent.glob("*.py"))]
        parts: tuple[list[Row], list[Row]] = [], []
        for i, lines in enumerate(files):  # each fifth file is held out
            pieces = ["\n".join(lines[k : k + 12]) for k in range(0, len(lines), 12)]
            parts[i % 5 == 0].extend({"text": piece, "label": 0} for piece in pieces if piece.strip())
        random = np.random.default_rng(0)
        train, test = ([part[k] for k in random.permutation(len(part))] for part in parts)
        return train[:4000], test[:250]
    if task in (*CAUSAL, "rotten_tomatoes", "scored_100"):
        data = rotten_tomatoes(train=4000, eval=250 if task.endswith("_40") else 1000)
        train, test = (list(data[part]) for part in ("train", "eval"))
        if task == "words_40":
            for row in train + test:
                row["text"] = f"Review: {row['text']}\nSentiment: {('negative', 'positive')[row['label']]}"
        return train, test
    if folder is None:
        raise SystemExit(f"{task} needs --data, a folder with {task}/train.jsonl and {task}/validation.jsonl.")
    files = folder / task.partition("_")[0]
    train, *test = (read_rows(files / f"{part}.jsonl") for part in ("train", "validation", "test"))
    order = np.random.default_rng(0).permutation(len(train))[: TASKS[task]["train"]]
    return [train[i] for i in order], [row for part in test for row in part]


def make_batches(lengths: np.ndarray, size: int, count: int, seed: int) -> Iterator[np.ndarray]:
    """Yield indices of `count` batches of sentences of about the same length, in a random order."""
    generator = np.random.default_rng(seed)
    queue: list[np.ndarray] = []
    for _ in range(count):
        if not queue:
            order = generator.permutation(len(lengths))
            groups = [group[np.argsort(lengths[group], kind="stable")] for group in np.array_split(order, 4)]
            queue = [group[i : i + size] for group in groups for i in range(0, len(group) - size + 1, size)]
            queue = [queue[i] for i in generator.permutation(len(queue))]
        yield queue.pop()


class Runner:
    """Training and scoring of one model on one task."""

    def __init__(self, path: str, task: str, folder: Path | None) -> None:
        self.path, self.task = path, TASKS[task]
        self.kind = AutoModelForCausalLM if task in CAUSAL else AutoModelForSequenceClassification
        self.last = task == "words_40"
        tokenizer = AutoTokenizer.from_pretrained(path)
        self.parts = []
        for examples in load(task, folder):
            texts = [[row[column] for row in examples] for column in self.task["text"]]
            inputs = tokenizer(*texts, truncation=True, max_length=128)["input_ids"]
            labels = torch.tensor([row["label"] for row in examples], device=DEVICE)
            self.parts.append(([torch.tensor(ids) for ids in inputs], labels))
        self.pad = tokenizer.pad_token_id
        self.lengths = np.array([len(ids) for ids in self.parts[0][0]])

    def loss(self, model: Any, part: int, index: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Compute mean cross-entropy, correct predictions and their number, for sentences or for next tokens."""
        inputs, labels = self.parts[part]
        ids = torch.nn.utils.rnn.pad_sequence([inputs[i] for i in index], batch_first=True, padding_value=self.pad)
        ids = ids.to(DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=BFLOAT16):
            logits = model(input_ids=ids, attention_mask=(ids != self.pad).long()).logits
        if logits.dim() == 3:
            seen = ids[:, 1:] != self.pad
            if self.last:
                seen &= seen.cumsum(1) == seen.sum(1, keepdim=True)
            logits, target = logits[:, :-1][seen], ids[:, 1:][seen]
        else:
            target = labels[torch.as_tensor(index, device=DEVICE)]
        loss = torch.nn.functional.cross_entropy(logits.float(), target)
        return loss, (logits.argmax(-1) == target).sum(), len(target)

    def run(self, row: Row) -> Row:
        """Train once. Return accuracy, cross-entropy, trainable parameters, loss every 25 steps, and seconds."""
        torch.manual_seed(row["seed"])
        model = attach(self.kind.from_pretrained(self.path, num_labels=2, dtype=torch.float32), row).to(DEVICE)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        head = [p for name, p in trainable.items() if "head_lr" in row and "classifier" in name]
        rest = [p for p in trainable.values() if not any(p is h for h in head)]
        groups = [{"params": rest}, {"params": head, "lr": row.get("head_lr", 0.0)}]
        optimizer = torch.optim.AdamW(groups[: 1 + bool(head)], lr=row["lr"], weight_decay=0.0)
        if "dropout" in row:
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = row["dropout"]
        start = time.time()
        losses = self.fit(model, optimizer, row["seed"], warmup=row.get("warmup", 0.0), times=row.get("batch", 1))
        return {
            "numbers": count_trainable(model, row),
            **self.score(model),
            "train": [round(float(np.mean(losses[i : i + 25])), 3) for i in range(0, len(losses), 25)],
            **describe_time(start),
        }

    def fit(
        self,
        model: Any,
        optimizer: Any,
        seed: int,
        after: Callable[[int], None] = lambda step: None,
        warmup: float = 0.0,
        times: int = 1,
    ) -> list[float]:
        """Train, and call `after` with each step from 1. Return the loss of every step.

        `warmup` is the part of the steps in which the learning rate rises, and `times` multiplies the batches.
        """
        steps, size = self.task["steps"], self.task["batch"] * times
        schedule = get_linear_schedule_with_warmup(optimizer, round(warmup * steps), steps)
        model.train()
        losses = []
        for step, index in enumerate(make_batches(self.lengths, size, steps, seed), 1):
            loss, *_ = self.loss(model, 0, index)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            after(step)
        return torch.stack(losses).tolist()

    def score(self, model: Any) -> Row:
        """Compute accuracy and cross-entropy on the test examples."""
        model.eval()
        order = np.argsort([len(ids) for ids in self.parts[1][0]], kind="stable")
        with torch.inference_mode():
            scores = [self.loss(model, 1, part) for part in np.array_split(order, len(order) // 64)]
        count = sum(score[2] for score in scores)
        return {
            "accuracy": round(sum(int(hits) for _, hits, _ in scores) / count, 4),
            "loss": round(sum(float(loss) * size for loss, _, size in scores) / count, 4),
        }


def describe_time(start: float) -> Row:
    """Return seconds since `start`, the device, and the dtype where that is not bfloat16."""
    return {"seconds": round(time.time() - start), "device": DEVICE.type, **DTYPE}


def claim(name: str, model: str) -> Row | None:
    """Claim the next run of a group that is neither stored nor claimed by another process, or None."""
    for planned in list_runs(name, read_rows(RESULTS), model):
        row = {"model": model, **planned}
        mark = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]
        lock = FileLock(Path(tempfile.gettempdir(), f"quality-{mark}.lock"), blocking=False)
        if find_row(read_rows(RESULTS), row):
            continue
        try:
            lock.acquire()
        except Timeout:
            continue
        LOCKS.append(lock)  # held until this process ends
        return row
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table", "plot"))
    parser.add_argument("group", nargs="?", help="a group, or the plot's file")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", help="folder of another encoder")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.action != "run":
        rows = read_rows(RESULTS)
        return table(rows, args.group) if args.action == "table" else plot(rows, read_rows(MANY_CLASSES), args.group)
    torch.set_num_threads(args.threads)
    path = args.model or minilm()
    model = Path(path).name if args.model else "all-MiniLM-L6-v2"
    runners: dict[str, Runner] = {}
    while row := claim(args.group, model):
        if row["task"] not in runners:
            runners[row["task"]] = Runner(path, row["task"], args.data)
        row.update(runners[row["task"]].run(row))
        print(row, flush=True)
        with open(RESULTS, "a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
