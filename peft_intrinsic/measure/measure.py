"""`measure_intrinsic_dimension`: from a function that trains once to d90 with an interval."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tqdm.auto import tqdm

from .curve import Curve, grid
from .engine import Engine, InProcess
from .runner import FULL, Fit, Runner
from .search import Search
from .store import Store
from .versions import versions


class NothingToMeasure(ValueError):
    """Full fine-tuning is no better than the trivial answer."""


@dataclass(frozen=True)
class Result:
    """What a measurement found.

    Args:
        d: the least d whose fitted score reaches the target, None where the largest does not.
        interval: of d, 90 % (with one seed, merely the bracket); an end that lies beyond the grid is None.
        target: the score to reach.
        share, of: how the target was made.
        baseline: scores of full fine-tuning, one per seed.
        majority: score of always answering the most frequent class, where known.
        untrained: score before training, where the target is a share of the gain over it.
        learning_rates: those chosen, (full fine-tuning, subspace), where there was a choice.
        points: (d, fitted score, scores) at every measured d.
        stopped: why the search ended.
        trials: all that were run: d (None is full fine-tuning), seed, learning rate, score.
        settings: what the trials depend on.
        versions: of the process that made this result; trials that it found in its folder may be of others.
    """

    d: int | None
    interval: tuple[int | None, int | None]
    target: float
    share: float
    of: str
    baseline: list[float]
    majority: float | None
    untrained: float | None
    learning_rates: tuple[float | None, float] | None
    points: list[tuple[int, float, list[float]]]
    stopped: str
    trials: list[dict[str, Any]]
    settings: dict[str, Any]
    versions: dict[str, str] = field(default_factory=versions)

    @property
    def name(self) -> str:
        """`d90` for a share of 0.9."""
        return f"d{round(100 * self.share)}"

    @property
    def seeds(self) -> int:
        """Of each d."""
        return max(len(scores) for _, _, scores in self.points)

    @property
    def diverged(self) -> int:
        """Trials of the search that ended without a finite score; they count as the trivial answer."""
        rate = self.learning_rates and self.learning_rates[1]
        return sum(
            row["score"] is None and row["d"] is not None and row["learning_rate"] == rate for row in self.trials
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure_intrinsic_dimension(
    fit: Fit,
    dims: Sequence[int] | None = None,
    *,
    target: float = 0.9,
    of: Literal["score", "gain"] = "score",
    majority: float | None = None,
    baseline: float | Sequence[float] | None = None,
    seeds: int = 3,
    learning_rates: tuple[Sequence[float], Sequence[float]] | None = None,
    trials: int | None = None,
    minutes: float | None = None,
    sweep: bool = False,
    out: str | os.PathLike | None = None,
    fresh: bool = False,
    settings: dict[str, Any] | None = None,
    engine: Engine | None = None,
) -> Result:
    """The least d at which training in a random subspace reaches a share of full fine-tuning.

    With a share of 0.9 it is d90 (Li et al. 2018, section 2; of language models Aghajanyan et al. 2020, section 3). The
    grid is bisected rather than swept, each d has several seeds, the curve is fitted monotonically, and a bootstrap
    tells how sure the crossing is.

    Args:
        fit: `fit(d, seed) -> score`, higher is better; `fit(None, seed)` is full fine-tuning. With `learning_rates` it
            gets the rate as a third argument. The seed sets P and the order of the data.
        dims: the grid, ascending; by default `grid()`, that of Table 1 of Aghajanyan et al.
        target: the share to reach.
        of: `"score"`: of the baseline's score (as in the papers). `"gain"`: of its gain over `majority`, or without one
            over `fit(0, 0)`, the model before training.
        majority: the score of always answering the most frequent class.
        baseline: scores of full fine-tuning, where known; by default `fit(None, seed)` for each seed.
        seeds: how many for each d and for the baseline.
        learning_rates: to try, (full fine-tuning, subspace), as many for the one as for the other. Each is tried once,
            the subspace's at the middle of the grid, and the best is kept.
        trials: budget of the search, learning rates and full fine-tuning not counted; None is no limit.
        minutes: of this call, after which no d is begun.
        sweep: measure the whole grid.
        out: folder of the run. Finished trials are kept there, and the same call goes on where it stopped.
        fresh: begin anew in a folder that is in use.
        settings: what else the trials depend on; kept with the run, and compared when it goes on.
        engine: what runs the trials; by default this process, one after another.

    Raises:
        NothingToMeasure: a ValueError: the baseline is no better than the majority class, or the untrained model.
        ValueError: an option cannot work, a score is not a finite number, or the folder belongs to a run with other
            settings.
    """
    start = time.monotonic()
    dims = list(grid() if dims is None else dims)
    _check(dims, target, of, seeds, learning_rates, trials)
    common = {"dims": dims, "target": target, "of": of, "majority": majority, "seeds": seeds, **(settings or {})}
    common["learning_rates"] = learning_rates
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory()) if out is None else out
        store = stack.enter_context(Store(folder, common, fresh))
        bar = stack.enter_context(tqdm(desc="trials", unit="trial", leave=False))
        engine = engine or InProcess()
        stack.callback(engine.close)
        runner = Runner(fit, store, engine, bar)
        bar.set_postfix_str("full fine-tuning")
        rate = None
        if baseline is None:
            rate = runner.best_rate(FULL, learning_rates[0]) if learning_rates else None
            known = runner.scores([(FULL, seed) for seed in range(seeds)], rate)
        else:
            known = [float(value) for value in (baseline if isinstance(baseline, Sequence) else [baseline])]
        untrained = None
        if of == "gain" and majority is None:
            untrained = runner.scores([(0, 0)], learning_rates and learning_rates[1][0])[0]
        least, what = (majority, "the majority class") if untrained is None else (untrained, "the untrained model")
        if least is not None and sum(known) / len(known) <= least + 1e-9:
            raise NothingToMeasure(
                f"Full fine-tuning scores {sum(known) / len(known):.4f}, no better than {what} ({least:.4f}): there is "
                "nothing to measure. Train longer, or try other learning rates."
            )
        if of == "score" and sum(known) <= 0:
            raise NothingToMeasure(
                f"Full fine-tuning scores {sum(known) / len(known):.4f}: a share of a negative score means nothing. "
                "Use of='gain' (--of gain)."
            )
        floor = float(least or 0.0) if of == "gain" else 0.0
        rates = None
        if learning_rates:
            bar.set_postfix_str("learning rates")
            rates = rate, runner.best_rate(dims[len(dims) // 2], learning_rates[1])

        def progress(low: int, high: int, left: int) -> None:
            bar.total = bar.n + left
            bar.set_postfix_str(f"{low} ≤ d ≤ {high}")

        search = Search(
            lambda wanted: runner.scores(wanted, rates and rates[1], float(least or 0.0)),
            *(dims, known, target, floor, range(seeds), trials, minutes, progress),
            at_once=runner.engine.slots // seeds,
            start=start,
        )
        stopped = search.run(sweep)
    return _result(search.curve, stopped, of, majority, untrained, rates, store)


def _check(dims: Sequence[int], target: float, of: str, seeds: int, learning_rates: Any, trials: int | None) -> None:
    if len(dims) < 2 or any(not isinstance(d, int) or d < 1 for d in dims) or sorted(set(dims)) != list(dims):
        raise ValueError(f"dims must be ascending positive integers, at least two, got {list(dims)[:5]}…")
    if not 0 < target <= 1:
        raise ValueError(f"target must lie in (0, 1], got {target}. 0.9 gives d90.")
    if of not in ("score", "gain"):
        raise ValueError(f"of must be 'score' or 'gain', got {of!r}.")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}.")
    if trials is not None and trials < seeds:
        raise ValueError(f"trials={trials} does not allow a single d with seeds={seeds}. Allow more.")
    if learning_rates is not None and len({len(rates) for rates in learning_rates}) != 1:
        raise ValueError(
            f"learning_rates must hold as many for full fine-tuning as for the subspace, got {learning_rates}: "
            "otherwise one of the two is tuned better than the other."
        )


def _result(
    curve: Curve,
    stopped: str,
    of: str,
    majority: float | None,
    untrained: float | None,
    rates: tuple[float | None, float] | None,
    store: Store,
) -> Result:
    if not curve.scores:
        raise ValueError(f"{stopped} before a single dimension was measured. Allow more.")
    places = [*curve.grid, None]
    low, high = curve.interval()
    return Result(
        d=places[curve.index()],
        interval=(places[low], places[high]),
        target=curve.target,
        share=curve.share,
        of=of,
        baseline=list(curve.baseline),
        majority=majority,
        untrained=untrained,
        learning_rates=rates,
        points=[(d, float(fit), list(curve.scores[d])) for d, fit in zip(curve.dims, curve.fit(), strict=True)],
        stopped=stopped,
        trials=sorted(
            ({name: row[name] for name in row if name not in ("key", "seconds")} for row in store.rows.values()),
            key=lambda row: (row["d"] is not None, row["d"] or 0, row["learning_rate"] or 0.0, row["seed"]),
        ),
        settings=store.settings,
    )
