"""What a measurement asks, checked before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ..aliases import renamed

Rates = tuple[float, ...] | Literal["auto"]
"""Learning rates to try; `"auto"` begins with three a factor of 4 apart, and goes on while the best is at an end."""

AUTO: tuple[tuple[float, ...], tuple[float, ...]] = (1e-5, 4e-5, 1.6e-4), (5e-5, 2e-4, 8e-4)
"""Where `"auto"` begins, of full fine-tuning and of the subspace."""

COARSE = 8
"""Dimensions of the first scan."""


@dataclass(frozen=True)
class Plan:
    """Grid, target, seeds, learning rates and budget of a measurement. Trials do not depend on it.

    Args:
        dims: the grid, ascending.
        target: the share of full fine-tuning to reach.
        relative_to: its score, or its gain over the trivial answer.
        center: what stands for the seeds of one d: the median of those that did not collapse, or the mean of all.
        majority: score of the trivial answer, where known.
        baseline: scores of full fine-tuning, where known.
        seeds: of each d.
        baseline_seeds: of full fine-tuning; None takes three, and more where they narrow the interval most.
        learning_rates: to try, (full fine-tuning, subspace); None where the fit has its own.
        trials: budget of all trials; None is 60, and no limit for a sweep.
        minutes: after which nothing is begun; None is no limit.
        sweep: measure the whole grid.

    Raises:
        ValueError: an option cannot work; the message names it.
    """

    dims: tuple[int, ...]
    target: float = 0.9
    relative_to: Literal["score", "gain"] = "score"
    center: Literal["median", "mean"] = "median"
    majority: float | None = None
    baseline: tuple[float, ...] | None = None
    seeds: int = 3
    baseline_seeds: int | None = None
    learning_rates: tuple[Rates, Rates] | None = None
    trials: int | None = None
    minutes: float | None = None
    sweep: bool = False

    def __post_init__(self) -> None:
        dims = list(self.dims)
        if len(dims) < 2 or any(not isinstance(d, int) or d < 1 for d in dims) or sorted(set(dims)) != dims:
            raise ValueError(f"dims must be ascending positive integers, at least two, got {dims[:5]}…")
        if not 0 < self.target <= 1:
            raise ValueError(f"target must lie in (0, 1], got {self.target}. 0.9 gives d90.")
        for name, known in (("relative_to", ("score", "gain")), ("center", ("median", "mean"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {known[0]!r} or {known[1]!r}, got {getattr(self, name)!r}.")
        if self.baseline is not None and not (self.baseline and all(map(math.isfinite, self.baseline))):
            raise ValueError(f"baseline must be finite scores, one or more, got {list(self.baseline)}.")
        for name, least in (("seeds", 1), ("baseline_seeds", 1), ("trials", self.seeds + 1), ("minutes", 0)):
            value = getattr(self, name)
            if name != "minutes" and not isinstance(value, int | None):
                raise ValueError(f"{name} must be a whole number, got {value!r}.")
            if value is not None and not value >= least:
                why = f": fewer do not measure a single d with seeds={self.seeds}" if name == "trials" else ""
                raise ValueError(f"{name} must be at least {least}, got {value}{why}.")
        self._check_rates()

    def _check_rates(self) -> None:
        if self.learning_rates is None:
            return
        option = f"learning_rates={self.learning_rates} (--full-learning-rates, --learning-rates)"
        lists = [rates for rates in self.learning_rates if rates != "auto"]
        if any(not (math.isfinite(rate) and rate > 0) for rates in lists for rate in rates):
            raise ValueError(f"{option} must be above 0.")
        if any(not rates or len(set(rates)) < len(rates) for rates in lists):
            raise ValueError(f"{option} must be one or more, each once.")
        if len({len(rates) for rates in lists}) != 1 - (not lists) or len(lists) == 1:
            raise ValueError(
                f"{option} must hold as many for full fine-tuning as for the subspace, or be 'auto' for both. "
                "Otherwise one of the two is tuned better than the other."
            )

    @property
    def budget(self) -> int | None:
        """Of all trials."""
        return self.trials if self.trials is not None or self.sweep else 60

    @property
    def coarse(self) -> list[int]:
        """Indexes of the first scan, the ends among them."""
        last = len(self.dims) - 1
        count = min(COARSE, last + 1)
        return sorted({round(last * place / (count - 1)) for place in range(count)})

    def asks(self, d: int | None, rate: float | None) -> bool:
        """Whether such trials belong to it: a folder may hold others."""
        rates = self.learning_rates and self.learning_rates[d is not None]
        here = d is None or self.dims[0] <= d <= self.dims[-1]
        return here and (rate is None) == (rates is None) and (not rates or rates == "auto" or rate in rates)

    def told(self) -> str:
        """What will run, for a user to read before it does."""
        scan = ", ".join(str(self.dims[i]) for i in self.coarse)
        rates = [r if r == "auto" else ", ".join(f"{rate:g}" for rate in r) for r in self.learning_rates or ()]
        some = self.baseline_seeds or "3 or more"
        lines = [
            f"grid: {len(self.dims)} dimensions from {self.dims[0]} to {self.dims[-1]}",
            "full fine-tuning: " + ("given" if self.baseline is not None else f"{some} seeds"),
            f"target: {self.target:g} of its {self.relative_to}; of the seeds of one d the {self.center}",
            *([f"learning rates: {rates[0]} (full fine-tuning), {rates[1]} (subspace)"] if rates else []),
            "the whole grid" if self.sweep else f"scan from below until the target is reached: {scan}",
            f"then {self.seeds} seeds of each d around the crossing",
            "at most "
            + ("the whole grid" if self.budget is None else f"{self.budget} trials")
            + ("" if self.minutes is None else f", {self.minutes:g} minutes"),
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Plan:
        """Of `to_dict`, after JSON; what else it holds is left out.

        Raises:
            ValueError, TypeError: it is no such mapping.
        """
        found = renamed(found)
        values = {field.name: found[field.name] for field in fields(cls) if field.name in found}
        for name in ("dims", "baseline"):
            values[name] = None if values.get(name) is None else tuple(values[name])
        return cls(**{**values, "learning_rates": listed(values.get("learning_rates"))})


def listed(rates: Sequence[Any] | None) -> tuple[Rates, Rates] | None:
    """Learning rates as the plan has them; `"auto"` is of both.

    Raises:
        ValueError: they are neither.
    """
    if rates is None:
        return None
    rates = ("auto", "auto") if rates == "auto" else rates
    if isinstance(rates, str) or len(rates) != 2:
        raise ValueError(
            f"learning_rates must be 'auto', or those of full fine-tuning and of the subspace, got {rates!r}."
        )
    full, subspace = (part if isinstance(part, str) else tuple(map(float, part)) for part in rates)
    return full, subspace  # type: ignore[return-value]
