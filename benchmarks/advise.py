"""The advice of `peft-intrinsic advise` beside a sweep of all LoRA ranks, on five tasks.

    python benchmarks/advise.py run coarse,fine,intents,reviews [--model FOLDER] [OPTION ...]
    python benchmarks/advise.py run sst2 --data GLUE [--model FOLDER] [OPTION ...]
    python benchmarks/advise.py table

The tasks: the 6 coarse and the 50 fine classes of TREC's questions, 37 intents of requests (benchmarks/intents.py), the
sentiment of film reviews (examples/carriers.py), and SST-2 from GLUE's files as JSON lines, as in benchmarks/d90.py.
Each has 1,000 training examples, two epochs in batches of 16, and 500 held-out examples. The model is all-MiniLM-L6-v2.
The target is 0.9 of the gain over the majority class, since rank 1 often reaches 0.9 of the score.

A task runs `advise` with three seeds, at most 40 trials for each of rank and d, and d of 8,192 and 16,384, then
`measure --method lora-rank --sweep` with five seeds of every rank and of full fine-tuning. The sweep starts from the
trials of the advice, which would be the same again. Further options, such as --engine ray, go to both. Trials lie in
benchmarks/results/advise/TASK and both resume; a line for each finished task is in
benchmarks/results/advise/rows.jsonl. "Inside" says whether the rank of the sweep lies in the advised interval.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "examples"))
from carriers import minilm, rotten_tomatoes
from many_classes import TASKS as CLASSES
from quality import read_rows

from peft_intrinsic.measure import analyze
from peft_intrinsic.measure.report import format_answer
from peft_intrinsic_cli import main as command

RANKS = "1,2,4,8,16,32"
TRAINED, HELD_OUT = 1000, 500
TASKS = ("coarse", "fine", "intents", "reviews", "sst2")
SHARED = "--max-length 64 --epochs 2 --batch-size 16 --relative-to gain --target 0.9"
SHORT = "--dims 8192,16384,2 --trials 40"
CONFIG = "dataloader_pin_memory: false\ntrain_sampling_strategy: group_by_length\n"
COLUMNS = ("rank", "swept", "inside", "d", "full", "trials", "minutes", "trials of the sweep")


def load(task: str, data: Path | None) -> tuple[list[dict], list[dict]]:
    """Load training and held-out examples, without held-out classes that have no training example."""
    if task == "sst2":
        if data is None:
            raise SystemExit("sst2 needs --data, a folder with sst2/train.jsonl and sst2/validation.jsonl.")
        files = [shuffle(read_rows(data / task / f"{part}.jsonl")) for part in ("train", "validation")]
        train, held_out = ([{"text": row["sentence"], "label": row["label"]} for row in rows] for rows in files)
    elif task == "reviews":
        train, held_out = map(list, rotten_tomatoes(train=TRAINED, eval=HELD_OUT).values())
    else:
        rows = shuffle([{"text": text, "label": name} for text, name in CLASSES[task]()])
        train, held_out = rows[HELD_OUT:], rows[:HELD_OUT]
    train = train[:TRAINED]
    known = {row["label"] for row in train}
    return train, [row for row in held_out[:HELD_OUT] if row["label"] in known]


def shuffle(rows: list[dict]) -> list[dict]:
    """Return rows in a fixed random order."""
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


def write_task(task: str, args: argparse.Namespace, data: str) -> list[str]:
    """Write the data of a task into a folder. Returns the options that it shares between advice and sweep."""
    files = {name: Path(data, f"{name}.jsonl") for name in ("train", "eval")}
    for path, rows in zip(files.values(), load(task, args.data), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = Path(data, "config.yaml")
    config.write_text(CONFIG)
    options = ["--model", args.model or minilm(), "--config", str(config)]
    options += [word for name, path in files.items() for word in (f"--{name}", str(path))]
    return [*options, *SHARED.split()]


def run(task: str, folder: Path, args: argparse.Namespace, options: list[str]) -> dict[str, Any]:
    """Run advice and sweep of a task. Returns its row."""
    advice_folder, swept_folder = folder / "advice", folder / "sweep"
    command(["advise", *options, "--ranks", args.ranks, *SHORT.split(), "--out", str(advice_folder)])
    advice = json.loads((advice_folder / "advice.json").read_text())
    if not swept_folder.exists():
        shutil.copytree(advice_folder / "rank", swept_folder)
    ranks = list(map(int, args.ranks.split(",")))
    grid = f"{ranks[0]},{ranks[-1]},{len(ranks)}"
    sweep = ["--method", "lora-rank", "--sweep", "--seeds", "5", "--baseline-seeds", "5", "--dims", grid]
    command(["measure", *options, *sweep, "--out", str(swept_folder)])
    swept = analyze(swept_folder)
    low, high = advice["rank"]["interval"]
    above = low is not None and (swept.d is None or low <= swept.d)
    texts = {name: advice[name]["text"] for name in ("rank", "d")} | {"swept": format_answer(swept, swept.answer)}
    chosen = {name: " ".join(text).replace("90 % interval ", "") for name, text in texts.items()}
    return {
        "task": task,
        "model": "all-MiniLM-L6-v2",
        **chosen,
        "inside": above and (high is None or (swept.d is not None and swept.d <= high)),
        "trials": advice["cost"]["trials"],
        "minutes": round(advice["cost"]["seconds"] / 60, 1),
        "trials of the sweep": len(swept.trials),
        "full": round(swept.baseline.level, 4),
        "scores": {point.d: point.scores for point in swept.points},
    }


def table(rows: list[dict[str, Any]]) -> None:
    """Print the rows as Markdown."""
    print("| task |", " | ".join(COLUMNS), "|\n|" + "---|" * (1 + len(COLUMNS)))
    for row in rows:
        print(f"| {row['task']} |", " | ".join(str(row[name]) for name in COLUMNS), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("tasks", nargs="?", default=",".join(TASKS), help="names with commas between them")
    parser.add_argument("--model", help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--data", type=Path, help="folder of GLUE's files")
    parser.add_argument("--ranks", default=RANKS, help="each twice the one before")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "advise")
    args, more = parser.parse_known_args()
    path = args.results / "rows.jsonl"
    if args.action == "table":
        return table(read_rows(path))
    for task in args.tasks.split(","):
        if task not in TASKS:
            parser.error(f"{task} is unknown. Known are {', '.join(TASKS)}.")
        if not any(row["task"] == task for row in read_rows(path)):
            with tempfile.TemporaryDirectory() as data:
                row = run(task, args.results / task, args, [*write_task(task, args, data), *more])
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
    return None


if __name__ == "__main__":
    main()
