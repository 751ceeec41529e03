"""From stored trials to d90: `Result`, and `analyze` for the folder of a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..trials.engine import get_versions
from ..trials.store import PLAN, TRIAL, Store, read_json
from .evidence import Evidence
from .plan import Plan


class NothingToMeasure(ValueError):
    """Full fine-tuning is no better than the majority-class baseline, or than the untrained model."""


class TooFewTrials(ValueError):
    """The budget was spent before full fine-tuning or any d was measured."""


@dataclass(frozen=True)
class Answer:
    """d90 by one definition of the target.

    Args:
        d: Least d whose fitted score reaches the target; None if no measured d does. The least measured d means that
            or less.
        interval: 90 % interval of d (with one seed, only the bracket). An end beyond the measured d is None.
        tie: The d between which the fit is within one held-out example of the target; None if that is a single d, or
            the number of examples is unknown.
        target: Score to reach.
    """

    d: int | None
    interval: tuple[int | None, int | None]
    tie: tuple[int | None, int | None] | None
    target: float


@dataclass(frozen=True)
class Point:
    """One measured d.

    Args:
        d: Number of trainable parameters.
        fit: Score of the monotone fit; None beyond the peak of scores that fall again.
        scores: Scores of the runs that count, one per seed.
        seeds: Number of runs, including those that collapsed.
        collapsed: Number of runs that diverged, or were no better than the majority-class baseline.
        learning_rate: Learning rate of the runs; None if the fit has its own.
    """

    d: int
    fit: float | None
    scores: list[float]
    seeds: int
    collapsed: int
    learning_rate: float | None


@dataclass(frozen=True)
class Baseline:
    """Full fine-tuning.

    Args:
        level: Aggregate of its scores over seeds.
        scores: Scores of the runs that count, one per seed.
        collapsed: Number of runs that collapsed.
        learning_rate: Learning rate of the runs; None if the fit has its own.
    """

    level: float
    scores: list[float]
    collapsed: int
    learning_rate: float | None


@dataclass(frozen=True)
class Result:
    """Result of a measurement, as `measure_intrinsic_dimension` and `analyze` return it.

    Args:
        answers: Answers by definition of the target, "score" and "gain". One without meaning is missing.
        relative_to: Definition of the target that was requested.
        share: Fraction of full fine-tuning to reach.
        center: Aggregate over seeds: "median" of the runs that did not collapse, or "mean" of all.
        baseline: Full fine-tuning.
        majority: Score of the majority-class baseline, where known.
        untrained: Score before training, where it replaces that.
        edges: The d (None is full fine-tuning) whose best learning rate is the lowest or highest that was tried.
        points: Every measured d.
        examples: Number of held-out examples, where known.
        stopped: Why the search ended.
        trials: All rows: d (None is full fine-tuning), seed, learning rate, score, seconds, process, versions.
        settings: Settings that the trials depend on.
        ends: Least d of the grid that is not below all measured d, and the greatest measured d.
        dims: Grid: least d, greatest d, number of d.
        versions: Versions of the process that made this result.

    Example:
        ```python
        result = analyze("runs/mine")
        print(result.name, result.d, result.interval)  # d90 512 (403, 645)
        ```
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
    versions: dict[str, str] = field(default_factory=get_versions)

    @property
    def answer(self) -> Answer:
        """Answer by the definition of the target that was requested."""
        return self.answers[self.relative_to]

    @property
    def d(self) -> int | None:
        """See `Answer`."""
        return self.answer.d

    @property
    def interval(self) -> tuple[int | None, int | None]:
        """See `Answer`."""
        return self.answer.interval

    @property
    def target(self) -> float:
        """See `Answer`."""
        return self.answer.target

    @property
    def floor(self) -> float | None:
        """Score of the majority-class baseline, or else of the untrained model; None where unknown."""
        return self.untrained if self.majority is None else self.majority

    @property
    def name(self) -> str:
        """`d90` for a fraction of 0.9."""
        return f"d{100 * self.share:g}"

    @property
    def seeds(self) -> int:
        """Greatest number of seeds of any d."""
        return max(point.seeds for point in self.points)

    def to_dict(self) -> dict[str, Any]:
        """Convert to a mapping for JSON."""
        return asdict(self)


