"""Subspaces learnt from the fine-tuning trajectory beside others: the tables of Zhang et al. 2023 in small.

    python benchmarks/trajectory.py run TASK [--data FOLDER] [--model FOLDER] [--scratch FOLDER] [--only NAME ...]
    python benchmarks/trajectory.py table TASK
    python benchmarks/trajectory.py plot TASK

Tasks and protocol are those of benchmarks/quality.py (sst2, mrpc_250, rotten_tomatoes; all-MiniLM-L6-v2). A run appends
one JSON line to benchmarks/results/trajectory/TASK/trials.jsonl, and runs that are there are skipped. Recordings and
subspaces lie in --scratch, and are made again where they are missing.

full: everything trained. freeze: embeddings, pooler and head. All subspace methods train these in the original space,
as the paper, at freeze's best rate, and 6 times `dim` numbers, `dim` for each layer: random (Gaussian vectors),
trajectory (16 snapshots of the full run with the same seed), gradient (of 16 batches at the start), other task (its
trajectory), unified (the last snapshot of each of the three tasks), zero-shot (without the task's own). alone: 7 times
16 numbers, the head's own directions among them, and nothing else. without outliers: the weights that trajectory 16
moves beyond 3 sigma set to zero in the pretrained model, then full fine-tuning; without random: as many of each layer.
Rates of each start with three a factor of 4 apart, with more while the best, by loss, is at an edge; then two seeds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from peft import get_peft_model

sys.path.insert(0, str(Path(__file__).parent))
from groups import at_best, cell, found, line, tuned
from quality import Row, Runner, batches, lines, minilm

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.trajectory import (
    disable_outliers,
    find_outliers,
    fit_subspace,
    record,
    record_gradients,
    snapshots,
)

TASKS = ("sst2", "mrpc_250", "rotten_tomatoes")
MODEL = "all-MiniLM-L6-v2"
RESULTS = Path(__file__).parent / "results" / "trajectory"
RECORDED = r"(bert\.encoder\.layer\.\d+|classifier)\..*"
ORIGINAL = ["classifier", "bert.pooler", "bert.embeddings"]
SNAPSHOTS, GROUPS = 16, 6
OTHER = {"sst2": "mrpc_250", "mrpc_250": "sst2", "rotten_tomatoes": "mrpc_250"}
FULL_RATES, RATES = (2.5e-5, 1e-4, 4e-4), (5e-5, 2e-4, 8e-4)
NAMES = (
    *("trajectory 16", "random 16", "gradient 16", "trajectory 8", "trajectory 4", "other task 16"),
    *("zero-shot 2", "unified 3", "without outliers", "without random", "alone 16"),
)
Methods = dict[str, tuple[Row, tuple[float, ...]]]


def rows(task: str) -> list[Row]:
    """What was measured of a task."""
    return lines(RESULTS / task / "trials.jsonl")


def best_rate(task: str, method: tuple[Row, tuple[float, ...]]) -> float:
    """The best rate of a contestant by loss.

    Raises:
        SystemExit: it has not been measured.
    """
    found = at_best(method, rows(task), MODEL)
    if not found:
        raise SystemExit(f"{task}: {method[0]['method']} comes first. Run it with --only {method[0]['method']}.")
    return found[0]["lr"]


def contestants(task: str) -> Methods:
    """Every contestant: its run, and the rates that it starts with."""
    base: Row = {"task": task, "seed": 0}
    result: Methods = {
        "full": ({**base, "method": "full"}, FULL_RATES),
        "freeze": ({**base, "method": "freeze"}, (1e-4, 4e-4, 1.6e-3)),
    }
    if not at_best(result["freeze"], rows(task), MODEL):
        return result  # the others need its best rate
    rest = best_rate(task, result["freeze"])
    for name in NAMES:
        kind, _, dim = name.rpartition(" ")
        if kind == "without":
            result[name] = {**base, "method": name}, FULL_RATES
        else:
            shared = {} if kind == "alone" else {"rest_lr": rest}
            result[name] = {**base, "method": kind, "dim": int(dim), **shared}, RATES
    return result


class Study:
    """One task: its runs, and the recordings that they need."""

    def __init__(self, task: str, path: str, data: Path | None, scratch: Path) -> None:
        self.task, self.path, self.data, self.scratch = task, path, data, scratch
        self.runners: dict[str, Runner] = {}

    def runner(self, task: str) -> Runner:
        if task not in self.runners:
            self.runners[task] = Runner(self.path, task, self.data)
        return self.runners[task]

    def base(self, seed: int) -> Any:
        """The pretrained model, its head drawn from the stream from which adapters draw it."""
        model = self.runner(self.task).kind.from_pretrained(self.path, num_labels=2, dtype=torch.float32)
        model = get_peft_model(model, IntrinsicConfig(d=200, task_type="SEQ_CLS")).merge_and_unload()  # θ is zero
        torch.manual_seed(seed)
        return model.requires_grad_(True)

    def train(self, task: str, model: Any, rates: dict[float, list[Any]], seed: int, **more: Any) -> Row:
        """Train, and score on the test examples."""
        start = time.time()
        groups = [{"params": parameters, "lr": lr} for lr, parameters in rates.items()]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        losses = self.runner(task).fit(model, optimizer, seed, **more)
        steps = [round(sum(losses[i : i + 25]) / 25, 3) for i in range(0, len(losses), 25)]
        return {**self.runner(task).score(model), "train": steps, "seconds": round(time.time() - start)}

    def full(self, task: str, lr: float, seed: int, folder: Path | None = None, model: Any = None) -> Row:
        """Full fine-tuning, recorded where a folder is named."""
        model = model or self.base(seed)
        last = self.runner(task).task["steps"]
        every = last // (SNAPSHOTS - 1)

        def after(step: int) -> None:
            if folder and (step == last or (step % every == 0 and step // every < SNAPSHOTS)):
                record(model, folder, step)

        if folder:
            record(model, folder, 0, RECORDED)

        return {
            "numbers": model.num_parameters(),
            **self.train(task, model, {lr: list(model.parameters())}, seed, after=after),
        }

    def recording(self, task: str, seed: int) -> list[Path]:
        """Snapshots of full fine-tuning at its best rate."""
        lr = best_rate(task, contestants(task)["full"])
        folder = self.scratch / task / f"full-{lr:g}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if len(snapshots(folder)) < SNAPSHOTS:
                for path in snapshots(folder):
                    path.unlink()
                self.full(task, lr, seed, folder)
        return snapshots(folder)[-SNAPSHOTS:]

    def gradients(self, seed: int) -> list[Path]:
        """Gradients of the first batches, dropout on as in training."""
        folder, runner = self.scratch / self.task / f"gradients-{seed}", self.runner(self.task)
        if len(snapshots(folder)) < SNAPSHOTS:
            for path in snapshots(folder):
                path.unlink()
            indexes = batches(runner.lengths, runner.task["batch"], SNAPSHOTS, seed)
            model = self.base(seed).train()
            record_gradients(model, folder, indexes, lambda m, index: runner.loss(m, 0, index)[0], RECORDED)
        return snapshots(folder)

    def random(self, seed: int) -> list[dict[str, torch.Tensor]]:
        """Gaussian vectors, one for each snapshot."""
        generator = torch.Generator().manual_seed(seed)
        model = self.base(seed)
        names = [name for name, _ in model.named_parameters() if name.startswith("bert.encoder.layer.")]
        shapes = {name: model.get_parameter(name).shape for name in names}
        return [{n: 1e-3 * torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(SNAPSHOTS)]

    def subspace(self, kind: str, seed: int) -> Path:
        """The file of a learnt, or random, subspace."""
        path = self.scratch / self.task / f"{kind}-{seed}.safetensors"
        if path.exists():
            return path
        others = [task for task in TASKS if task != self.task]
        sources: dict[str, Callable[[], list[Any]]] = {
            "trajectory": partial(self.recording, self.task, seed),
            "alone": partial(self.recording, self.task, seed),
            "random": partial(self.random, seed),
            "gradient": partial(self.gradients, seed),
            "other task": partial(self.recording, OTHER[self.task], seed),
            "unified": lambda: [self.recording(task, seed)[-1] for task in TASKS],
            "zero-shot": lambda: [self.recording(task, seed)[-1] for task in others],
        }
        rows = sources[kind]()
        fit_subspace(rows, len(rows), out=path)
        return path

    def tuned(self, row: Row) -> tuple[Any, Row]:
        """Training in a subspace: the model and what was measured."""
        path = self.subspace(row["method"], row["seed"])
        alone = row["method"] == "alone"
        d = row["dim"] * (GROUPS + alone)
        where = {"projection": "trajectory", "subspace": str(path), "task_type": "SEQ_CLS"}
        config = IntrinsicConfig(d=d, modules_to_save=None if alone else ORIGINAL, **where)
        model = get_peft_model(self.base(row["seed"]), config)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        theta = [p for name, p in trained.items() if "intrinsic_theta" in name]
        rest = [p for name, p in trained.items() if "intrinsic_theta" not in name]
        rates = {row["lr"]: theta, **({} if alone else {-1.0: rest})}
        groups = {(row["rest_lr"] if lr < 0 else lr): parameters for lr, parameters in rates.items()}
        if len(groups) < len(rates):  # one rate for both
            groups = {row["lr"]: theta + rest}
        return model, {"numbers": d, **self.train(self.task, model, groups, row["seed"])}

    def outliers(self, seed: int) -> Any:
        """What trajectory 16 moves beyond three standard deviations."""
        method = contestants(self.task)["trajectory 16"]
        row = {**method[0], "lr": best_rate(self.task, method), "seed": seed}
        path = self.far(row)
        if not path.exists():
            self.run(row)
        return torch.load(path, weights_only=False)

    def far(self, row: Row) -> Path:
        """Where a run's outliers are kept."""
        return self.scratch / self.task / f"outliers-{row['dim']}-{row['lr']:g}-{row['seed']}.pt"

    def run(self, row: Row) -> Row:
        """One run of a contestant."""
        method, lr, seed = row["method"], row["lr"], row["seed"]
        if method == "full":
            folder = self.scratch / self.task / f"full-{lr:g}-{seed}"
            shutil.rmtree(folder, ignore_errors=True)
            return self.full(self.task, lr, seed, folder)
        if method == "freeze":
            model = self.base(seed)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("encoder" not in name)
            parameters = [p for p in model.parameters() if p.requires_grad]
            numbers = sum(p.numel() for p in parameters)
            return {"numbers": numbers, **self.train(self.task, model, {lr: parameters}, seed)}
        if method.startswith("without"):
            far = self.outliers(seed)
            model = self.base(seed)
            disable_outliers(model, far if method.endswith("outliers") else far.random(seed))
            return {**self.full(self.task, lr, seed, model=model), "zeros": len(far)}
        model, measured = self.tuned(row)
        if method == "trajectory":
            torch.save(find_outliers(model), self.far(row))
        return measured


