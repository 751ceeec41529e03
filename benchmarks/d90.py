"""d90 of a sentence encoder on real tasks, by this tuner and by others.

    python benchmarks/d90.py mrpc|sst2 --model all-MiniLM-L6-v2 --data GLUE [OPTION ...]
    python benchmarks/d90.py pairs      # do runs of one seed lie on the same side, full and in the subspace?

Runs `peft-intrinsic study methods` with the options below and those that follow, such as --method did,said (by default
also default, and on sst2 unilora and tinylora; of LoRA the grid holds a single rank) or --engine ray --gpus 0.1, and
resumes where it stopped. Measurements lie in benchmarks/results/d90/TASK, from the folder in which it runs. GLUE is a
folder with mrpc/ and sst2/, each with train.jsonl and validation.jsonl, mrpc/ with test.jsonl too, as `to_json` of the
dataset nyu-mll/glue writes them. Of SST-2's 67,349 training phrases 4,000 are taken, shuffled by Python's generator of
seed 0; MRPC is scored on validation and test together.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from statistics import mean

from peft_intrinsic_cli import main as command

CONFIG = "dataloader_pin_memory: false\ntrain_sampling_strategy: group_by_length\n"
METHODS = {"sst2": "did,said,default,unilora,tinylora", "mrpc": "did,said,default"}
TASKS = {
    "sst2": "--text sentence --epochs 1 --max-length 64 --dims 64,16384,33",
    "mrpc": "--text sentence1,sentence2 --epochs 2 --batch 16 --max-length 80 --dims 256,65536,33",
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
        if not below:
            continue
        spread = (sum(value**2 for row in below for value in row) / (2 * len(below))) ** 0.5
        for seed in range(3):
            full = "".join(f"{apart[place][seed]:+.4f}" for place in apart if place[0] is None)
            average = f"{mean(row[seed] for row in below):+.4f}"
            print(f"| {path.parent.parent.name}, {path.parent.name} | {seed} | {full} | {average} | {spread:.4f} |")


def files(task: str, data: Path, folder: Path) -> tuple[Path, Path]:
    """Training and held-out examples of a task, the shortened or joined ones in `folder`."""
    train, held_out = data / task / "train.jsonl", data / task / "validation.jsonl"
    if task == "mrpc":
        joined = folder / "validation_and_test.jsonl"
        joined.write_text("".join(file.read_text("utf-8") for file in (held_out, data / task / "test.jsonl")), "utf-8")
        return train, joined
    rows = train.read_text("utf-8").splitlines(keepends=True)
    random.Random(0).shuffle(rows)
    short = folder / "train_4000.jsonl"
    short.write_text("".join(rows[:4000]), "utf-8")
    return short, held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[*TASKS, "pairs"])
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path)
    args, more = parser.parse_known_args()
    if args.task == "pairs":
        return pairs()
    if args.model is None or args.data is None:
        parser.error("--model and --data are needed")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.yaml")
        config.write_text(CONFIG)
        train, held_out = files(args.task, args.data, Path(folder))
        options = ["--train", str(train), "--eval", str(held_out), "--config", str(config)]
        options += ["--method", METHODS[args.task], "--out", f"benchmarks/results/d90/{args.task}"]
        command(["study", "methods", args.model, *options, *TASKS[args.task].split(), *more])
    return None


if __name__ == "__main__":
    main()
