"""A measurement on text: checked in full, then locked, then loaded. What `measure` and every `study` run."""

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
from ..trials.store import check_folder
from .analysis import Result
from .curve import grid
from .measure import measured
from .plan import Plan, listed
from .report import write_report


@dataclass(frozen=True)
class Prepared:
    """A measurement that can begin: its task is loaded, its model was looked at without its weights."""

    options: TextOptions
    task: Task
    plan: Plan

    def settings(self, launcher: str | None) -> dict[str, Any]:
        """What the trials depend on."""
        found = self.options.to_settings()
        if self.task.best not in (None, 1):
            found["best"] = self.task.best
        if launcher:
            found["launcher"] = launcher  # more processes make larger batches
        return found

    def check(self, out: str | os.PathLike, launcher: str | None, overwrite: bool) -> None:
        """Whether the run can have this folder.

        Raises:
            ValueError: see `check_folder`.
        """
        if not overwrite:
            check_folder(out, self.settings(launcher))


def prepare(options: Mapping[str, Any], question: Mapping[str, Any]) -> Prepared:
    """Check all that can be checked without the model's weights.

    Args:
        options: of `TextOptions`.
        question: of `Plan`. Without `relative_to` it is "gain" where less is better, as of a loss or an error, which
            have no share, and "score" else.

    Raises:
        ValueError, OSError, ImportError: an option cannot work, or does not fit the data or the model.
    """
    chosen = TextOptions(**options)
    question = {"dims": tuple(grid()), **question, "learning_rates": listed(question.get("learning_rates"))}
    Plan(**question)  # before the data are read
    task = load_task(chosen)
    chosen = replace(chosen, metric=task.metric, columns=task.columns)
    question = {"relative_to": "gain" if task.sign < 0 else "score", **question}
    if task.sign < 0 and question["relative_to"] == "score":
        raise ValueError(
            f"relative_to='score': a share of a loss or an error ({task.metric}) means nothing. Use relative_to='gain'."
        )
    question["dims"] = select_dims(chosen, question["dims"])
    return Prepared(chosen, task, Plan(**question, majority=task.score_majority()))


def measure_text(
    options: Mapping[str, Any],
    out: str | os.PathLike,
    question: Mapping[str, Any] | None = None,
    **run: Any,
) -> Result | None:
    """Measure, and write the report into `out`.

    Args:
        options, question: see `prepare`.
        out: folder of the run.
        run: of `measure_prepared`.

    Raises:
        ValueError, RuntimeError, OSError, ImportError: as `measure_intrinsic_dimension`, `prepare`, `LaunchedFit`.
    """
    return measure_prepared(prepare(options, question or {}), out, **run)


def measure_prepared(
    ready: Prepared,
    out: str | os.PathLike,
    launcher: str | None = None,
    engine: Callable[[], Engine] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    known: Sequence[Mapping[str, Any]] = (),
) -> Result | None:
    """Measure what is prepared, and write the report into `out`.

    Args:
        ready: what to measure.
        out: folder of the run.
        launcher: runs each trial, see `LaunchedFit`; None trains in the engine's processes.
        engine: makes what runs the trials; None is this process.
        overwrite: discard the stored trials of a folder that is in use.
        dry_run: print the plan, run nothing, return None.
        known: rows of full fine-tuning that another run has and that are the same here.
    """
    options, task, plan = ready.options, ready.task, ready.plan
    ready.check(out, launcher, overwrite)
    if dry_run:
        sizes = ", ".join(f"{len(task.data[split])} {split}" for split in task.data)
        print(f"{options.model} by {options.method} on {sizes} examples, by {task.metric}\n{plan.told()}\nin {out}")
        return None
    fit = LaunchedFit(options, launcher, out) if launcher else LoadedFit(options, out, task)
    common, made = ready.settings(launcher), engine() if engine else None
    result = measured(fit, plan, out=out, overwrite=overwrite, settings=common, engine=made, known=known)
    write_report(result, out)
    return result
