"""Runs the trials that are not in the store yet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from .engine import Engine, Trial
from .store import Store

Fit = Callable[..., float | Mapping[str, float]]
"""`fit(d, seed)`, or `fit(d, seed, learning_rate)`: trains once, returns the score, or a mapping with a
`score` that is kept whole. `d=None` is full fine-tuning."""

FULL = None


class Runner:
    """Trials of one fit, kept in one store; the bar counts them."""

    def __init__(self, fit: Fit, store: Store, engine: Engine, bar: Any) -> None:
        self.fit, self.store, self.engine, self.bar = fit, store, engine, bar

    def scores(
        self, wanted: Sequence[tuple[int | None, int]], rate: float | None, diverged: float | None = None
    ) -> list[float]:
        """The score of each trial; `diverged` stands for one that is not a finite number.

        Raises:
            ValueError: a score is not a finite number, and nothing stands for it.
        """
        found = self._run([(d, seed, rate) for d, seed in wanted])
        for (d, seed), score in zip(wanted, found, strict=True):
            if diverged is None and not math.isfinite(score):
                raise ValueError(f"fit returned no finite score for d={d}, seed={seed}, learning rate {rate}.")
        return [score if math.isfinite(score) else float(diverged or 0.0) for score in found]

    def best_rate(self, d: int | None, rates: Sequence[float]) -> float:
        """The rate with the best score of one run; one that diverges is not chosen.

        Raises:
            ValueError: all diverge.
        """
        scores = {rate: score for rate, score in zip(rates, self._run([(d, 0, rate) for rate in rates]), strict=True)}
        finite = [rate for rate in rates if math.isfinite(scores[rate])]
        if not finite:
            raise ValueError(f"fit returned no finite score for d={d} at any of the learning rates {list(rates)}.")
        return max(finite, key=lambda rate: scores[rate])

    def _run(self, trials: Sequence[Trial]) -> list[float]:
        configurations = [dict(zip(("d", "seed", "learning_rate"), trial, strict=True)) for trial in trials]
        keys = [self.store.key(configuration) for configuration in configurations]
        new = [place for place, name in enumerate(keys) if name not in self.store.rows]
        self.bar.initial += len(trials) - len(new)  # what is known tells nothing of the time that a trial takes
        self.bar.update(len(trials) - len(new))
        for place, found, seconds in self.engine.run(self.fit, [trials[place] for place in new]):
            configuration = configurations[new[place]]
            self.store.add(configuration, {**_row(found, configuration), "seconds": round(seconds, 3)})
            self.bar.update()
        scores = [self.store.rows[name]["score"] for name in keys]
        return [math.nan if score is None else score for score in scores]


def _row(found: Any, configuration: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of what a fit returned; None stands for a number that is not finite, as JSON has none."""
    row = {name: _plain(value) for name, value in (found if isinstance(found, Mapping) else {"score": found}).items()}
    if not isinstance(row.get("score"), float):
        trial = ", ".join(f"{name}={value}" for name, value in configuration.items())
        raise ValueError(f"fit returned {found!r} for {trial}: neither a number, nor a mapping with one as its score.")
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value  # a tensor's or an array's only number
    return float(value) if isinstance(value, Real) else value
