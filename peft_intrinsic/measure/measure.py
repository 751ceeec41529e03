"""`measure_intrinsic_dimension`: from a function that trains once to d90 with an interval."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import islice
from operator import index
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from ..aliases import renamed
from ..trials.engine import Engine, InProcess
from ..trials.runner import Fit, Runner
from ..trials.store import PLAN, TRIAL, Store, read_json, write_whole
from .analysis import Result, check_baseline, evidence, least, result
from .curve import grid
from .plan import AUTO, Plan, listed
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
    learning_rates: tuple[Any, Any] | None = None,
    trials: int | None = None,
    minutes: float | None = None,
    sweep: bool = False,
    out: str | os.PathLike | None = None,
    overwrite: bool = False,
    settings: dict[str, Any] | None = None,
    engine: Engine | None = None,
) -> Result:
    """The least d at which training in a random subspace reaches a share of full fine-tuning.

    With a share of 0.9 it is d90 (Li et al. 2018, section 2; of language models Aghajanyan et al. 2020, section 3). The
    grid is scanned from below, then trials go where the interval is widest: around the crossing, or to full
    fine-tuning. The curve is fitted monotonically, and a bootstrap tells how sure the crossing is.

    Args:
        fit: `fit(d, seed) -> score`, higher is better; `fit(None, seed)` is full fine-tuning. With `learning_rates` it
            gets the rate as a third argument. The seed sets P and the order of the data. It may return a mapping with
            a `score`; of a share of correct predictions, `correct` says which they are (`[examples]` of bools), and the
            interval includes the sampling of the examples. What else it holds is kept with the trial.
        dims: the grid, ascending; by default `grid()`, that of Table 1 of Aghajanyan et al.
        target: the share to reach.
        relative_to: `"score"`: the baseline's score (as in the papers). `"gain"`: its gain over `majority`, or without
            one over `fit(0, 0)`, the model before training.
        center: what stands for the seeds of one d: `"median"` of the runs that did not collapse (a run does that is no
            better than the trivial answer, or diverges), or `"mean"` of all.
        majority: the score of always answering the most frequent class.
        baseline: scores of full fine-tuning, where known; by default `fit(None, seed)` for each seed.
        seeds: how many for each d.
        baseline_seeds: how many for full fine-tuning; by default three, and more where they narrow the interval most.
        learning_rates: to try, (full fine-tuning, subspace), as many for the one as for the other, or `"auto"` for
            both. They are tried on a seed that counts for nothing else, the subspace's at every d of the first scan.
        trials: budget of all trials, 60 unless told; a sweep has none.
        minutes: of this call, after which nothing is begun.
        sweep: measure the whole grid.
        out: folder of the run. Finished trials are kept there, and the same call goes on where it stopped. Any other
            grid, target, number of seeds or budget uses the trials that are there.
        overwrite: discard the stored trials of a folder that is in use.
        settings: what the trials depend on; kept with the run, and compared when it goes on.
        engine: what runs the trials; by default this process, one after another.

    Raises:
        NothingToMeasure: a ValueError: the baseline is no better than the majority class, or the untrained model.
        ValueError: an option cannot work, a score is not a number, or the folder belongs to a run with other settings.
    """
    known = baseline if baseline is None or isinstance(baseline, Sequence) else [baseline]
    plan = Plan(
        dims=tuple(grid() if dims is None else map(index, dims)),
        baseline=None if known is None else tuple(map(float, known)),
        learning_rates=listed(learning_rates),
        target=target,
        relative_to=relative_to,
        center=center,
        majority=majority,
        seeds=seeds,
        baseline_seeds=baseline_seeds,
        trials=trials,
        minutes=minutes,
        sweep=sweep,
    )
    return measured(fit, plan, out=out, overwrite=overwrite, settings=settings, engine=engine)


def measured(
    fit: Fit,
    plan: Plan,
    *,
    out: str | os.PathLike | None,
    overwrite: bool,
    settings: dict[str, Any] | None,
    engine: Engine | None,
    known: Sequence[Mapping[str, Any]] = (),
) -> Result:
    """See `measure_intrinsic_dimension`; `known` are rows of full fine-tuning from a run where it is the same."""
    start = time.monotonic()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory()) if out is None else out
        store = stack.enter_context(Store(folder, settings or {}, overwrite, TRIAL))
        before = len(store.rows)
        for row in known:
            trial = {name: row[name] for name in TRIAL}
            if store.key(trial) not in store.rows:
                store.add(trial, {name: value for name, value in row.items() if name not in TRIAL})
        earlier = evidence(dict(islice(store.rows.items(), _asked_before(store, plan, len(store.rows) > before))), plan)
        # Smoothing would take what is known for trials that took no time.
        bar = tqdm(desc="trials", unit="trial", leave=False, smoothing=0, initial=len(earlier.found))
        stack.enter_context(bar)
        engine = engine or InProcess()
        stack.callback(engine.close)
        runner = Runner(fit, store, engine, bar)
        runner.right |= earlier.right

        def progress(doing: str, left: int) -> None:
            bar.total = bar.n + left
            bar.set_postfix_str(doing)

        search = Search(
            runner.run,
            plan,
            dict(earlier.found),
            least=least(store.rows, plan),
            right=runner.right,
            slots=engine.slots,
            progress=progress,
            start=start,
        )

        def begun() -> None:
            if plan.relative_to == "gain" and plan.majority is None:
                rates = plan.learning_rates and plan.learning_rates[1]
                rates = AUTO[1] if rates == "auto" else rates
                runner.finite([(0, 0, float(rates[0]) if rates else None)])  # at any rate: nothing is trained
                search.evidence.least = least(store.rows, plan)
            check_baseline(search.evidence)

        return result(store, plan, search.run(begun))


def _asked_before(store: Store, plan: Plan, more: bool) -> int:
    """How many of the rows are not of this question, which is noted. Asked again, and unless there are `more`, it has
    as many as at first: so it goes on as if it had not been stopped."""
    path, asked = Path(store.folder, PLAN), json.loads(json.dumps(plan.to_dict()))
    before: dict[str, Any] = {}
    with suppress(FileNotFoundError, ValueError):  # of a damaged one no more is lost
        before = renamed(read_json(path, ""))
    rows = before.pop("rows", 0)
    if more or before != asked:
        rows = len(store.rows)
    write_whole(path, json.dumps({**asked, "rows": rows}, indent=1))
    return rows
