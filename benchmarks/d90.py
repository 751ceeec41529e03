"""d90 of a small encoder on real tasks, by DID and by SAID.

    python benchmarks/d90.py mrpc|sst2 --model all-MiniLM-L6-v2 --data GLUE [--out benchmarks/results/d90/TASK]

Runs `peft-intrinsic study methods` with the options below on the CPU, three seeds, and goes on where it stopped. GLUE
is a folder with mrpc/ and sst2/, each with train.jsonl and validation.jsonl, as `to_json` of the dataset nyu-mll/glue
writes them. Of SST-2's 67,349 training phrases 4,000 are taken, shuffled by Python's generator of seed 0.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

from peft_intrinsic_command import main as command

CPU = "use_cpu: true\ndataloader_pin_memory: false\ntrain_sampling_strategy: group_by_length\n"

TASKS = {
    "sst2": (
        CPU,
        "--text sentence --epochs 1 --max-length 64 --dims 64,16384,17 --full-rates 1e-4,2e-4 --rates 1e-4,4e-4",
    ),
    "mrpc": (
        CPU + "bf16: true\n",
        "--text sentence1 sentence2 --epochs 2 --batch 8 --max-length 80 --dims 512,32768,7 --full-rates 5e-5,1e-4 "
        "--rates 5e-5,2e-4 --trials 15",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out")
    args = parser.parse_args()
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
