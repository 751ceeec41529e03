"""`Certificate`: a bound on the error on new examples, its inputs, and the conditions under which it holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, TypeVar

from ..aliases import renamed
from .formulas import catoni, check, clopper_pearson, hoeffding, mcallester, occam, prefix_free, seeger

CONDITIONS = (
    "the examples are not sampled independently from the source of the new ones (duplicates, parts of one document)",
    "the base model, or anything else outside the message, was trained on these examples or chosen with them",
    "more combinations of d, seed, learning rate, steps and levels were tried on these examples than are counted",
    "training was stopped early, or anything else selected, by looking at these examples, without being counted",
    "the deployed adapter, its precision included, is not the one whose errors were counted",
)
"""Conditions that make a certificate void."""

_BOUNDS = (occam, seeger, catoni, mcallester, hoeffding)

Own = TypeVar("Own", bound="Claims")


class Claims:
    """What all certificates have: inputs, which are the fields of a dataclass, and `outputs` that follow from them."""

    outputs: ClassVar[tuple[str, ...]]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return inputs and outputs by name, for JSON."""
        return {name: getattr(self, name) for name in (*(f.name for f in fields(self)), *self.outputs)}

    @classmethod
    def from_dict(cls: type[Own], values: Mapping[str, Any]) -> Own:
        """Make a certificate from the inputs in a dictionary; outputs in it are ignored.

        Raises:
            ValueError: an input is missing, unknown or out of range.
        """
        values = renamed(values)
        inputs = {f.name: f.default for f in fields(cls)}
        if missing := [name for name, default in inputs.items() if default is MISSING and name not in values]:
            raise ValueError(f"The certificate lacks {', '.join(missing)}; it has {', '.join(values) or 'nothing'}.")
        if unknown := [name for name in values if name not in inputs and name not in cls.outputs]:
            raise ValueError(f"A certificate has no {', '.join(unknown)}. Its inputs are {', '.join(inputs)}.")
        return cls(**{name: values[name] for name in inputs if name in values})


@dataclass(frozen=True)
class Certificate(Claims):
    """A bound on the error of an adapter from the examples that it was trained on.

    Args:
        n: number of training examples.
        errors: number of training examples that the deployed adapter classifies wrongly.
        bits: length of the message, that is, of all coded parts that the adapter can be rebuilt from.
        num_tried: number of combinations of d, seed, learning rate, steps and levels, listed beforehand, from which
            these examples chose the adapter. d, seed and levels must count; counting the others is conservative.
        delta: probability that the bound fails.
        majority: errors of the majority-class baseline on the training examples.
        test_errors: errors on test examples, with which nothing was chosen. Needs `test_n`.
        test_n: number of test examples.

    Raises:
        ValueError: a value is out of range, or one of `test_errors` and `test_n` is missing.

    >>> certificate = Certificate(n=67_349, errors=5_388, bits=712, majority=29_780)
    >>> round(certificate.bound, 4), certificate.vacuous
    (0.1176, False)
    """

    n: int
    errors: int
    bits: float
    num_tried: int = 1
    delta: float = 0.05
    majority: int | None = None
    test_errors: int | None = None
    test_n: int | None = None

    outputs: ClassVar = ("risk", "nats", "bounds", "bound", "held_out", "test_bound", "vacuous")

    def __post_init__(self) -> None:
        if (self.test_errors is None) != (self.test_n is None):
            raise ValueError(f"Give test_errors and test_n together; got {self.test_errors} and {self.test_n}.")
        check(**{f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not f.default})

    @property
    def risk(self) -> float:
        """Training error: fraction of wrong predictions."""
        return self.errors / self.n

    @property
    def nats(self) -> float:
        """Divergence from the prior: length of the prefix-free message plus log2 of `num_tried`, times ln 2."""
        return (prefix_free(self.bits) + math.log2(self.num_tried)) * math.log(2)

    @property
    def bounds(self) -> dict[str, float]:
        """All bounds by name; each holds with probability 1 − delta."""
        return {bound.__name__: bound(self.risk, self.n, self.nats, self.delta) for bound in _BOUNDS}

    @property
    def bound(self) -> float:
        """The claimed bound: `occam`, chosen beforehand.

        The smallest of several bounds that each fail with probability delta may fail more often, so choosing it
        afterwards would need a smaller delta.
        """
        return occam(self.risk, self.n, self.nats, self.delta)

    @property
    def held_out(self) -> float:
        """Clopper-Pearson bound from n held-out examples with this error, for comparison."""
        return clopper_pearson(self.errors, self.n, self.delta)

    @property
    def test_bound(self) -> float | None:
        """Clopper-Pearson bound from the test examples; None without them."""
        if self.test_errors is None or self.test_n is None:
            return None
        return clopper_pearson(self.test_errors, self.test_n, self.delta)

    @property
    def vacuous(self) -> bool:
        """Whether the bound is not below the error of the majority-class baseline (or 1 if that is unknown)."""
        return self.bound >= (1 if self.majority is None else self.majority / self.n)

    def claim(self) -> str:
        """Return the claim as a phrase."""
        return f"error on new examples at most {_ceil(self.bound)}, {format_confidence(self.delta)}"

    def report(self) -> str:
        """Return the certificate as a table for people; bounds are rounded up."""
        limit = "100 %" if self.majority is None else "the majority class's error"
        rows = [
            ("certified", self.claim()),
            ("vacuous", f"{'yes: not' if self.vacuous else 'no:'} below {limit}"),
            ("training error", _percent(self.errors, self.n)),
        ]
        if self.majority is not None:
            rows.append(("majority class's error", _percent(self.majority, self.n)))
        if self.test_errors is not None and self.test_n is not None and self.test_bound is not None:
            fraction = _percent(self.test_errors, self.test_n)
            rows.append(("test error", f"{fraction}, which bounds the error on new ones by {_ceil(self.test_bound)}"))
        others = [f"{name} {_ceil(value)}" for name, value in self.bounds.items() if name != "occam"]
        rows += [
            ("held-out bound", f"{_ceil(self.held_out)}, for {self.n} held-out examples with this error"),
            ("message", f"{math.ceil(self.bits / 8)} bytes: all coded parts of the adapter ({self.bits:g} bits)"),
            ("counted", f"{self.nats / math.log(2):.1f} bits: message, its length, which of {self.num_tried} tried"),
            ("claimed bound", "occam, chosen beforehand"),
            ("other bounds", ", ".join(others)),
        ]
        return format_report(rows, CONDITIONS)


def format_report(rows: Iterable[tuple[str, str]], conditions: Iterable[str]) -> str:
    """Format the rows of a certificate, and the conditions that make it void."""
    lines = [f"{name:<24}{value}" for name, value in rows]
    return "\n".join([*lines, "The certificate is void if", *(f"- {condition}" for condition in conditions)]) + "\n"


def format_confidence(delta: float) -> str:
    """Format the confidence of a claim that fails with probability delta."""
    return f"with confidence {100 * (1 - delta):.15g} %"


def _ceil(fraction: float) -> str:
    return f"{math.ceil(fraction * 1e4) / 100:.2f} %"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} % ({part} of {whole})"
