"""`LanguageCertificate`: a bound on the bits per token of a language model on new documents."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

from .certificate import Claims, format_confidence, format_report
from .formulas import check, hoeffding, prefix_free, smoothed_span, subsampled

ALPHAS = (1e-4, 1e-3, 5e-3, 0.01, 0.05, 0.1, 0.25, 0.5)
"""Weights of the uniform distribution among which a certificate chooses: those of Lotfi et al. (2023)."""

LANGUAGE_CONDITIONS = (
    "the documents are not sampled independently from the source of the new ones (duplicates, parts of one text)",
    "the base model, or anything else outside the message, was trained on these documents or chosen with them",
    "more combinations of d, seed, learning rate, steps and levels were tried on these documents than are counted",
    "training was stopped early, or anything else selected, by looking at these documents, without being counted",
    "training or selection treated the sampled documents, which a fixed seed chooses, in another way than the others",
    "the deployed model is another one, its precision, its tokenizer and its smoothing included",
)
"""Conditions that make a certificate of a language model void."""


@dataclass(frozen=True)
class LanguageCertificate(Claims):
    """A bound on the bits per token of an adapter of a language model, from the documents that it was trained on.

    The loss of a document is the mean of −log2((1 − alpha)·p + alpha/V) over its tokens, where p is the probability of
    a token after those before it. Documents count alike, whatever their length.

    Args:
        m: number of training documents.
        n: number of those that the model was evaluated on, sampled uniformly.
        risk: mean loss of the deployed adapter on them, in bits per token.
        alpha: weight of the uniform distribution, one of `alphas`.
        vocabulary: V, the number of tokens that the model chooses among.
        bits: length of the message, that is, of all coded parts that the adapter can be rebuilt from.
        untrained_risk: mean loss of the base model on the same documents.
        untrained_alpha: weight of the uniform distribution in that.
        alphas: weights, listed beforehand, from which these documents chose `alpha` and `untrained_alpha`.
        num_tried: number of combinations of d, seed, learning rate, steps and levels, listed beforehand, from which
            these documents chose the adapter. d, seed and levels must count; counting the others is conservative.
        delta: probability that the bound fails.
        test_risk: mean loss on test documents, with which nothing was chosen. Needs `test_n`.
        test_n: number of test documents.

    Raises:
        ValueError: a value is out of range, or one of `test_risk` and `test_n` is missing.

    >>> certificate = LanguageCertificate(
    ...     m=25_000, n=5_000, risk=4.2, alpha=0.1, vocabulary=49_152, bits=2_000,
    ...     untrained_risk=4.9, untrained_alpha=0.1,
    ... )
    >>> round(certificate.bound, 4), round(certificate.untrained_bound, 4), certificate.vacuous
    (7.682, 5.3225, False)
    """

    m: int
    n: int
    risk: float
    alpha: float
    vocabulary: int
    bits: float
    untrained_risk: float
    untrained_alpha: float
    alphas: tuple[float, ...] = ALPHAS
    num_tried: int = 1
    delta: float = 0.05
    test_risk: float | None = None
    test_n: int | None = None

    outputs: ClassVar = ("span", "nats", "bound", "uniform", "untrained_bound", "held_out", "test_bound", "vacuous")

    def __post_init__(self) -> None:
        object.__setattr__(self, "alphas", tuple(self.alphas))
        if (self.test_risk is None) != (self.test_n is None):
            raise ValueError(f"Give test_risk and test_n together; got {self.test_risk} and {self.test_n}.")
        losses = {"risk": self.alpha, "untrained_risk": self.untrained_alpha, "test_risk": self.alpha}
        plain = [f.name for f in fields(self) if f.name not in (*losses, "alphas", "untrained_alpha", "test_n")]
        check(**{name: getattr(self, name) for name in plain})
        for alpha in (*self.alphas, self.untrained_alpha):
            check(alpha=alpha)
        if self.test_n is not None:
            check(test_n=self.test_n)
        for name in ("alpha", "untrained_alpha"):
            if getattr(self, name) not in self.alphas:
                raise ValueError(f"{name}={getattr(self, name)} is not among alphas={self.alphas}. Add it to them.")
        if self.n > self.m:
            raise ValueError(f"n must be at most m={self.m}, the number of training documents; got n={self.n}.")
        for name, alpha in losses.items():
            if (loss := getattr(self, name)) is not None:
                check(**{"risk in bits": loss})
                low = -math.log2(1 - alpha + alpha / self.vocabulary)
                if not low - 1e-9 <= loss <= low + smoothed_span(alpha, self.vocabulary) + 1e-9:
                    raise ValueError(f"{name}={loss} is no mean loss for alpha={alpha} and V={self.vocabulary}.")

    @property
    def span(self) -> float:
        """Width in bits of the range of the loss."""
        return smoothed_span(self.alpha, self.vocabulary)

    @property
    def choices(self) -> float:
        """The choice among `num_tried` and among `alphas`, in nats: ln of the number of pairs."""
        return math.log(self.num_tried * len(self.alphas))

    @property
    def nats(self) -> float:
        """Divergence from the prior: prefix-free message, and `choices`."""
        return prefix_free(self.bits) * math.log(2) + self.choices

    @property
    def bound(self) -> float:
        """The claimed bound: `subsampled`, or Hoeffding's if n = m, where no document is left out."""
        if self.n < self.m:
            return subsampled(self.risk, self.n, self.m, self.nats, self.delta, self.span, choices=self.choices)
        return self._bound_mean(self.risk, self.alpha, self.m, self.nats)

    @property
    def uniform(self) -> float:
        """Bits per token of the uniform distribution: log2 V."""
        return math.log2(self.vocabulary)

    @property
    def untrained_bound(self) -> float:
        """Bound of the base model from the same n documents. Its message is empty: only the choice of alpha counts."""
        return self._bound_mean(self.untrained_risk, self.untrained_alpha, self.n, math.log(len(self.alphas)))

    @property
    def held_out(self) -> float:
        """Hoeffding's bound from n held-out documents with this loss, for comparison."""
        return self._bound_mean(self.risk, self.alpha, self.n, 0.0)

    @property
    def test_bound(self) -> float | None:
        """Hoeffding's bound from the test documents; None without them."""
        if self.test_risk is None or self.test_n is None:
            return None
        return self._bound_mean(self.test_risk, self.alpha, self.test_n, 0.0)

    @property
    def vacuous(self) -> bool:
        """Whether the bound is not below the bits per token of the uniform distribution."""
        return self.bound >= self.uniform

    def _bound_mean(self, risk: float, alpha: float, n: int, nats: float) -> float:
        """Hoeffding's bound on a mean loss over n documents. Its range is that of the smoothed loss."""
        return risk + smoothed_span(alpha, self.vocabulary) * hoeffding(0.0, n, nats, self.delta)

    def claim(self) -> str:
        """Return the claim as a phrase. A document's loss covers the tokens that `max_length` leaves of it."""
        bits = f"{_ceil(self.bound)} bits per token of new documents, cut off like these"
        return f"at most {bits}, {format_confidence(self.delta)}"

    def report(self) -> str:
        """Return the certificate as a table for people; bounds are rounded up."""
        tried = f"of {len(self.alphas)} tried"
        sampled = "all" if self.n == self.m else "sampled"
        below = "below" if self.bound < self.untrained_bound else "not below"
        rows = [
            ("certified", self.claim()),
            (
                "vacuous",
                f"{'yes: not' if self.vacuous else 'no:'} below {self.uniform:.4f} bits, the uniform distribution",
            ),
            ("untrained model", f"at most {_ceil(self.untrained_bound)} bits; the certified bound is {below} that"),
            ("training loss", f"{self.risk:.4f} bits per token; untrained {self.untrained_risk:.4f}"),
        ]
        if self.test_risk is not None and self.test_bound is not None:
            rows.append(
                ("test loss", f"{self.test_risk:.4f} bits, which bounds that on new ones by {_ceil(self.test_bound)}")
            )
        rows += [
            ("held-out bound", f"{_ceil(self.held_out)} bits, for {self.n} held-out documents with this loss"),
            ("documents", f"{self.n} of {self.m}, {sampled}"),
            (
                "smoothing",
                f"alpha = {self.alpha:g} (untrained {self.untrained_alpha:g}), {tried}; V = {self.vocabulary}",
            ),
            ("range of the loss", f"{self.span:.4f} bits"),
            ("message", f"{math.ceil(self.bits / 8)} bytes: all coded parts of the adapter ({self.bits:g} bits)"),
            (
                "counted",
                f"{self.nats / math.log(2):.1f} bits: message, its length, alpha, which of {self.num_tried} tried",
            ),
        ]
        return format_report(rows, LANGUAGE_CONDITIONS)


def _ceil(bits: float) -> str:
    return f"{math.ceil(bits * 1e4) / 1e4:.4f}"
