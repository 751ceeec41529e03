"""Print how much of the best baseline's accuracy each d reaches, as Markdown: the table of docs/choosing_d.md.

    python benchmarks/choosing_d.py

Reads benchmarks/results/many_classes.jsonl and quality.jsonl. The baseline of the tasks with two classes is full
fine-tuning. For the others it is the best of full fine-tuning, LoRA (r = 8) and a logistic regression on the frozen
encoder, by accuracy on the validation set. A d reaches 90 or 95 % if its accuracy, a mean over seeds, is at least this
part of the baseline's.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

from groups import RATE, at_best, get_setting, plan, smallest

RESULTS = Path(__file__).parent / "results"
MODEL = "all-MiniLM-L6-v2"
DIMS = {"d ≈ 64": (64,), "200": (200, 256), "1,000": (1000, 1024), "4,000": (4000, 4096), "16,000": (16000, 16384)}
TASKS = {
    "sst2": ("sentiment (SST-2)", 2),
    "mrpc": ("paraphrases (MRPC)", 2),
    "coarse": ("questions (TREC)", 6),
    "modules": ("modules of SymPy", 20),
    "intents": ("intents", 37),
    "fine": ("questions (TREC)", 50),
    "services": ("services of AWS", 77),
}
"""Names and classes of the tasks."""

Row = dict[str, Any]


def read(name: str) -> list[Row]:
    """Read the rows of a JSON-lines file of the results."""
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def curve_of_two_classes(rows: list[Row], task: str) -> tuple[dict[int, list[float]], float, str]:
    """Accuracies by d, the baseline's accuracy, and its name."""
    curve: dict[int, list[float]] = {}
    for row in rows:
        if row["model"] == MODEL and row["method"] == "intrinsic":
            setting = get_setting(row)
            if setting == {"model": MODEL, **plan(task, row["d"], RATE, row["seed"])}:
                curve.setdefault(row["d"], []).append(row["accuracy"])
    full = at_best(smallest(task)["full"], rows, MODEL)
    return curve, mean(row["accuracy"] for row in full), "full fine-tuning"


def curve_of_many_classes(rows: list[Row], task: str, head: str) -> tuple[dict[int, list[float]], float, str]:
    """Accuracies by d, the best baseline's accuracy, and its name."""
    mine = [row for row in rows if row["task"] == task]
    curve: dict[int, list[float]] = {}
    for row in mine:
        if (row["method"], row["head"], row.get("lr")) == ("intrinsic", head, RATE):
            curve.setdefault(row["d"], []).append(row["accuracy"])
    names = {"frozen": "logistic regression", "lora": "LoRA, r = 8", "full": "full fine-tuning"}
    best = max((row for row in mine if row["method"] in names), key=lambda row: row["validation"])
    return curve, best["accuracy"], names[best["method"]]


def format_row(*cells: str) -> str:
    """Format a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """Format the table."""
    quality, many = read("quality.jsonl"), read("many_classes.jsonl")
    curves = [(task, "subspace", curve_of_two_classes(quality, task)) for task in ("sst2", "mrpc")]
    heads = ("labels", "subspace")
    more = [task for task, (_, classes) in TASKS.items() if classes > 2]
    curves += [(task, head, curve_of_many_classes(many, task, head)) for task in more for head in heads]
    lines = [
        format_row("task", "classes", "`head`", "baseline", *DIMS, "90 % at", "95 % at"),
        format_row(*["---"] * 11),
    ]
    for task, head, (curve, baseline, name) in curves:
        means = {d: mean(values) for d, values in sorted(curve.items())}
        cells = [next((f"{means[d]:.3f}" for d in dims if d in means), "") for dims in DIMS.values()]
        reached = [
            next((f"{d:,}" for d, value in means.items() if value >= part * baseline), f"> {max(means):,}")
            for part in (0.9, 0.95)
        ]
        label, classes = TASKS[task]
        lines.append(format_row(label, str(classes), f"`{head}`", f"{name}: {baseline:.3f}", *cells, *reached))
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
