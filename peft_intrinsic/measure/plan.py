"""The plan of a measurement: grid, target, seeds, learning rates and budget, checked before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from operator import index
from typing import Any, Literal

from ..aliases import renamed

Rates = tuple[float, ...] | Literal["auto"]
"""Learning rates to try. `"auto"` starts with three, a factor of 4 apart, and adds others while the best is an end."""

AUTO: tuple[tuple[float, ...], tuple[float, ...]] = (1e-5, 4e-5, 1.6e-4), (5e-5, 2e-4, 8e-4)
"""First learning rates of `"auto"`, for full fine-tuning and for the subspace."""

SCAN = 8
"""Dimensions of the first scan."""


@dataclass(frozen=True)
class Plan:
    """Options of `measure_intrinsic_dimension` on which trials do not depend, checked and normalized.

    Raises:
        ValueError: An option cannot work; the message names it.
    """

    dims: Sequence[int]
    target: float = 0.9
    relative_to: Literal["score", "gain"] = "score"
    center: Literal["median", "mean"] = "median"
    majority: float | None = None
    baseline: Any = None
    seeds: int = 3
    baseline_seeds: int | None = None
    learning_rates: Any = None
    trials: int | None = None
    minutes: float | None = None
    sweep: bool = False

    def __post_init__(self) -> None:
        known = self.baseline if self.baseline is None or isinstance(self.baseline, Sequence) else [self.baseline]
        object.__setattr__(self, "dims", tuple(map(index, self.dims)))
        object.__setattr__(self, "baseline", None if known is None else tuple(map(float, known)))
        object.__setattr__(self, "learning_rates", _normalize_rates(self.learning_rates))
        dims = list(self.dims)
        if len(dims) < 2 or dims[0] < 1 or sorted(set(dims)) != dims:
            raise ValueError(f"dims must be ascending positive integers, at least two, got {dims[:5]}…")
        if not 0 < self.target <= 1:
            raise ValueError(f"target must lie in (0, 1], got {self.target}. 0.9 gives d90.")
        for name, choices in (("relative_to", ("score", "gain")), ("center", ("median", "mean"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {choices[0]!r} or {choices[1]!r}, got {getattr(self, name)!r}.")
        if self.baseline is not None and not (self.baseline and all(map(math.isfinite, self.baseline))):
            raise ValueError(f"baseline must be finite scores, one or more, got {list(self.baseline)}.")
        for name, minimum in (("seeds", 1), ("baseline_seeds", 1), ("trials", self.seeds + 1), ("minutes", 0)):
            value = getattr(self, name)
            if name != "minutes" and not isinstance(value, int | None):
                raise ValueError(f"{name} must be a whole number, got {value!r}.")
            if value is not None and not value >= minimum:
                why = f": fewer do not measure a single d with seeds={self.seeds}" if name == "trials" else ""
                raise ValueError(f"{name} must be at least {minimum}, got {value}{why}.")

    @property
    def budget(self) -> int | None:
        """Budget of all trials."""
        return self.trials if self.trials is not None or self.sweep else 60

    @property
    def scan(self) -> list[int]:
        """Indexes of the first scan, the ends of the grid among them."""
        last = len(self.dims) - 1
        count = min(SCAN, last + 1)
        return sorted({round(last * i / (count - 1)) for i in range(count)})

    def rates_for(self, d: int | None) -> Rates | None:
        """Get the learning rates to try at d, or (None) for full fine-tuning."""
        return self.learning_rates and self.learning_rates[d is not None]

    def includes(self, d: int | None, learning_rate: float | None) -> bool:
        """Check whether such trials belong to the plan. A folder may hold others."""
        rates = self.rates_for(d)
        inside = d is None or self.dims[0] <= d <= self.dims[-1]
        known = learning_rate is None if rates is None else learning_rate is not None
        return inside and known and (rates in (None, "auto") or learning_rate in rates)

    def describe(self) -> str:
        """Describe what will run, for the user to read before it does."""
        scan = ", ".join(str(self.dims[i]) for i in self.scan)
        rates = [r if r == "auto" else ", ".join(f"{rate:g}" for rate in r) for r in self.learning_rates or ()]
        full = "given" if self.baseline is not None else f"{self.baseline_seeds or '3 or more'} seeds"
        budget = "the whole grid" if self.budget is None else f"{self.budget} trials"
        lines = [
            f"grid: {len(self.dims)} dimensions from {self.dims[0]} to {self.dims[-1]}",
            f"full fine-tuning: {full}",
            f"target: {self.target:g} of its {self.relative_to}; seeds of one d are aggregated by their {self.center}",
            *([f"learning rates: {rates[0]} (full fine-tuning), {rates[1]} (subspace)"] if rates else []),
            "the whole grid" if self.sweep else f"scan from below until the target is reached: {scan}",
            f"then {self.seeds} seeds of each d around the crossing",
            f"at most {budget}" + ("" if self.minutes is None else f", {self.minutes:g} minutes"),
        ]
        return "\n".join(lines)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Plan:
        """Build the plan from its fields, as JSON has them. Other names are ignored.

        Raises:
            ValueError, TypeError: The mapping is no such plan.
        """
        stored = renamed(stored)
        return cls(**{field.name: stored[field.name] for field in fields(cls) if field.name in stored})


def _normalize_rates(rates: Any) -> tuple[Rates, Rates] | None:
    if rates is None:
        return None
    rates = ("auto", "auto") if rates == "auto" else rates
    if isinstance(rates, str) or len(rates) != 2:
        raise ValueError(f"learning_rates={rates!r} must be 'auto', or a pair (full fine-tuning, subspace).")
    full, subspace = (part if isinstance(part, str) else tuple(map(float, part)) for part in rates)
    option = f"learning_rates={(full, subspace)} (--full-learning-rates, --learning-rates)"
    lists: list[Any] = [rates for rates in (full, subspace) if rates != "auto"]
    if any(not (math.isfinite(rate) and rate > 0) for rates in lists for rate in rates):
        raise ValueError(f"{option} must be above 0.")
    if any(not rates or len(set(rates)) < len(rates) for rates in lists):
        raise ValueError(f"{option} must be one or more, each once.")
    if len(lists) == 1 or len(set(map(len, lists))) > 1:
        raise ValueError(
            f"{option} must hold as many for full fine-tuning as for the subspace, or be 'auto' for both. Otherwise "
            "one of the two is tuned better than the other."
        )
    return full, subspace  # type: ignore[return-value]
