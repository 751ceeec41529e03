"""Upper bounds on the error, from the training error and the length of the message that holds the trained parameters.

Everywhere `risk` is the fraction of errors on n independent examples, `nats` the divergence of the classifier from a
prior fixed before they were seen (a message of b bits: b·ln 2), and a bound holds with probability `1 − delta` or more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import beta

_HALVINGS = 50
_TINY = 1e-300


def _whole(low: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: isinstance(value, int) and value >= low, f"a whole number, {low} or more"


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "risk": (lambda value: 0 <= value <= 1, "a fraction of errors between 0 and 1 (errors / n)"),
    "risk in bits": (lambda value: 0 <= value < math.inf, "a finite mean loss, 0 or more"),
    "nats": (lambda value: value >= 0, "the message's length in bits times ln 2, 0 or more"),
    "bits": (lambda value: 0 <= value < math.inf, "the message's length in bits, finite and 0 or more"),
    "choices": (lambda value: value >= 0, "ln of the number of models that the samples chose from, 0 or more"),
    "budget": (lambda value: value >= 0, "a divergence in nats, 0 or more"),
    "delta": (lambda value: 0 < value < 1, "a probability of failure strictly between 0 and 1, such as 0.05"),
    "alpha": (lambda value: 0 < value <= 1, "more than 0 and at most 1, such as 1e-4"),
    "span": (lambda value: 0 <= value < math.inf, "the width of the loss's range, finite and 0 or more"),
    **dict.fromkeys(("n", "m", "vocabulary", "num_tried", "test_n", "max_length"), _whole(1)),
    **dict.fromkeys(("errors", "majority", "test_errors"), _whole(0)),
}
_AT_MOST = {"errors": "n", "majority": "n", "test_errors": "test_n"}


def check(**values: Any) -> None:
    """Raise ValueError for the first value outside the range of its name.

    numpy's narrow integers and floats raise too: they overflow and round where Python's do not.
    """
    for name, value in values.items():
        holds, rule = _RULES[name]
        if not isinstance(value, int | float) or isinstance(value, bool) or not holds(value):
            raise ValueError(f"{name} must be {rule}, as a Python number; got {value!r}.")
    for part, whole in _AT_MOST.items():
        if part in values and values[part] > values[whole]:
            raise ValueError(f"{part} must be at most {whole}, {values[whole]}; got {values[part]}.")


def prefix_free(bits: float) -> float:
    """Length in bits of a message that also says where it ends: ℓ + 2·log2 ℓ (Lotfi et al. 2022, their code).

    Lengths under 2 count as 2. Then the 2^−ℓ' of all messages sum to 0.83, and a prior must not exceed 1; with lengths
    0 and 1 taken as they are it would.

    Args:
        bits: Length of the message, in bits.

    >>> prefix_free(1024)
    1044.0
    """
    check(bits=bits)
    counted = max(bits, 2.0)
    return counted + 2 * math.log2(counted)


def kl_inverse(risk: float, budget: float) -> float:
    """The greatest p with kl(risk ‖ p) ≤ budget, for the divergence of two coins in nats: within 1e-12, never below.

    Args:
        risk: Probability of the first coin.
        budget: Divergence, in nats.

    >>> round(kl_inverse(0.0, math.log(2)), 12)
    0.5
    """
    check(risk=risk, budget=budget)
    if risk == 1:
        return 1.0
    risk = max(risk, _TINY)  # no logarithm of zero; the result only grows with it
    low, high = 0.0, 1 - risk
    for _ in range(_HALVINGS):  # of p − risk, not of p: the two terms nearly cancel where it is small
        gap = (low + high) / 2
        if -risk * math.log1p(gap / risk) - (1 - risk) * math.log1p(-gap / (1 - risk)) > budget:
            high = gap
        else:
            low = gap
    return min(1.0, risk + high + 2.0**-_HALVINGS)  # one step more covers the rounding of the divergence


def hoeffding(risk: float, n: int, nats: float, delta: float) -> float:
    """risk + √((nats + ln 1/delta) / 2n): Hoeffding's inequality for every message, and the union of them.

    The bound of Aghajanyan et al. (2020), section 5, after Arora et al. (2018), with its constants: d coordinates of
    b bits make nats = d·b·ln 2.

    Args:
        risk: Fraction of errors on the training examples.
        n: Number of training examples.
        nats: Length of the message that holds the parameters, in nats (bits times ln 2).
        delta: Probability that the bound fails.

    >>> round(hoeffding(0.1, 10_000, 200 * 3 * math.log(2), 0.05), 4)
    0.2447
    """
    check(risk=risk, n=n, nats=nats, delta=delta)
    return min(1.0, risk + math.sqrt((nats - math.log(delta)) / (2 * n)))


def mcallester(risk: float, n: int, nats: float, delta: float) -> float:
    """risk + √((nats + ln 1/delta + ln n) / (2n − 1)): McAllester, as in the code of Lotfi et al. (2022).

    Args:
        risk: Fraction of errors on the training examples.
        n: Number of training examples.
        nats: Length of the message that holds the parameters, in nats (bits times ln 2).
        delta: Probability that the bound fails.

    >>> round(mcallester(0.1, 10_000, 200 * 3 * math.log(2), 0.05), 4)
    0.2463
    """
    check(risk=risk, n=n, nats=nats, delta=delta)
    return min(1.0, risk + math.sqrt((nats - math.log(delta) + math.log(n)) / (2 * n - 1)))


def catoni(risk: float, n: int, nats: float, delta: float, alpha: float = 1e-4) -> float:
    """Catoni's bound at its best γ, which the formula has paid for: Catoni (2007), the form of Lotfi et al. (2022).

    inf over γ > 1 of (1 − e^(−q·γ/n)) / (1 − e^(−γ/n)), where
    q = risk + (1 + alpha)/γ · (nats + ln 1/delta + 2 ln(2 + ln γ / ln(1 + alpha))).

    It holds at every γ, so the search on a grid can cost tightness only (under 1e-4).

    Args:
        risk: Fraction of errors on the training examples.
        n: Number of training examples.
        nats: Length of the message that holds the parameters, in nats (bits times ln 2).
        delta: Probability that the bound fails.
        alpha: Step of the grid of γ that the union bound covers.

    >>> round(catoni(0.1, 10_000, 200 * 3 * math.log(2), 0.05), 4)
    0.2116
    """
    check(risk=risk, n=n, nats=nats, delta=delta, alpha=alpha)
    gamma = np.geomspace(1, max(1e7, 100.0 * n), 4000)
    price = nats - math.log(delta) + 2 * np.log(2 + np.log(gamma) / math.log1p(alpha))
    q = risk + (1 + alpha) / gamma * price
    return min(1.0, float(np.min(np.expm1(-q * gamma / n) / np.expm1(-gamma / n))))


def seeger(risk: float, n: int, nats: float, delta: float) -> float:
    """kl(risk ‖ p) ≤ (nats + ln(2√n / delta)) / n: Langford and Seeger (2001) with the constant of Maurer (2004).

    Args:
        risk: Fraction of errors on the training examples.
        n: Number of training examples.
        nats: Length of the message that holds the parameters, in nats (bits times ln 2).
        delta: Probability that the bound fails.

    >>> round(seeger(0.1, 10_000, 200 * 3 * math.log(2), 0.05), 4)
    0.2089
    """
    check(risk=risk, n=n, nats=nats, delta=delta)
    return kl_inverse(risk, (nats + math.log(2 * math.sqrt(n)) - math.log(delta)) / n)


def occam(risk: float, n: int, nats: float, delta: float) -> float:
    """kl(risk ‖ p) ≤ (nats + ln 1/delta) / n: for one deterministic classifier, under a prior fixed beforehand.

    Chernoff's inequality for every message and the union of them: Langford (2005), "Tutorial on practical prediction
    theory for classification", section 4. Never above `hoeffding` (Pinsker's inequality) nor `seeger`.

    Args:
        risk: Fraction of errors on the training examples.
        n: Number of training examples.
        nats: Length of the message that holds the parameters, in nats (bits times ln 2).
        delta: Probability that the bound fails.

    >>> round(occam(0.1, 10_000, 200 * 3 * math.log(2), 0.05), 4)
    0.2081
    """
    check(risk=risk, n=n, nats=nats, delta=delta)
    return kl_inverse(risk, (nats - math.log(delta)) / n)


def clopper_pearson(errors: int, n: int, delta: float) -> float:
    """The p at which `errors` or fewer of n have the probability delta: the one-sided limit on held-out examples.

    Clopper and Pearson (1934); Langford (2005), section 3, calls it the test set bound.

    Args:
        errors: Number of errors on the held-out examples.
        n: Number of held-out examples.
        delta: Probability that the bound fails.

    >>> round(clopper_pearson(0, 100, 0.05), 4)
    0.0295
    """
    check(errors=errors, n=n, delta=delta)
    return 1.0 if errors == n else float(beta.isf(delta, errors + 1, n - errors))


def subsampled(risk: float, n: int, m: int, nats: float, delta: float, span: float = 1.0, *, choices: float) -> float:
    """For a mean loss on n of the m training documents, sampled uniformly: after Lotfi et al. (2023), SubLoRA.

    risk + span · (√((nats + ln 1/(r·delta)) / 2m) + √((choices + ln 1/((1 − r)·delta)) / 2n)) with r = n / (n + m).
    The paper has no `choices`: its last term holds for one model that is fixed without the sample.

    Args:
        risk: Mean loss, such as bits per token; a fraction of errors if span is 1.
        n: Number of sampled documents.
        m: Number of training documents.
        nats: Length of the message that holds the parameters, in nats. It counts all choices, `choices` among them.
        delta: Probability that the bound fails.
        span: Width of the loss's range; for bits per token that of `smoothed_span`.
        choices: ln of the number of models that the losses on the n documents chose from; 0 if they chose none.

    Returns:
        The bound on the mean loss, which is not cut at a maximum.

    >>> round(subsampled(0.3, 1_000, 100_000, 2_000, 0.05, choices=math.log(120)), 4)
    0.4626
    """
    check(**{"risk" if span == 1 else "risk in bits": risk}, n=n, m=m, nats=nats, delta=delta, span=span)
    check(choices=choices)
    if n > m:
        raise ValueError(f"n must be at most m={m}, the number of training documents; got n={n}.")
    r = n / (n + m)
    over_messages = math.sqrt((nats - math.log(r) - math.log(delta)) / (2 * m))
    over_samples = math.sqrt((choices - math.log1p(-r) - math.log(delta)) / (2 * n))
    return risk + span * (over_messages + over_samples)


def smoothed_span(alpha: float, vocabulary: int) -> float:
    """log2(1 + (1 − alpha)·V / alpha): the range in bits of the loss of (1 − alpha)·p + alpha/V (Lotfi et al. 2023).

    Args:
        alpha: Weight of the uniform distribution in the mixture, above 0 and at most 1.
        vocabulary: V, the number of tokens.

    >>> smoothed_span(0.5, 7)
    3.0
    """
    check(alpha=alpha, vocabulary=vocabulary)
    return math.log2(1 + (1 - alpha) * vocabulary / alpha)
