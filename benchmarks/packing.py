"""Accuracy of an adapter before and after packing, and its size in bytes.

    python benchmarks/packing.py run --data FOLDER [--model FOLDER]
    python benchmarks/packing.py table

Each seed trains all-MiniLM-L6-v2 with d = 200 on SST-2: all 67,349 phrases, 1,000 batches of 32, with a learning rate
that falls from 2e-4. It packs the adapter with several numbers of levels: rounded only, and after 100 steps of
quantization-aware training at a tenth of the learning rate. Accuracy is that of the loaded packed adapter on the 872
sentences of the validation set. Rows go to benchmarks/results/packing.jsonl; seeds in the file are skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.append(str(Path(__file__).parents[1] / "examples"))
from carriers import minilm
from peft import get_peft_model

from peft_intrinsic.bounds.texts import pack_rounded
from peft_intrinsic.codec import adapter_to_string, load_packed
from peft_intrinsic.text.labeled import LabeledTexts

RESULTS = Path(__file__).parent / "results" / "packing.jsonl"
SEEDS, LEVELS = range(3), (3, 4, 6, 8)
STEPS, TUNING_STEPS, LEARNING_RATE = 1000, 100, 2e-4


def read_rows() -> list[dict[str, Any]]:
    """Read the stored rows."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def measure_accuracy(texts: LabeledTexts, model: Any) -> float:
    """Measure the accuracy on the validation set."""
    return round(1 - texts.count_errors(model, "eval") / len(texts.data["eval"]), 4)


def run(texts: LabeledTexts, seed: int) -> None:
    """Train one adapter, and pack it with each number of levels, with and without tuning."""
    model: Any = get_peft_model(texts.base, texts.build_config(200, seed))
    texts.train(model, STEPS, LEARNING_RATE, seed)
    before = measure_accuracy(texts, model)
    ways = [(levels, tuned) for levels in LEVELS for tuned in (False, True)]
    packed = [(*way, pack_rounded(texts, model, way[0], TUNING_STEPS * way[1], LEARNING_RATE, seed)) for way in ways]
    model.unload()
    for levels, tuned, data in packed:
        loaded: Any = load_packed(texts.base, data)
        row = {"seed": seed, "levels": levels, "tuned": tuned, "bytes": len(data), "before": before}
        row |= {"after": measure_accuracy(texts, loaded), "adapter": adapter_to_string(data)}
        loaded.unload()
        print(row, flush=True)
        with open(RESULTS, "a") as file:
            file.write(json.dumps(row) + "\n")


def print_table() -> None:
    """Print the means over the seeds as Markdown."""
    print("| levels | bytes | accuracy before | rounded | worst seed | tuned as rounded | worst seed |")
    print("|---|---|---|---|---|---|---|")
    for levels in LEVELS:
        selected = [row for row in read_rows() if row["levels"] == levels]
        size = f"{min(row['bytes'] for row in selected)}–{max(row['bytes'] for row in selected)}"
        cells = [levels, size, f"{mean(row['before'] for row in selected):.4f}"]
        for tuned in (False, True):
            part = [row for row in selected if row["tuned"] == tuned]
            lost = max(row["before"] - row["after"] for row in part)
            cells += [f"{mean(row['after'] for row in part):.4f}", f"{-lost:+.4f}"]
        print(f"| {' | '.join(map(str, cells))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--data", type=Path, help="folder with sst2/train.jsonl and sst2/validation.jsonl")
    parser.add_argument("--model", help="the base model, by default the packaged all-MiniLM-L6-v2")
    args = parser.parse_args()
    if args.action == "table":
        return print_table()
    files = (str(args.data / "sst2" / f"{part}.jsonl") for part in ("train", "validation"))
    texts = LabeledTexts(args.model or minilm(), *files, ["sentence"], "label")
    for seed in SEEDS:
        if not any(row["seed"] == seed for row in read_rows()):
            run(texts, seed)


if __name__ == "__main__":
    main()
