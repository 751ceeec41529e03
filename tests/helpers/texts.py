"""Small tasks on text, and the command that measures them."""

from __future__ import annotations

import json
from pathlib import Path

GOOD, BAD = "a very good film", "a very bad film"
QUICK = {"use_cpu": True, "dataloader_pin_memory": False, "per_device_train_batch_size": 8}


def write(folder: Path, name: str, rows: list[dict]) -> str:
    path = folder / name
    if name.endswith("csv"):
        lines = [",".join(rows[0]), *(",".join(str(v) for v in row.values()) for row in rows)]
        path.write_text("\n".join(lines))
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def examples(folder: Path) -> dict[str, str]:
    """Files `train` and `eval`."""
    rows = [{"text": GOOD if i % 3 else BAD, "label": "yes" if i % 3 else "no"} for i in range(48)]
    return {"train": write(folder, "train.jsonl", rows), "eval": write(folder, "eval.csv", rows[:24])}


def command(data: dict[str, str], base: str, out: Path, *more: str) -> list[str]:
    fixed = [
        "--dims",
        "8,512,6",
        "--seeds",
        "2",
        "--full-learning-rates",
        "0.01",
        "--learning-rates",
        "3e-4",
        "--batch-size",
        "8",
    ]
    return [
        "measure",
        "--model",
        base,
        "--train",
        data["train"],
        "--eval",
        data["eval"],
        "--out",
        str(out),
        *fixed,
        *more,
    ]
