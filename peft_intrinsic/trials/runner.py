"""Runs the trials that a store lacks."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from numbers import Real
from typing import Any

import numpy as np

from .engine import Engine, Trial
from .store import TRIAL, Store

Fit = Callable[..., float | Mapping[str, Any]]
"""`fit(d, seed)`, or `fit(d, seed, learning_rate)`: trains once, and returns the score, or a mapping with a `score`,
which is stored whole. `d=None` is full fine-tuning. If the score is an accuracy, `correct` in the mapping says which
predictions are correct, `[examples]` of bools. The interval then includes the sampling of the examples."""

Row = Mapping[str, Any]
"""A stored trial: d, seed, learning_rate, score (None if not finite), right and examples where known, and others."""

OWN = {"key", "sum", *TRIAL, "examples", "right", "seconds", "process", "versions"}
"""Names in a row that a fit may not use."""


def unpack_correct(row: Row) -> np.ndarray | None:
    """Unpack which predictions of a trial are correct, `[examples]` of 0 and 1; None where unknown."""
    return None if row.get("right") is None else _unpack(row["right"], row["examples"])


@lru_cache(maxsize=1024)
def _unpack(right: str, examples: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(base64.b64decode(right), dtype=np.uint8), count=examples)


class Runner:
    """Runs the trials of a fit on an engine, stores their rows, and counts them in tqdm's progress bar."""

    def __init__(self, fit: Fit, store: Store, engine: Engine, progress: Any) -> None:
        self.fit, self.store, self.engine, self.progress = fit, store, engine, progress

    def run(self, trials: Sequence[Trial], finite: bool = False) -> Sequence[Row]:
        """Run trials, except those that the store has. Returns their rows.

        Raises:
            ValueError: The fit returned no score, or something that a row cannot store. With `finite` also, a score is
                not finite.
        """
        configurations = [dict(zip(TRIAL, trial, strict=True)) for trial in trials]
        keys = [self.store.key(configuration) for configuration in configurations]
        new = [i for i, key in enumerate(keys) if key not in self.store.rows]
        if not self.progress.disable:  # stored trials took no time
            self.progress.initial += len(trials) - len(new)
        self.progress.update(len(trials) - len(new))
        for i, result, facts in self.engine.run(self.fit, [trials[i] for i in new]):
            configuration = configurations[new[i]]
            self.store.add(configuration, {**_build_row(result, configuration), **facts})
            self.progress.update()
        rows = [self.store.rows[key] for key in keys]
        for (d, seed, rate), row in zip(trials, rows, strict=True):
            if finite and row["score"] is None:
                raise ValueError(f"fit returned no finite score for d={d}, seed={seed}, learning rate {rate}.")
        return rows


def _build_row(result: Any, configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Build the row of a trial from what the fit returned. Values that are not finite become None, as in JSON."""
    trial = ", ".join(f"{name}={value}" for name, value in configuration.items())
    row = dict(result) if isinstance(result, Mapping) else {"score": result}
    if reserved := sorted(OWN & row.keys()):
        raise ValueError(f"fit returned {', '.join(reserved)} for {trial}, a name that every row has. Rename it.")
    correct = row.pop("correct", None)
    row = {name: _convert(value) for name, value in row.items()}
    score = row.get("score")
    row["score"] = float(score) if isinstance(score, int) else score
    if not isinstance(row["score"], float):
        raise ValueError(f"fit returned {result!r} for {trial}: neither a number, nor a mapping with one as its score.")
    for name, value in row.items():
        try:
            json.dumps(value)
        except TypeError:
            raise ValueError(
                f"fit returned {name}={value!r} for {trial}: a row stores floats, texts, lists and mappings."
            ) from None
        if isinstance(value, float) and not math.isfinite(value):
            row[name] = None
    if correct is None or row["score"] is None:
        return row
    return {**row, **_pack_correct(np.asarray(correct), row["score"], trial)}


def _pack_correct(correct: np.ndarray, score: float, trial: str) -> dict[str, Any]:
    """Pack which predictions are correct into a bit for each example."""
    known = correct.ndim == 1 and np.isin(correct, (0, 1)).all()
    if not known or not len(correct) * abs(correct.mean() - score) < 0.5:
        raise ValueError(
            f"fit returned correct={correct} for {trial}, with the score {score}. It must hold a bool for each "
            "held-out example, and the score must be their mean. Leave it out for other scores."
        )
    right = base64.b64encode(np.packbits(correct.astype(bool)).tobytes()).decode()
    return {"examples": len(correct), "right": right}


def _convert(value: Any) -> Any:
    with suppress(AttributeError, ValueError, RuntimeError):  # the only number of a tensor or an array
        value = value.item()
    return float(value) if isinstance(value, Real) and not isinstance(value, int) else value
