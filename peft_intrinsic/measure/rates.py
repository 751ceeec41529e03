"""Which learning rates are tried at a d."""

from __future__ import annotations

from collections.abc import Callable

from ..trials.engine import Trial
from .evidence import TUNING, Evidence
from .plan import AUTO

FACTOR, WIDENED = 4.0, 4
"""Learning rates of `"auto"`: the ratio of neighbors, and the greatest number of further ones."""


def list_first_trials(evidence: Evidence, d: int | None, near: float | None) -> list[Trial]:
    """List the trials of the first learning rates at d, or (None) for full fine-tuning.

    They are those around the best of a neighboring d, if there is one. The list is empty if the plan leaves no choice.
    """
    listed = evidence.plan.rates_for(d)
    if listed is None or (listed != "auto" and len(listed) == 1):
        return []
    rates = sorted(AUTO[d is not None] if listed == "auto" else listed)
    if near is not None:
        i = 0 if listed == "auto" else rates.index(near)
        rates = [_round(near * FACTOR**j) for j in (-1, 0, 1)] if listed == "auto" else rates[max(i - 1, 0) : i + 2]
    return [(d, TUNING, rate) for rate in rates]


def tune_rate(evidence: Evidence, run: Callable[[list[Trial]], None], d: int | None, near: float | None) -> None:
    """Try the first learning rates, and further ones while the best is an end of those tried.

    Args:
        evidence: View of the trials.
        run: Runs trials.
        d: Number of trainable parameters; None is full fine-tuning.
        near: Best learning rate of a neighboring d.

    Raises:
        ValueError: Full fine-tuning diverges at all of them.
    """
    if not (trials := list_first_trials(evidence, d, near)):
        return
    run(trials)
    while (rate := _find_next(evidence, d)) is not None:
        run([(d, TUNING, rate)])
    if d is None and evidence.choose_rate(d) is None:
        raise ValueError(
            f"fit returned no finite score for d=None at any of the learning rates "
            f"{list(evidence.get_tuning_scores(d))}. Try others (--full-learning-rates)."
        )


def _find_next(evidence: Evidence, d: int | None) -> float | None:
    """Find the next learning rate to try; None if the best has neighbors, or there are no more."""
    tried, best = evidence.get_tuning_scores(d), evidence.choose_rate(d)
    low, high = min(tried), max(tried)
    learned = d is not None or not all(evidence.is_collapsed((d, TUNING, rate)) for rate in tried)
    lower = best in (None, low) and (learned or best is None)
    if not lower and best != high and learned:
        return None
    listed = evidence.plan.rates_for(d)
    if listed == "auto":
        return None if len(tried) > 2 + WIDENED else _round(low / FACTOR if lower else high * FACTOR)
    left = [rate for rate in sorted(listed or ()) if (rate < low if lower else rate > high)]
    return left[-1 if lower else 0] if left else None


def _round(rate: float) -> float:
    return float(f"{rate:.6g}")
