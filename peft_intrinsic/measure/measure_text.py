"""Measurements on text: checked completely, then run. The commands `measure` and `study` use it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..text.launch import LaunchedFit
from ..text.options import TextOptions
from ..text.tasks import Task, load_task
from ..text.training import TextFit, select_dims
from ..trials.engine import Engine
from ..trials.runner import Row
from ..trials.store import check_folder
from .analysis import Result
from .curve import grid
from .evidence import TUNING
from .measure import run_plan
from .plan import Plan
from .report import write_report


@dataclass(frozen=True)
class TextMeasurement:
    """A measurement that can run: its task is loaded, and its options are checked against its model."""

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
        """Describe what will run."""
        sizes = ", ".join(f"{len(data)} {split}" for split, data in self.task.data.items())
        start = f"{self.options.model} by {self.options.method} on {sizes} examples, by {self.task.metric}"
        return f"{start}\n{self.plan.describe()}"

    def run(
        self,
        out: str | os.PathLike,
        engine: Callable[[], Engine] | None = None,
        overwrite: bool = False,
        known: Sequence[Row] = (),
    ) -> Result:
        """Run the measurement, and write its report into `out`. See `measure_text` and `run_plan`."""
        launched = LaunchedFit(self.options, self.launcher, out) if self.launcher else None
        fit, made = launched or TextFit(self.options, self.task, out), engine() if engine else None
        result = run_plan(fit, self.plan, out, overwrite, self.settings, made, known)
        write_report(result, out)
        return result

    def with_target_of(self, result: Result) -> TextMeasurement:
        """Copy the measurement with as many seeds of full fine-tuning as another: more would be another target."""
        full = [trial for trial in result.trials if trial["d"] is None and trial["seed"] != TUNING]
        seeds = sum(trial["learning_rate"] == result.baseline.learning_rate for trial in full)
        return replace(self, plan=replace(self.plan, baseline_seeds=seeds or None))


def prepare(options: Mapping[str, Any], plan: Mapping[str, Any], launcher: str | None = None) -> TextMeasurement:
    """Check everything that needs no weights of the model. See `measure_text`."""
    chosen, planned = TextOptions(**options), Plan(**{"dims": grid(), **plan})
    task = load_task(chosen)
    chosen = replace(chosen, metric=task.metric, columns=task.columns)
    relative_to = plan.get("relative_to", "gain" if task.sign < 0 else "score")
    if task.sign < 0 and relative_to == "score":
        raise ValueError(
            f"relative_to='score' does not work for a loss or an error ({task.metric}), of which a fraction is no "
            "target. Use relative_to='gain'."
        )
    changes: Any = {"relative_to": relative_to, "dims": select_dims(chosen, planned.dims)}
    return TextMeasurement(chosen, task, replace(planned, **changes, majority=task.score_majority()), launcher)


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
        options: Options of `TextOptions`.
        out: Folder of the run.
        plan: Options of `measure_intrinsic_dimension` for the plan, but `majority`. By default, `relative_to` is "gain"
            if less is better, as for a loss, else "score".
        launcher: Command that runs each trial, see `LaunchedFit`; None trains in the processes of the engine.
        engine: Makes the engine of the trials; None is this process.
        overwrite: Discard the stored trials of a folder that is in use.
        dry_run: Print the plan, run nothing, and return None.

    Raises:
        ValueError, RuntimeError, OSError, ImportError: An option cannot work, or does not fit the data or the model; or
            see `measure_intrinsic_dimension`, `LaunchedFit`.

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
