"""`measure_intrinsic_dimension`: from a function that trains once to d90 with an interval."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from ..aliases import renamed
from ..trials.engine import Engine, InProcess
from ..trials.runner import Fit, Row, Runner
from ..trials.store import PLAN, TRIAL, Store, read_json, write_whole
from .analysis import Result, build_result, check_baseline
from .curve import grid
from .evidence import Evidence
from .plan import AUTO, Plan
from .search import Search


def measure_intrinsic_dimension(
    fit: Fit,
    dims: Sequence[int] | None = None,
    *,
    target: float = 0.9,
    relative_to: Literal["score", "gain"] = "score",
    center: Literal["median", "mean"] = "median",
    majority: float | None = None,
    baseline: float | Sequence[float] | None = None,
    seeds: int = 3,
    baseline_seeds: int | None = None,
    learning_rates: Literal["auto"] | tuple[Any, Any] | None = None,
    trials: int | None = None,
    minutes: float | None = None,
    sweep: bool = False,
    out: str | os.PathLike | None = None,
    overwrite: bool = False,
    settings: dict[str, Any] | None = None,
    engine: Engine | None = None,
) -> Result:
    """Measure the least d at which training in a random subspace reaches a fraction of full fine-tuning.

    With a fraction of 0.9 it is d90 (Li et al. 2018, section 2; for language models Aghajanyan et al. 2020, section 3).
    The grid is scanned from below. Then trials run where they narrow the interval most: around the crossing, or at full
    fine-tuning. The curve is fitted monotonically, and a bootstrap gives the interval of its crossing.

    Args:
        fit: `fit(d, seed) -> score`, higher is better; `fit(None, seed)` is full fine-tuning. With `learning_rates` the
            learning rate is a third argument. The seed sets P and the order of the data. It may return a mapping with
            a `score`. If that is an accuracy, `correct` in the mapping says which predictions are correct (`[examples]`
            of bools), and the interval includes the sampling of the examples. Other values are stored with the trial.
        dims: Grid of d, ascending; by default `grid()`, that of Table 1 of Aghajanyan et al.
        target: Fraction to reach.
        relative_to: `"score"`: the score of full fine-tuning, as in the papers. `"gain"`: its gain over `majority`, or
            without one over `fit(0, 0)`, the model before training.
        center: Aggregate over the seeds of one d: `"median"` of the runs that did not collapse, or `"mean"` of all. A
            run collapsed if it diverged, or is no better than the majority-class baseline.
        majority: Score of the majority-class baseline.
        baseline: Scores of full fine-tuning, where known; by default `fit(None, seed)` runs for each seed.
        seeds: Seeds of each d.
        baseline_seeds: Seeds of full fine-tuning; by default three, and more if they narrow the interval most.
        learning_rates: Learning rates to try, (full fine-tuning, subspace), as many for each, or `"auto"` for both.
            They are tried on a seed that does not count otherwise, for the subspace at every d of the first scan.
        trials: Budget of all trials, by default 60; a sweep has no limit.
        minutes: Time budget of this call; no new trial starts afterwards.
        sweep: Measure the whole grid.
        out: Folder of the run. It stores finished trials, and the same call resumes. Another grid, target, number of
            seeds or budget uses the stored trials.
        overwrite: Discard the stored trials of a folder that is in use.
        settings: Settings that the trials depend on. They are stored, and compared when the run resumes.
        engine: Runs the trials; by default this process, one after another.

    Raises:
        NothingToMeasure: Full fine-tuning is no better than the majority-class baseline, or than the untrained model.
        ValueError: An option cannot work, a score is not a number, or the folder belongs to a run with other settings.

    Example:
        ```python
        def fit(d, seed, learning_rate):
            model = build_model()
            if d is not None:
                model = get_peft_model(model, IntrinsicConfig(d=d, seed=seed, target_modules="all"))
            return train_and_score(model, seed, learning_rate)


        result = measure_intrinsic_dimension(fit, grid(10, 1000, 24), learning_rates="auto", out="runs/mine")
        print(result.d, result.interval)
        ```
    """
    options = (target, relative_to, center, majority, baseline, seeds, baseline_seeds, learning_rates, trials, minutes)
    plan = Plan(grid() if dims is None else dims, *options, sweep)
    return run_plan(fit, plan, out, overwrite, settings, engine)


def run_plan(
    fit: Fit,
    plan: Plan,
    out: str | os.PathLike | None,
    overwrite: bool = False,
    settings: dict[str, Any] | None = None,
    engine: Engine | None = None,
    known: Sequence[Row] = (),
) -> Result:
    """Run the trials of a plan, see `measure_intrinsic_dimension`.

    Args:
        known: Rows of full fine-tuning from a run in which it is the same.
    """
    start = time.monotonic()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory()) if out is None else out
        store = stack.enter_context(Store(folder, settings or {}, overwrite, TRIAL))
        before = len(store.rows)
        for row in known:
            trial = {name: row[name] for name in TRIAL}
            if store.key(trial) not in store.rows:
                store.add(trial, {name: value for name, value in row.items() if name not in TRIAL})
        evidence = Evidence(plan, store.rows, _count_earlier_rows(store, plan, len(store.rows) > before))
        # Smoothing would count stored trials, which took no time.
        bar = tqdm(desc="trials", unit="trial", leave=False, smoothing=0, initial=len(evidence.trials))
        stack.enter_context(bar)
        engine = engine or InProcess()
        stack.callback(engine.close)
        runner = Runner(fit, store, engine, bar)

        def show_progress(doing: str, left: int) -> None:
            bar.total = bar.n + left
            bar.set_postfix_str(doing)

        def score_untrained() -> None:
            if plan.relative_to == "gain" and plan.majority is None:
                rates = plan.rates_for(0)
                rate = None if rates is None else AUTO[1][0] if rates == "auto" else rates[0]  # nothing is trained
                evidence.add((0, 0, rate), runner.run([(0, 0, rate)], finite=True)[0])
            check_baseline(evidence)

        search = Search(runner.run, evidence, engine.slots, show_progress, start)
        return build_result(store, plan, search.run(score_untrained))


def _count_earlier_rows(store: Store, plan: Plan, more: bool) -> int:
    """Count the stored rows that predate this plan, and store the plan with their number.

    A resumed plan has the number of its first call, unless there are `more` rows: it continues as if uninterrupted.
    """
    path, asked = Path(store.folder, PLAN), json.loads(json.dumps(asdict(plan)))
    before: dict[str, Any] = {}
    with suppress(FileNotFoundError, ValueError):  # a damaged plan loses only the number
        before = renamed(read_json(path, ""))
    rows = before.pop("rows", 0)
    if more or before != asked:
        rows = len(store.rows)
    write_whole(path, json.dumps({**asked, "rows": rows}, indent=1))
    return rows
