"""The measurements behind the defaults: scale, block size, learning rate, one Gaussian matrix for all tensors.

    python benchmarks/defaults.py GROUP [--model PATH] [--bf16] [--threads N]
    python benchmarks/defaults.py table

GROUP is lr, scale, blocks, gaussian or baseline; `table` prints what has been measured. A group appends one JSON line
per run to benchmarks/results/defaults.jsonl and skips runs that are there already. Needs the packages named in
examples/carriers.py, and for the second model a folder with all-mpnet-base-v2, named with --model.

Protocol: 2,000 training sentences with a fixed seed, batches of 16, 200 steps (`--steps`) of AdamW without weight
decay, linear warm-up over a tenth of them and linear decay, at most 32 tokens. Every parameter is targeted, the head
included. Reported: accuracy and cross-entropy on 1,000 held-out sentences after the last step.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.projection import FastfoodTensor
from peft_intrinsic.projection.base import natural_size
from peft_intrinsic.projection.randomness import normal_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from carriers import minilm, rotten_tomatoes

RESULTS = Path(__file__).parent / "results" / "defaults.jsonl"
BATCH, TOKENS, TRAIN, TEST = 16, 32, 2000, 1000


def runs(group: str) -> list[dict[str, Any]]:
    """What each group of measurements varies."""
    if group == "lr":
        grid = [{"d": d, "lr": lr} for lr in (0.05, 0.1, 0.025) for d in (64, 256, 1024, 4096)]
        return [*grid, {"d": 4096, "lr": 0.0125}, {"d": 64, "lr": 0.2}]
    if group == "scale":
        isometric = [{"d": d, "lr": lr, "scale": "isometric"} for d in (64, 1024) for lr in (0.4, 0.8)]
        return isometric + [{"d": d, "lr": lr, "scale": "rms"} for d in (64, 1024) for lr in (0.05, 0.1)]
    if group == "blocks":
        return [{"d": 256, "lr": 0.05, "block_size": n, "seed": seed} for seed in range(3) for n in (16, 64, 256)]
    if group == "gaussian":
        kinds = ("independent", "shared")
        return [
            {"d": 256, "lr": 0.05, "block_size": 64, "gaussian": k, "seed": seed} for k in kinds for seed in range(3)
        ]
    if group == "baseline":
        return [{"method": "head", "lr": 0.01}] + [{"method": "full", "lr": lr} for lr in (3e-5, 1e-4)]
    raise SystemExit(f"unknown group {group!r}: lr, scale, blocks, gaussian, baseline or table")


def vary(model: torch.nn.Module, scale: str, gaussian: str) -> None:
    """The candidates that the package does not offer: rms scale, and a Gaussian matrix of its own for every tensor."""
    seen = set()
    for layer in model.modules():
        for name, offset in getattr(layer, "offsets", {}).get("default", {}).items():
            projection = offset.projection
            if id(projection) in seen or not isinstance(projection, FastfoodTensor):
                continue
            seen.add(id(projection))
            (device,) = projection._state
            g, before, *rest = projection._state[device]
            if scale == "rms":
                weight = getattr(layer.get_base_layer(), name)
                before = before * (weight.square().mean().sqrt() / natural_size(projection.rows, projection.cols))
            if gaussian == "independent":
                g = torch.from_numpy(normal_rows(len(seen), "independent", "", len(g), projection.n))
            projection._state[device] = (g, before.detach(), *rest)


def run(row: dict[str, Any], path: str, data: DatasetDict) -> dict[str, Any]:
    """One training run: accuracy and cross-entropy on the test sentences, and the seconds it took."""
    torch.manual_seed(row["seed"])
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    if row["method"] == "intrinsic":
        config = IntrinsicConfig(
            d=row["d"],
            seed=row["seed"],
            block_size=row["block_size"],
            scale="isometric" if row["scale"] == "isometric" else "fan_in",
        )
        model = get_peft_model(model, config)
        vary(model, row["scale"], row["gaussian"])
    elif row["method"] == "head":
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=row["lr"], weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, row["steps"] // 10, row["steps"])
    order = np.concatenate([np.random.default_rng((row["seed"], e)).permutation(TRAIN) for e in range(3)])

    def loss_and_hits(part: str, index: Any) -> tuple[torch.Tensor, int]:
        batch = data[part][index]
        inputs = tokenizer(batch["text"], truncation=True, max_length=TOKENS, padding=True, return_tensors="pt")
        target = torch.tensor(batch["label"])
        with torch.autocast("cpu", torch.bfloat16, enabled=row["bf16"]):
            logits = model(**inputs).logits.float()
        return torch.nn.functional.cross_entropy(logits, target), int((logits.argmax(-1) == target).sum())

    model.train()
    start = time.time()
    for step in range(row["steps"]):
        loss, _ = loss_and_hits("train", order[step * BATCH : (step + 1) * BATCH])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        parts = [loss_and_hits("test", range(i, i + 50)) for i in range(0, TEST, 50)]
    return {
        "accuracy": round(sum(hits for _, hits in parts) / TEST, 4),
        "loss": round(sum(float(loss) for loss, _ in parts) / len(parts), 4),
        "seconds": round(time.time() - start),
    }


def table(rows: list[dict[str, Any]]) -> None:
    """Markdown tables of accuracy / cross-entropy: a line per setting, a column per learning rate."""
    for group, model in dict.fromkeys((row["group"], row["model"]) for row in rows):
        chosen = [row for row in rows if (row["group"], row["model"]) == (group, model)]
        rates = sorted({row["lr"] for row in chosen})
        names = ("method", "scale", "d", "block_size", "gaussian", "seed")
        varied = [n for n in names if len({r.get(n) for r in chosen}) > 1] or ["method"]
        print(f"\n{group}, {model}, {chosen[0]['steps']} steps\n\n| {' | '.join(varied)} |", end="")
        print("".join(f" lr {rate} |" for rate in rates) + "\n|" + "---|" * (len(varied) + len(rates)))
        for setting in dict.fromkeys(tuple(r.get(n) for n in varied) for r in chosen):
            same = [r for r in chosen if tuple(r.get(n) for n in varied) == setting]
            cells = {r["lr"]: f"{r['accuracy']:.3f} / {r['loss']:.3f}" for r in same}
            print(f"| {' | '.join(map(str, setting))} |" + "".join(f" {cells.get(rate, '')} |" for rate in rates))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group")
    parser.add_argument("--model", help="folder or Hub name; the packaged MiniLM without it")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    done = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    if args.group == "table":
        return table(done)
    torch.set_num_threads(args.threads)
    path = args.model or minilm()
    data = rotten_tomatoes(train=TRAIN, test=TEST)
    common = {"model": Path(path).name if args.model else "all-MiniLM-L6-v2", "task": "rotten_tomatoes"}
    common |= {"steps": args.steps, "bf16": args.bf16}
    options = {"method": "intrinsic", "scale": "fan_in", "block_size": None, "gaussian": "shared", "seed": 0}
    for varied in runs(args.group):
        row = {"group": args.group, **common, **options, **varied}
        if any(row.items() <= old.items() for old in done):
            continue
        row.update(run(row, path, data))
        print(row, flush=True)
        with open(RESULTS, "a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
