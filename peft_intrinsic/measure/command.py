"""A measurement on text from the options of the command: what `measure` and every `study` run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from .curve import grid
from .launch import LaunchedFit
from .measure import Result, measure_intrinsic_dimension
from .report import write_report
from .tasks import load_task, settings
from .text import check_dims, text_fit


def measure_text(
    options: Mapping[str, Any],
    out: str | os.PathLike,
    launcher: str | None = None,
    of: Literal["score", "gain"] | None = None,
    dims: Sequence[int] | None = None,
    **search: Any,
) -> Result:
    """Measure, and write the report into `out`.

    Args:
        options: of the trials: model, said, task, train, eval, columns, label, metric, task_type, max_length, patience,
            arguments (of `TrainingArguments`), train_score.
        out: folder of the run.
        launcher: runs each trial, see `LaunchedFit`; None trains in the engine's processes.
        of: see `measure_intrinsic_dimension`; None is `"gain"` where less is better, as of a loss or an error, which
            have no share, and `"score"` else.
        dims, search: of `measure_intrinsic_dimension`.

    Raises:
        ValueError, RuntimeError, OSError, ImportError: as `measure_intrinsic_dimension`, `load_task`, `check_dims`,
            `LaunchedFit`.
    """
    task = load_task(options)
    options = {**options, "metric": task.metric}
    of = of or ("gain" if task.sign < 0 else "score")
    if task.sign < 0 and of == "score":
        raise ValueError(f"of='score': a share of a loss or an error ({task.metric}) means nothing. Use of='gain'.")
    check_dims(options, dims or grid())
    fit = LaunchedFit(options, launcher, out) if launcher else text_fit(options, out)
    common = {**settings(options), "columns": list(task.columns)}
    if task.best not in (None, 1):
        common["best"] = task.best
    if launcher:
        common["launcher"] = launcher  # more processes make larger batches
    result = measure_intrinsic_dimension(fit, dims, of=of, majority=task.majority(), out=out, settings=common, **search)
    write_report(result, out)
    return result
