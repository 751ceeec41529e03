"""d90 of a small encoder on real tasks, by DID and by SAID.

    python benchmarks/d90.py mrpc|sst2 --model all-MiniLM-L6-v2 --data GLUE [--out benchmarks/results/d90/TASK]
    python benchmarks/d90.py pairs      # do runs of one seed lie on the same side, full and in the subspace?

Runs `peft-intrinsic study methods` with the options below on the CPU, and goes on where it stopped. GLUE
is a folder with mrpc/ and sst2/, each with train.jsonl and validation.jsonl, as `to_json` of the dataset nyu-mll/glue
writes them. Of SST-2's 67,349 training phrases 4,000 are taken, shuffled by Python's generator of seed 0.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from statistics import mean

from peft_intrinsic_command import main as command

CPU = "use_cpu: true\ndataloader_pin_memory: false\ntrain_sampling_strategy: group_by_length\n"

TASKS = {
    "sst2": (
        CPU,
        "--text sentence --epochs 1 --max-length 64 --dims 64,16384,33",
    ),
    "mrpc": (
        CPU + "bf16: true\n",
        "--text sentence1 sentence2 --epochs 2 --batch 8 --max-length 80 --dims 256,65536,33",
    ),
}


def pairs() -> None:
    """For each committed measurement, how far each seed lies from the mean over seeds: full, and on average over d."""
    print(
        "| run | seed | full fine-tuning | subspace, mean over d | one run in the subspace, SD |\n|---|---|---|---|---|"
    )
    for path in sorted(Path("benchmarks/results/d90").glob("*/*/trials.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        groups: dict = {}
        for row in rows:
            groups.setdefault((row["d"], row["learning_rate"]), {})[row["seed"]] = row["score"]
        whole = {place: scores for place, scores in groups.items() if {0, 1, 2} <= set(scores)}
        apart = {
            place: [scores[seed] - mean(scores[i] for i in range(3)) for seed in range(3)]
            for place, scores in whole.items()
        }
        below = [apart[place] for place in apart if place[0] is not None]
        spread = (sum(value**2 for row in below for value in row) / (2 * len(below))) ** 0.5
        for seed in range(3):
            full = "".join(f"{apart[place][seed]:+.4f}" for place in apart if place[0] is None)
            average = f"{mean(row[seed] for row in below):+.4f}"
            print(f"| {path.parent.parent.name}, {path.parent.name} | {seed} | {full} | {average} | {spread:.4f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[*sorted(TASKS), "pairs"])
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.task == "pairs":
        return pairs()
    if args.model is None or args.data is None:
        parser.error("--model and --data are needed")
    (arguments, options), source = TASKS[args.task], args.data / args.task
    with tempfile.TemporaryDirectory() as folder:
        config, train = Path(folder, "cpu.yaml"), source / "train.jsonl"
        config.write_text(arguments)
        if args.task == "sst2":
            rows = [json.loads(line) for line in train.read_text(encoding="utf-8").splitlines()]
            random.Random(0).shuffle(rows)
            train = Path(folder, "train_4000.jsonl")
            train.write_text("".join(json.dumps(row) + "\n" for row in rows[:4000]), encoding="utf-8")
        files = ["--train", str(train), "--eval", str(source / "validation.jsonl"), "--config", str(config)]
        out = args.out or f"benchmarks/results/d90/{args.task}"
        command(["study", "methods", args.model, *files, *options.split(), "--out", out])


if __name__ == "__main__":
    main()
