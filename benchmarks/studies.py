"""What the studies of one encoder share: methods with tuned learning rates, one initial head, rows, table, plot."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from groups import at_best, find_row, format_cell, print_row, tune
from peft import get_peft_model
from quality import DEVICE, Row, Runner, describe_time, minilm, read_rows

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.figures import save_figure, styled

MODEL = "all-MiniLM-L6-v2"
TITLES = {
    "sst2": "SST-2",
    "mrpc_250": "MRPC, 250 steps",
    "rotten_tomatoes_apart": "Rotten Tomatoes",
}
"""Tasks as plots name them."""
FULL_RATES = (2.5e-5, 1e-4, 4e-4)
Method = tuple[Row, tuple[float, ...]]
"""A run, and the learning rates that it starts with."""


class Methods:
    """The methods of a study and their rows, in benchmarks/results/NAME/TASK/trials.jsonl.

    Args:
        name: of the study.
        made: from a task and this, every method that can run by now.
        names: of all of them, in the order in which they run, with the names that the plot has.
        columns: of the rows, shown in the table beside accuracy and cross-entropy.
    """

    def __init__(
        self,
        name: str,
        made: Callable[[str, Methods], dict[str, Method]],
        names: dict[str, str],
        columns: tuple[str, ...],
    ) -> None:
        self.folder = Path(__file__).parent / "results" / name
        self.made, self.names, self.columns = made, names, columns

    def rows(self, task: str) -> list[Row]:
        """What was measured of a task."""
        return read_rows(self.folder / task / "trials.jsonl")

    def best(self, task: str, method: Method) -> list[Row]:
        """The rows of a method at its best learning rate by loss, a row for each seed."""
        return at_best(method, self.rows(task), MODEL)

    def rate(self, task: str, name: str) -> float:
        """The best learning rate of a method.

        Raises:
            SystemExit: it has not been measured.
        """
        if not (rows := self.best(task, self.made(task, self)[name])):
            raise SystemExit(f"{task}: {name!r} comes first. Run it with --only {name!r}.")
        return rows[0]["lr"]

    def missing(self, task: str, only: list[str] | None) -> Iterator[Row]:
        """The next runs that are not there."""
        for name in only or self.names:
            while True:
                method = {name: self.made(task, self)[name]}
                planned = ({"model": MODEL, **run} for _, run in tune(method, self.rows(task), MODEL))
                row = next((row for row in planned if not find_row(self.rows(task), row)), None)
                if row is None:
                    break
                yield row

    def add(self, task: str, row: Row) -> None:
        """Keep a row."""
        print(row, flush=True)
        (self.folder / task).mkdir(parents=True, exist_ok=True)
        with open(self.folder / task / "trials.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def table(self, task: str) -> None:
        """Print a task's rows as Markdown."""
        columns = ["parameters" if column == "numbers" else column for column in self.columns]
        print_row("method", *columns, "best learning rate", "accuracy / cross-entropy", "seeds")
        print_row(*["---"] * (4 + len(self.columns)))
        for name, method in self.made(task, self).items():
            if rows := self.best(task, method):
                shown = [rows[0].get(column, "") for column in self.columns]
                print_row(name, *shown, f"{rows[0]['lr']:g}", format_cell(rows), len(rows))

    @styled
    def plot(self, task: str) -> None:
        """Accuracy and cross-entropy of every method, a point for each seed, as table.svg beside the rows."""
        from matplotlib.figure import Figure

        done = {name: rows for name, method in self.made(task, self).items() if (rows := self.best(task, method))}
        figure = Figure(figsize=(9, 1 + 0.3 * len(done)))
        columns = figure.subplots(1, 2, sharey=True)
        for axis, name, label in zip(columns, ("accuracy", "loss"), ("accuracy", "cross-entropy"), strict=True):
            for y, rows in enumerate(reversed(done.values())):
                values = [row[name] for row in rows]
                axis.plot(values, [y] * len(rows), "o", color="C0", markersize=3.5, alpha=0.7)
                axis.plot(sum(values) / len(values), y, "|", color="C1", markersize=14, markeredgewidth=1.5)
            axis.set(xlabel=label)
            axis.locator_params(axis="x", nbins=5)
            axis.grid(axis="y", visible=False)
        columns[0].set_yticks(range(len(done)), [self.names[name] for name in reversed(done)])
        figure.suptitle(f"{TITLES[task]}, {MODEL}: each seed, and the mean as a line", fontsize="medium")
        save_figure(figure, self.folder / task / "table.svg")

    def main(self, study: Callable[..., Any], doc: str | None, tasks: tuple[str, ...]) -> None:
        """The command line: run, table or plot."""
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("action", choices=("run", "table", "plot"))
        parser.add_argument("task", choices=tasks)
        parser.add_argument("--data", type=Path)
        parser.add_argument("--model", help="folder of all-MiniLM-L6-v2")
        parser.add_argument("--scratch", type=Path, default=Path("runs") / self.folder.name)
        parser.add_argument("--only", action="append", help="name of a method; may be given several times")
        args = parser.parse_args()
        if args.action != "run":
            return (self.table if args.action == "table" else self.plot)(args.task)
        torch.set_num_threads(1)
        running = study(self, args.task, args.model or minilm(), args.data, args.scratch)
        for row in self.missing(args.task, args.only):
            self.add(args.task, {**row, **running.run(row)})
        return None


class Study:
    """One task of a study: models ready for training, and how they are trained."""

    def __init__(self, results: Methods, task: str, path: str, data: Path | None, scratch: Path) -> None:
        self.results, self.task, self.path, self.data, self.scratch = results, task, path, data, scratch
        self.runners: dict[str, Runner] = {}

    def runner(self, task: str) -> Runner:
        """Data of a task, read once."""
        if task not in self.runners:
            self.runners[task] = Runner(self.path, task, self.data)
        return self.runners[task]

    def base(self, seed: int) -> Any:
        """The pretrained model, its head re-initialized from the seed that adapters use."""
        model = self.runner(self.task).kind.from_pretrained(self.path, num_labels=2, dtype=torch.float32)
        model = get_peft_model(model, IntrinsicConfig(d=200, task_type="SEQ_CLS")).merge_and_unload()  # θ is zero
        torch.manual_seed(seed)
        return model.requires_grad_(True).to(DEVICE)

    def train(self, task: str, model: Any, groups: dict[float, list[Any]], seed: int, **more: Any) -> Row:
        """Train, and score on the test examples.

        Args:
            task: whose data.
            model: ready for training.
            groups: parameters by their learning rate.
            seed: of the order of the data.
            more: for `Runner.fit`.
        """
        start = time.time()
        options = [{"params": parameters, "lr": lr} for lr, parameters in groups.items()]
        optimizer = torch.optim.AdamW(options, weight_decay=0.0)
        losses = self.runner(task).fit(model, optimizer, seed, **more)
        steps = [round(sum(losses[i : i + 25]) / 25, 3) for i in range(0, len(losses), 25)]
        return {**self.runner(task).score(model), "train": steps, **describe_time(start)}

    def only(self, model: Any, parts: tuple[str, ...]) -> list[Any]:
        """Freeze a model but for the parameters whose names contain one of these, and return those."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in parts))
        return [parameter for parameter in model.parameters() if parameter.requires_grad]
