"""Measurements on text: checked completely, then run. The commands `measure` and `study` use it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..text.launch import LaunchedFit, LoadedFit
from ..text.options import TextOptions
from ..text.tasks import Task, load_task
from ..text.training import select_dims
from ..trials.engine import Engine
from ..trials.runner import Row
from ..trials.store import check_folder
from .analysis import Result
from .curve import grid
from .measure import run_plan
from .plan import Plan
from .report import write_report


@dataclass(frozen=True)
class TextMeasurement:
    """A measurement that can run: its task is loaded, and its options are checked against its model.

    Args:
        options: Model, task and training.
        task: The task of the options.
        plan: Grid, target and budget.
        launcher: Command that runs each trial, see `LaunchedFit`; None trains in the processes of the engine.
    """

    options: TextOptions
    task: Task
    plan: Plan
    launcher: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that the trials depend on."""
        settings = self.options.to_settings()
        settings |= {} if self.task.best in (None, 1) else {"best": self.task.best}
        return settings | ({"launcher": self.launcher} if self.launcher else {})  # its processes change the batch

    def describe(self) -> str:
        """Describe what will run, for the user to read before it does."""
        sizes = ", ".join(f"{len(data)} {split}" for split, data in self.task.data.items())
        model = f"{self.options.model} by {self.options.method}"
        return f"{model} on {sizes} examples, by {self.task.metric}\n{self.plan.describe()}"

    def run(
        self,
        out: str | os.PathLike,
        engine: Callable[[], Engine] | None = None,
        overwrite: bool = False,
        known: Sequence[Row] = (),
    ) -> Result:
        """Run the measurement, and write its report into `out`.

        Args:
            out: Folder of the run.
            engine: Makes the engine of the trials; None is this process.
            overwrite: Discard the stored trials of a folder that is in use.
            known: Rows of full fine-tuning from a run in which it is the same.

        Raises:
            ValueError, RuntimeError, OSError: See `measure_intrinsic_dimension`, `LaunchedFit`.
        """
        if self.launcher:
            fit: Any = LaunchedFit(self.options, self.launcher, out)
        else:
            fit = LoadedFit(self.options, out, self.task)
        options: Any = {"out": out, "overwrite": overwrite, "settings": self.settings, "known": known}
        result = run_plan(fit, self.plan, **options, engine=engine() if engine else None)
        write_report(result, out)
        return result


def prepare(options: Mapping[str, Any], plan: Mapping[str, Any], launcher: str | None = None) -> TextMeasurement:
    """Check everything that needs no weights of the model.

    Args:
        options: Options of `TextOptions`.
        plan: Options of `Plan`. By default, `relative_to` is "gain" if less is better, as for a loss, else "score".
        launcher: See `TextMeasurement`.

    Raises:
        ValueError, OSError, ImportError: An option cannot work, or does not fit the data or the model.
    """
    chosen, planned = TextOptions(**options), Plan(**{"dims": grid(), **plan})
    task = load_task(chosen)
    chosen = replace(chosen, metric=task.metric, columns=task.columns)
    relative_to = plan.get("relative_to", "gain" if task.sign < 0 else "score")
    if task.sign < 0 and relative_to == "score":
        raise ValueError(
            f"relative_to='score' does not work for a loss or an error ({task.metric}), of which a fraction is no "
            "target. Use relative_to='gain'."
        )
    dims, majority = select_dims(chosen, planned.dims), task.score_majority()
    return TextMeasurement(
        chosen, task, replace(planned, relative_to=relative_to, dims=dims, majority=majority), launcher
    )


def measure_text(
    options: Mapping[str, Any],
    out: str | os.PathLike,
    plan: Mapping[str, Any] | None = None,
    launcher: str | None = None,
    engine: Callable[[], Engine] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Result | None:
    """Measure the intrinsic dimension of a task on text, and write the report into `out`.

    Args:
        options, plan, launcher: See `prepare`.
        out, engine, overwrite: See `TextMeasurement.run`.
        dry_run: Print the plan, run nothing, and return None.

    Raises:
        ValueError, RuntimeError, OSError, ImportError: See `prepare`, `TextMeasurement.run`.

    Example:
        ```python
        options = {"model": "bert-base-uncased", "task": "glue/mrpc"}
        measure_text(options, "runs/mrpc", {"learning_rates": "auto"}).d
        ```
    """
    measurement = prepare(options, plan or {}, launcher)
    if not overwrite:
        check_folder(out, measurement.settings)
    if dry_run:
        print(f"{measurement.describe()}\nin {out}")
        return None
    return measurement.run(out, engine, overwrite)
