"""Which learning rates are tried at a d."""

from __future__ import annotations

from collections.abc import Callable

from ..trials.engine import Trial
from .evidence import TUNING, Evidence
from .plan import AUTO

FACTOR, WIDENED = 4.0, 4
"""Of learning rates by `"auto"`: from one to the next, and how often they go on beyond the first three."""


def first(evidence: Evidence, d: int | None, near: float | None) -> list[Trial]:
    """The rates that are tried at a d whatever they give: those about the one that was best at a neighbouring d, if
    there is one. Empty where the plan leaves nothing to choose."""
    if evidence.plan.learning_rates is None or (
        (listed := evidence.plan.learning_rates[d is not None]) != "auto" and len(listed) == 1
    ):
        return []
    rates = sorted(AUTO[d is not None] if listed == "auto" else listed)
    if near is not None:
        about = [_round(near * FACTOR**i) for i in (-1, 0, 1)]
        place = 0 if listed == "auto" else rates.index(near)
        rates = about if listed == "auto" else rates[max(place - 1, 0) : place + 2]
    return [(d, TUNING, rate) for rate in rates]


def choose(evidence: Evidence, ask: Callable[[list[Trial]], None], d: int | None, near: float | None) -> None:
    """Try the first learning rates, and further ones while the best is at an end of those tried.

    Args:
        evidence: of the trials so far.
        ask: runs trials.
        d: how many numbers; None is full fine-tuning.
        near: the rate that was best at a neighbouring d.

    Raises:
        ValueError: full fine-tuning diverges at all of them.
    """
    if not (trials := first(evidence, d, near)):
        return
    ask(trials)
    while (rate := _further(evidence, d)) is not None:
        ask([(d, TUNING, rate)])
    if d is None and evidence.tuned(d) is None:
        tried = list(evidence.tried(d))
        raise ValueError(
            f"fit returned no finite score for d=None at any of the learning rates {tried}. Try others "
            "(--full-learning-rates)."
        )


def _further(evidence: Evidence, d: int | None) -> float | None:
    """The next rate to try; None where the best has neighbours, or there are no more."""
    tried, best = evidence.tried(d), evidence.tuned(d)
    low, high = min(tried), max(tried)
    listed = evidence.plan.learning_rates and evidence.plan.learning_rates[d is not None]
    learnt = d is not None or not all(map(evidence.collapsed, tried.values()))
    lower = best in (None, low) and (learnt or best is None)
    if not lower and best != high and learnt:
        return None
    if listed == "auto":
        return None if len(tried) > 2 + WIDENED else _round(low / FACTOR if lower else high * FACTOR)
    left = [rate for rate in sorted(listed or ()) if (rate < low if lower else rate > high)]
    return left[-1 if lower else 0] if left else None


def _round(rate: float) -> float:
    return float(f"{rate:.6g}")
