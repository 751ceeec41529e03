"""Subspaces learned from a training trajectory, with baselines: the tables of Zhang et al. 2023 on a small encoder.

    python benchmarks/trajectory.py run TASK [--data FOLDER] [--model FOLDER] [--scratch FOLDER] [--only NAME]...
    python benchmarks/trajectory.py table TASK
    python benchmarks/trajectory.py plot TASK

Tasks and protocol are those of benchmarks/quality.py (sst2, mrpc_250, rotten_tomatoes_apart; all-MiniLM-L6-v2). A run
appends one JSON line to benchmarks/results/trajectory/TASK/trials.jsonl. Stored runs are skipped. Recordings and
subspaces are in --scratch, and are created if they are missing.

Methods:
    full                full fine-tuning
    freeze              embeddings, pooler and head are trained
    random              Gaussian vectors
    trajectory          16 snapshots of the full run with the same seed
    gradient            gradients of 16 batches at the start
    other task          the trajectory of another task
    unified, zero-shot  the last snapshot of each of the three tasks, or of the two others
    alone               trajectory with the head's directions, 7 × 16 parameters and nothing else
    without outliers    full fine-tuning after the outliers of trajectory 16 beyond 3 sigma were set to zero
    without random      the same with as many random weights of each layer
From random to zero-shot, 6 × `dim` parameters are trained, `dim` for each layer. As in the paper, embeddings, pooler
and head are trained as well, at the best learning rate of freeze. Each method starts with three learning rates a factor
of 4 apart, with more while the best by loss is at an edge, and then two more seeds.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from peft import get_peft_model

sys.path.insert(0, str(Path(__file__).parent))
from quality import Row, make_batches
from studies import FULL_RATES, Method, Methods, Study

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.analysis import disable_outliers, find_outliers
from peft_intrinsic.trajectory import fit_subspace, record, record_gradients, snapshots

TASKS = ("sst2", "mrpc_250", "rotten_tomatoes_apart")
RECORDED = r"(bert\.encoder\.layer\.\d+|classifier)\..*"
ORIGINAL = ["classifier", "bert.pooler", "bert.embeddings"]
SNAPSHOTS, GROUPS = 16, 6
OTHER = {"sst2": "mrpc_250", "mrpc_250": "sst2", "rotten_tomatoes_apart": "mrpc_250"}
RATES = (5e-5, 2e-4, 8e-4)
NAMES = {
    "full": "full fine-tuning",
    "freeze": "embeddings, pooler and head alone",
    "trajectory 16": "trajectory, 6 × 16",
    "random 16": "random subspace, 6 × 16",
    "gradient 16": "gradients at the start, 6 × 16",
    "trajectory 8": "trajectory, 6 × 8",
    "trajectory 4": "trajectory, 6 × 4",
    "other task 16": "trajectory of another task, 6 × 16",
    "zero-shot 2": "two other tasks, 6 × 2",
    "unified 3": "all three tasks, 6 × 3",
    "without outliers": "full fine-tuning without outliers",
    "without random": "full fine-tuning without random weights",
    "alone 16": "trajectory and head's directions alone, 7 × 16",
}


def list_methods(task: str, results: Methods) -> dict[str, Method]:
    """List the methods: a run of each, and its first learning rates."""
    base: Row = {"task": task, "seed": 0}
    result: dict[str, Method] = {
        "full": ({**base, "method": "full"}, FULL_RATES),
        "freeze": ({**base, "method": "freeze"}, (1e-4, 4e-4, 1.6e-3)),
    }
    if not (frozen := results.best(task, result["freeze"])):
        return result  # the others need its best learning rate
    for name in list(NAMES)[2:]:
        kind, _, dim = name.rpartition(" ")
        if kind == "without":
            result[name] = {**base, "method": name}, FULL_RATES
        else:
            shared = {} if kind == "alone" else {"rest_lr": frozen[0]["lr"]}
            result[name] = {**base, "method": kind, "dim": int(dim), **shared}, RATES
    return result


class Trajectories(Study):
    """The runs of one task, with the recordings that they need."""

    def full(self, task: str, lr: float, seed: int, folder: Path | None = None, model: Any = None) -> Row:
        """Fine-tune fully, and record it if a folder is named."""
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
        """Return snapshots of full fine-tuning at its best learning rate."""
        lr = self.results.rate(task, "full")
        folder = self.scratch / task / f"full-{lr:g}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if len(snapshots(folder)) < SNAPSHOTS:
                for path in snapshots(folder):
                    path.unlink()
                self.full(task, lr, seed, folder)
        return snapshots(folder)[-SNAPSHOTS:]

    def gradients(self, seed: int) -> list[Path]:
        """Return gradients of the first batches, with dropout as in training."""
        folder, runner = self.scratch / self.task / f"gradients-{seed}", self.runner(self.task)
        if len(snapshots(folder)) < SNAPSHOTS:
            for path in snapshots(folder):
                path.unlink()
            indices = make_batches(runner.lengths, runner.task["batch"], SNAPSHOTS, seed)
            model = self.base(seed).train()
            record_gradients(model, folder, indices, lambda m, index: runner.loss(m, 0, index)[0], RECORDED)
        return snapshots(folder)

    def random(self, seed: int) -> list[dict[str, torch.Tensor]]:
        """Sample Gaussian vectors, one for each snapshot."""
        generator = torch.Generator().manual_seed(seed)
        model = self.base(seed)
        names = [name for name, _ in model.named_parameters() if name.startswith("bert.encoder.layer.")]
        shapes = {name: model.get_parameter(name).shape for name in names}
        return [{n: 1e-3 * torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(SNAPSHOTS)]

    def subspace(self, kind: str, seed: int) -> Path:
        """Return the file of a learned or random subspace."""
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
        """Train in a subspace. Return the model and the measured values."""
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
        if len(groups) < len(rates):  # one learning rate for both
            groups = {row["lr"]: theta + rest}
        return model, {"numbers": d, **self.train(self.task, model, groups, row["seed"])}

    def outliers(self, seed: int) -> Any:
        """Return the outliers of trajectory 16 beyond three standard deviations."""
        planned, _ = self.results.made(self.task, self.results)["trajectory 16"]
        row = {**planned, "lr": self.results.rate(self.task, "trajectory 16"), "seed": seed}
        path = self.far(row)
        if not path.exists():
            self.run(row)
        return torch.load(path, weights_only=False)

    def far(self, row: Row) -> Path:
        """Return the file of a run's outliers."""
        return self.scratch / self.task / f"outliers-{row['dim']}-{row['lr']:g}-{row['seed']}.pt"

    def run(self, row: Row) -> Row:
        """Train one run of a method."""
        method, lr, seed = row["method"], row["lr"], row["seed"]
        if method == "full":
            folder = self.scratch / self.task / f"full-{lr:g}-{seed}"
            shutil.rmtree(folder, ignore_errors=True)
            return self.full(self.task, lr, seed, folder)
        if method == "freeze":
            model = self.base(seed)
            parameters = self.only(model, ("embeddings", "pooler", "classifier"))
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


if __name__ == "__main__":
    Methods("trajectory", list_methods, NAMES, ("numbers",)).main(Trajectories, __doc__, TASKS)