def missing(task: str, only: list[str] | None) -> Iterator[Row]:
    """The next runs that are not there."""
    for name in only or ("full", "freeze", *NAMES):
        while True:
            method = {name: contestants(task)[name]}
            planned = ({"model": MODEL, **run} for _, run in tuned(method, rows(task), MODEL))
            row = next((row for row in planned if not found(rows(task), row)), None)
            if row is None:
                break
            yield row


def table(task: str) -> None:
    """Print a task's rows as Markdown."""
    line("contestant", "numbers", "best rate", "accuracy / cross-entropy", "seeds")
    line(*["---"] * 5)
    for name, method in contestants(task).items():
        if best := at_best(method, rows(task), MODEL):
            line(name, best[0]["numbers"], f"{best[0]['lr']:g}", cell(best), len(best))


def plot(task: str) -> None:
    """Accuracy of every contestant, a point for each seed, as table.png beside the rows."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    done = {name: at_best(method, rows(task), MODEL) for name, method in contestants(task).items()}
    done = {name: best for name, best in done.items() if best}
    figure, axis = plt.subplots(figsize=(6, 0.8 + 0.3 * len(done)), layout="constrained")
    for place, best in enumerate(reversed(done.values())):
        axis.plot([row["accuracy"] for row in best], [place] * len(best), "k.", alpha=0.6)
        axis.plot(sum(row["accuracy"] for row in best) / len(best), place, "|", color="tab:red", markersize=14)
    axis.set_yticks(range(len(done)), list(reversed(done)))
    axis.set(xlabel="accuracy: seeds, and their mean in red", title=task)
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(RESULTS / task / "table.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table", "plot"))
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--scratch", type=Path, default=Path("runs/trajectory"))
    parser.add_argument("--only", nargs="+", help="contestants, such as 'trajectory 16'")
    args = parser.parse_args()
    if args.action != "run":
        return (table if args.action == "table" else plot)(args.task)
    torch.set_num_threads(1)
    study = Study(args.task, args.model or minilm(), args.data, args.scratch)
    (RESULTS / args.task).mkdir(parents=True, exist_ok=True)
    for row in missing(args.task, args.only):
        row.update(study.run(row))
        print(row, flush=True)
        with open(RESULTS / args.task / "trials.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