def check_baseline(evidence: Evidence) -> None:
    """Check whether there is something to measure.

    Raises:
        NothingToMeasure: Full fine-tuning is no better than the majority-class baseline, or has a negative score.
    """
    plan, floor = evidence.plan, evidence.floor
    score = evidence.build_curve().aggregate(evidence.get_runs(None))
    if floor is not None and score <= floor + 1e-9:
        what = "the majority class" if plan.majority is not None else "the untrained model"
        raise NothingToMeasure(
            f"Full fine-tuning scores {score:.4f}, no better than {what} ({floor:.4f}): there is nothing to measure. "
            "Train longer, or try other learning rates (measure --full-learning-rates)."
        )
    if plan.relative_to == "score" and score <= 0:
        raise NothingToMeasure(
            f"Full fine-tuning scores {score:.4f}: a fraction of a negative score is no target. Use "
            "relative_to='gain' (--relative-to gain)."
        )


def build_result(store: Store, plan: Plan, stopped: str) -> Result:
    """Build the result of the stored trials.

    Raises:
        NothingToMeasure: See `check_baseline`.
        TooFewTrials: Full fine-tuning or no d of the grid was measured.
        ValueError: The target needs a majority-class baseline that is unknown.
    """
    evidence = Evidence(plan, store.rows)
    if plan.baseline is None and not evidence.get_seeds(None):
        raise TooFewTrials(
            f"{stopped} before full fine-tuning was measured. Measure with more (measure --trials, --minutes)."
        )
    if plan.relative_to == "gain" and evidence.floor is None:
        raise ValueError(
            "relative_to='gain' needs the score of the majority-class baseline, which is unknown here. Pass majority=."
        )
    check_baseline(evidence)
    curve = evidence.build_curve()
    if not curve.points:
        raise TooFewTrials(
            f"{stopped} before a d from {plan.dims[0]} to {plan.dims[-1]} was measured. Measure with more trials or "
            "minutes (measure --trials, --minutes), or name the dims (--dims) that were measured."
        )
    examples = next((row["examples"] for row in store.rows.values() if row.get("examples")), None)
    runs = evidence.get_runs(None)
    baseline = Baseline(curve.aggregate(runs), list(runs.scores), runs.collapsed, evidence.get_rate(None))
    named = {"score": baseline.level > 0, "gain": evidence.floor is not None}
    dims, fit, _ = curve.fit()
    fitted = dict(zip(dims, map(float, fit), strict=True))
    points = [
        Point(d, fitted.get(d), list(at.scores), len(evidence.get_seeds(d)), at.collapsed, evidence.get_rate(d))
        for d, at in curve.points.items()
    ]
    return Result(
        answers={name: _build_answer(evidence, name, examples) for name, has_meaning in named.items() if has_meaning},
        relative_to=plan.relative_to,
        share=plan.target,
        center=plan.center,
        baseline=baseline,
        majority=plan.majority,
        untrained=None if plan.majority is not None else evidence.floor,
        edges=[d for d in (None, *plan.dims) if evidence.is_at_edge(d)],
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


def _build_answer(evidence: Evidence, relative_to: Any, examples: int | None) -> Answer:
    curve = evidence.build_curve(relative_to)
    greatest = int(np.searchsorted(curve.grid, curve.dims[-1]))  # larger d are unknown
    dims = [d if i <= greatest else None for i, d in enumerate([*curve.grid, None])]
    low, high = curve.estimate_interval()
    tie = None
    if examples:
        first, last = curve.find_tie(1 / examples)
        low, high = min(low, first), max(high, last)
        tie = (dims[first], dims[last]) if first != last else None
    return Answer(dims[curve.find_index()], (dims[low], dims[high]), tie, curve.target)


def analyze(
    folder: str | os.PathLike,
    dims: Sequence[int] | None = None,
    target: float | None = None,
    relative_to: Literal["score", "gain"] | None = None,
    center: Literal["median", "mean"] | None = None,
    majority: float | None = None,
) -> Result:
    """Re-analyze the stored trials of a run without training.

    Args:
        folder: Folder of the run, which may be interrupted.
        dims, target, relative_to, center, majority: See `measure_intrinsic_dimension`; None is what the run has. The
            fit of other dims uses all measured d between their least and greatest.

    Raises:
        ValueError: The folder is not that of a run, is damaged, or an option cannot work.
        RuntimeError: The run has not ended.

    Example:
        ```python
        analyze("runs/mine", target=0.95).d  # d95 of the same trials
        ```
    """
    with Store(folder, None, names=TRIAL) as store:
        path = Path(folder, PLAN)
        if not path.exists():
            raise ValueError(f"{folder} has no {PLAN}: it is not the folder of a measurement.")
        plan = Plan.from_dict(read_json(path, "so its plan is unknown"))
        changes = {"dims": dims, "target": target, "relative_to": relative_to, "center": center, "majority": majority}
        changed: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
        return build_result(store, replace(plan, **changed), "the trials were analyzed")
