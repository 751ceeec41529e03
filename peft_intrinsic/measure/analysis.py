"""From trials to d90: `Result`, and `analyze` for a folder of trials that are there already."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import index
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..trials.engine import Trial
from ..trials.runner import unpacked
from ..trials.store import PLAN, TRIAL, Store, read_json
from ..trials.versions import versions
from .evidence import Evidence
from .plan import Plan


class NothingToMeasure(ValueError):
    """Full fine-tuning is no better than the trivial answer."""


@dataclass(frozen=True)
class Answer:
    """d90 by one definition of the target.

    Args:
        d: the least d whose fitted score reaches the target, None where none that was measured does. The least that was
            measured means that or less.
        interval: of d, 90 % (with one seed, merely the bracket); an end that lies beyond what was measured is None.
        tie: the d between which the fit is within one held-out example of the target; None where that is a single one,
            or the number of examples is unknown.
        target: the score to reach.
    """

    d: int | None
    interval: tuple[int | None, int | None]
    tie: tuple[int | None, int | None] | None
    target: float


@dataclass(frozen=True)
class Point:
    """One measured d.

    Args:
        d: how many numbers.
        fit: the monotone fit; None beyond the peak of scores that fall again.
        scores: of the runs that count, one per seed.
        seeds: runs, those that collapsed among them.
        collapsed: runs that were no better than the trivial answer, or diverged.
        learning_rate: of all of them, where there was a choice.
    """

    d: int
    fit: float | None
    scores: list[float]
    seeds: int
    collapsed: int
    learning_rate: float | None


@dataclass(frozen=True)
class Result:
    """What a measurement found.

    Args:
        answers: by definition of the target, "score" and "gain"; one that means nothing is missing.
        relative_to: the definition of the target that was asked for.
        share: of full fine-tuning.
        center: of the seeds: "median" of those that did not collapse, or "mean" of all.
        baseline: full fine-tuning; its `d` is None.
        majority: score of always answering the most frequent class, where known.
        untrained: score before training, where it stands for that.
        edges: d (None is full fine-tuning) whose best learning rate is the lowest or the highest that was tried there.
        points: every measured d.
        examples: held-out ones, where known.
        stopped: why the search ended.
        trials: all rows: d (None is full fine-tuning), seed, learning rate, score, seconds, process, versions.
        settings: what the trials depend on.
        ends: the d of the grid below which nothing was measured, and the greatest that was measured.
        dims: the grid: lowest, highest, points.
        versions: of the process that made this result.
    """

    answers: dict[str, Answer]
    relative_to: str
    share: float
    center: str
    baseline: Baseline
    majority: float | None
    untrained: float | None
    edges: list[int | None]
    points: list[Point]
    examples: int | None
    stopped: str
    trials: list[dict[str, Any]]
    settings: dict[str, Any]
    ends: tuple[int, int]
    dims: tuple[int, int, int]
    versions: dict[str, str] = field(default_factory=versions)

    @property
    def d(self) -> int | None:
        """See `Answer`."""
        return self.answers[self.relative_to].d

    @property
    def interval(self) -> tuple[int | None, int | None]:
        """See `Answer`."""
        return self.answers[self.relative_to].interval

    @property
    def target(self) -> float:
        """See `Answer`."""
        return self.answers[self.relative_to].target

    @property
    def least(self) -> float | None:
        """Score of the trivial answer, where known."""
        return self.untrained if self.majority is None else self.majority

    @property
    def name(self) -> str:
        """`d90` for a share of 0.9."""
        return f"d{100 * self.share:g}"

    @property
    def seeds(self) -> int:
        """The most of any d."""
        return max(point.seeds for point in self.points)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Baseline:
    """Full fine-tuning.

    Args:
        level: what stands for its seeds.
        scores: of the runs that count, one per seed.
        collapsed: runs that do not.
        learning_rate: of all of them, where there was a choice.
    """

    level: float
    scores: list[float]
    collapsed: int
    learning_rate: float | None


def evidence(rows: Mapping[str, Mapping[str, Any]], plan: Plan) -> Evidence:
    """Rows of a store in the light of a plan."""
    found: dict[Trial, float] = {}
    right: dict[Trial, np.ndarray] = {}
    for row in rows.values():
        trial = (row["d"], row["seed"], row["learning_rate"])
        if not plan.asks(row["d"], row["learning_rate"]):
            continue
        found[trial] = math.nan if row["score"] is None else row["score"]
        if (known := unpacked(row)) is not None:
            right[trial] = known
    return Evidence(found, plan, least(rows, plan), right)


def least(rows: Mapping[str, Mapping[str, Any]], plan: Plan) -> float | None:
    """Score of the trivial answer: the majority class, or the untrained model where that was scored."""
    untrained = [row["score"] for row in rows.values() if row["d"] == 0]
    return plan.majority if plan.majority is not None or not untrained else untrained[0]


def check_baseline(found: Evidence) -> None:
    """Whether there is something to measure.

    Raises:
        NothingToMeasure: full fine-tuning is no better than the trivial answer, or has a negative score.
    """
    runs, plan = found.runs(None), found.plan
    level = found.curve().level(runs)
    if found.least is not None and level <= found.least + 1e-9:
        what = "the majority class" if plan.majority is not None else "the untrained model"
        raise NothingToMeasure(
            f"Full fine-tuning scores {level:.4f}, no better than {what} ({found.least:.4f}): there is nothing to "
            "measure. Train longer, or try other learning rates (--full-learning-rates)."
        )
    if plan.relative_to == "score" and level <= 0:
        raise NothingToMeasure(
            f"Full fine-tuning scores {level:.4f}: a share of a negative score means nothing. Use "
            "relative_to='gain' (--relative-to gain)."
        )


def result(store: Store, plan: Plan, stopped: str) -> Result:
    """What the trials of a run say.

    Raises:
        NothingToMeasure: see `check_baseline`.
        ValueError: no dimension of the grid was measured.
    """
    found = evidence(store.rows, plan)
    if plan.baseline is None and not found.seeds(None):
        raise ValueError(f"{stopped} before full fine-tuning was measured. Allow more (--trials, --minutes).")
    if plan.relative_to == "gain" and found.least is None:
        raise ValueError(
            "relative_to='gain' needs the trivial answer's score, which these trials lack. Pass majority=."
        )
    check_baseline(found)
    curve = found.curve()
    if not curve.points:
        raise ValueError(
            f"{stopped} before a single dimension was measured from {plan.dims[0]} to {plan.dims[-1]}. Allow more "
            "trials or minutes (--trials, --minutes), or ask for the dims (--dims) that were measured."
        )
    examples = next((row["examples"] for row in store.rows.values() if row.get("examples")), None)
    base = found.runs(None)
    answers = {}
    if curve.level(base) > 0:
        answers["score"] = _answer(found, "score", examples)
    if found.least is not None or plan.relative_to == "gain":
        answers["gain"] = _answer(found, "gain", examples)
    dims, fit, _ = curve.fit()
    fitted = dict(zip(dims, map(float, fit), strict=True))
    points = [
        Point(d, fitted.get(d), list(runs.scores), len(found.seeds(d)), runs.collapsed, found.rate(d))
        for d, runs in curve.points.items()
    ]
    untrained = None if plan.majority is not None else found.least
    return Result(
        answers=answers,
        relative_to=plan.relative_to,
        share=plan.target,
        center=plan.center,
        baseline=Baseline(curve.level(base), list(base.scores), base.collapsed, found.rate(None)),
        majority=plan.majority,
        untrained=untrained,
        edges=[d for d in (None, *plan.dims) if found.at_edge(d)],
        points=points,
        examples=examples,
        stopped=stopped,
        trials=sorted(
            ({name: row[name] for name in row if name != "key"} for row in store.rows.values()),
            key=lambda row: (row["d"] is not None, row["d"] or 0, row["learning_rate"] or 0.0, row["seed"]),
        ),
        settings=store.settings,
        ends=(next(d for d in plan.dims if d >= points[0].d), points[-1].d),
        dims=(plan.dims[0], plan.dims[-1], len(plan.dims)),
    )


def _answer(found: Evidence, relative_to: Any, examples: int | None) -> Answer:
    curve = found.curve(relative_to)
    most = int(np.searchsorted(curve.grid, curve.dims[-1]))  # nothing is known beyond
    places = [d if i <= most else None for i, d in enumerate([*curve.grid, None])]
    low, high = curve.interval()
    tie = None
    if examples:
        first, last = curve.tie(1 / examples)
        low, high = min(low, first), max(high, last)
        tie = (places[first], places[last]) if first != last else None
    return Answer(places[curve.index()], (places[low], places[high]), tie, curve.target)


def analyze(
    folder: str | os.PathLike,
    dims: Sequence[int] | None = None,
    target: float | None = None,
    relative_to: Literal["score", "gain"] | None = None,
    center: Literal["median", "mean"] | None = None,
    majority: float | None = None,
) -> Result:
    """Ask the trials of a finished, or interrupted, run something else. Nothing is trained.

    Args:
        folder: of the run.
        dims, target, relative_to, center, majority: see `measure_intrinsic_dimension`; None is what the run asked. Of
            other dims, those that were measured between the least and the greatest are what the fit has.

    Raises:
        ValueError: the folder is not a run's, is damaged, or an option cannot work.
        RuntimeError: the run is still going on.
    """
    with Store(folder, None, names=TRIAL) as store:
        path = Path(folder, PLAN)
        if not path.exists():
            raise ValueError(f"{folder} has no {PLAN}: it is not the folder of a measurement.")
        plan = Plan.from_dict(read_json(path, "so it is not known what was asked"))
        asked: dict[str, Any] = {"target": target, "relative_to": relative_to, "center": center, "majority": majority}
        asked["dims"] = None if dims is None else tuple(map(index, dims))
        changes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        return result(store, replace(plan, **changes), "the trials were analyzed")
