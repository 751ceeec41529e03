"""Runs the trials that are not in the store yet."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from numbers import Real
from typing import Any

import numpy as np

from .engine import Engine, Trial
from .store import TRIAL, Store

Fit = Callable[..., float | Mapping[str, Any]]
"""`fit(d, seed)`, or `fit(d, seed, learning_rate)`: trains once, returns the score, or a mapping with a `score` that is
stored whole. `d=None` is full fine-tuning. Where the score is a share of correct predictions, `correct` in the mapping
says which they are, `[examples]` of bools: the interval then includes what other examples would change."""

OWN = {"key", "sum", *TRIAL, "examples", "right", "seconds", "process", "versions"}
"""What each row has beside what the fit returned."""


def unpacked(row: Mapping[str, Any]) -> np.ndarray | None:
    """Which held-out examples a run has right, `[examples]`; None where it is not known."""
    if row.get("right") is None:
        return None
    return np.unpackbits(np.frombuffer(base64.b64decode(row["right"]), dtype=np.uint8), count=row["examples"])


class Runner:
    """Trials of one fit, kept in one store; the bar counts them. `right` has what `unpacked` gives of those asked."""

    def __init__(self, fit: Fit, store: Store, engine: Engine, bar: Any) -> None:
        self.fit, self.store, self.engine, self.bar = fit, store, engine, bar
        self.right: dict[Trial, np.ndarray] = {}

    def finite(self, trials: Sequence[Trial]) -> list[float]:
        """The score of each trial.

        Raises:
            ValueError: one is not a finite number.
        """
        scores = self.run(trials)
        for (d, seed, rate), score in zip(trials, scores, strict=True):
            if not math.isfinite(score):
                raise ValueError(f"fit returned no finite score for d={d}, seed={seed}, learning rate {rate}.")
        return scores

    def run(self, trials: Sequence[Trial]) -> list[float]:
        """The score of each trial, NaN where it is not a finite number."""
        configurations = [dict(zip(TRIAL, trial, strict=True)) for trial in trials]
        keys = [self.store.key(configuration) for configuration in configurations]
        new = [place for place, name in enumerate(keys) if name not in self.store.rows]
        if not self.bar.disable:  # what is known tells nothing of the time that a trial takes
            self.bar.initial += len(trials) - len(new)
        self.bar.update(len(trials) - len(new))
        for place, found, facts in self.engine.run(self.fit, [trials[place] for place in new]):
            configuration = configurations[new[place]]
            self.store.add(configuration, {**_row(found, configuration), **facts})
            self.bar.update()
        for trial, name in zip(trials, keys, strict=True):
            if (right := unpacked(self.store.rows[name])) is not None:
                self.right[trial] = right
        scores = [self.store.rows[name]["score"] for name in keys]
        return [math.nan if score is None else score for score in scores]


def _row(found: Any, configuration: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of what a fit returned; None stands for a number that is not finite, as JSON has none."""
    trial = ", ".join(f"{name}={value}" for name, value in configuration.items())
    row = dict(found) if isinstance(found, Mapping) else {"score": found}
    if taken := sorted(OWN & row.keys()):
        raise ValueError(f"fit returned {', '.join(taken)} for {trial}, which every row has of its own. Rename it.")
    right = row.pop("correct", None)
    row = {name: _plain(value) for name, value in row.items()}
    score = row.get("score")
    row["score"] = float(score) if isinstance(score, int) else score
    if not isinstance(row["score"], float):
        raise ValueError(f"fit returned {found!r} for {trial}: neither a number, nor a mapping with one as its score.")
    for name, value in row.items():
        try:
            json.dumps(value)
        except TypeError:
            raise ValueError(
                f"fit returned {name}={value!r} for {trial}: numbers, texts, lists and mappings can be kept."
            ) from None
    numbers = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
    if right is None or numbers["score"] is None:
        return numbers
    return {**numbers, **_packed(np.asarray(right), row["score"], trial)}


def _packed(right: np.ndarray, score: float, trial: str) -> dict[str, Any]:
    """Which examples a run has right: a bit for each."""
    if right.ndim != 1 or not np.isin(right, (0, 1)).all() or not len(right) * abs(right.mean() - score) < 0.5:
        raise ValueError(
            f"fit returned correct={right} for {trial}, with the score {score}: it must hold a bool for each held-out "
            "example, and the score be the share that is right. Leave it out for other scores."
        )
    return {"examples": len(right), "right": base64.b64encode(np.packbits(right.astype(bool)).tobytes()).decode()}


def _plain(value: Any) -> Any:
    with suppress(AttributeError, ValueError, RuntimeError):  # a tensor's or an array's only number
        value = value.item()
    return float(value) if isinstance(value, Real) and not isinstance(value, int) else value
