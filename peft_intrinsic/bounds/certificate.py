"""A certificate: one number that the error on new examples does not exceed, what went into it, and when it is void."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from ..aliases import renamed
from .formulas import catoni, check, clopper_pearson, hoeffding, mcallester, occam, prefix_free, seeger

CONDITIONS = (
    "the examples are not independent draws from what the new ones come from (duplicates, parts of one document)",
    "the base model, or anything else that the message leaves out, was trained on these examples or chosen by them",
    "more combinations of d, seed, learning rate, steps and levels were tried on these examples than are counted",
    "training was stopped early, or anything else selected, by looking at these examples, without being counted",
    "the deployed adapter, its precision included, is not the one whose errors were counted",
)
"""Where one of these is so, nothing is claimed."""

_BOUNDS = (occam, seeger, catoni, mcallester, hoeffding)
_OUTPUTS = ("risk", "nats", "bounds", "bound", "held_out", "test_bound", "vacuous")


@dataclass(frozen=True)
class Certificate:
    """A bound on the error of an adapter from the very examples that it was trained on.

    Args:
        n: training examples.
        errors: how many of them the deployed adapter gets wrong.
        bits: the length of all coded parts of the message that the adapter can be rebuilt from.
        num_tried: combinations of d, seed, learning rate, steps and levels that the adapter was chosen from by looking
            at these examples, of a list made beforehand. What rebuilding takes must count (d, seed, levels); to count
            the others too is on the safe side.
        delta: the probability that the bound fails.
        majority: training examples that the answer "always the most frequent class" gets wrong.
        test_errors, test_n: errors on examples that had no part in any choice, and their number; both or neither.

    Raises:
        ValueError: a value is not what its name says.

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

    def __post_init__(self) -> None:
        if (self.test_errors is None) != (self.test_n is None):
            raise ValueError(f"Give test_errors and test_n together; got {self.test_errors} and {self.test_n}.")
        check(**{f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not f.default})

    @property
    def risk(self) -> float:
        """The share of errors in training."""
        return self.errors / self.n

    @property
    def nats(self) -> float:
        """The divergence: length of the prefix-free message and of the number of the combination, times ln 2."""
        return (prefix_free(self.bits) + math.log2(self.num_tried)) * math.log(2)

    @property
    def bounds(self) -> dict[str, float]:
        """Every bound by its name, each with probability 1 − delta of its own."""
        return {bound.__name__: bound(self.risk, self.n, self.nats, self.delta) for bound in _BOUNDS}

    @property
    def bound(self) -> float:
        """The one that is claimed: `occam`.

        It is named beforehand. The least of several that each fail with probability delta may fail more often than
        that, so to pick it after looking would be no bound at this delta.
        """
        return occam(self.risk, self.n, self.nats, self.delta)

    @property
    def held_out(self) -> float:
        """What as many examples kept out of training would give at this error: what `bound` has more is its cost."""
        return clopper_pearson(self.errors, self.n, self.delta)

    @property
    def test_bound(self) -> float | None:
        """The bound from the test examples; None without them."""
        if self.test_errors is None or self.test_n is None:
            return None
        return clopper_pearson(self.test_errors, self.test_n, self.delta)

    @property
    def vacuous(self) -> bool:
        """Whether the bound says no more than the majority class's error does or, where that is unknown, nothing."""
        return self.bound >= (1 if self.majority is None else self.majority / self.n)

    def to_dict(self) -> dict[str, Any]:
        """Inputs and outputs by name, for JSON."""
        return {name: getattr(self, name) for name in (*(f.name for f in fields(self)), *_OUTPUTS)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Certificate:
        """The certificate with these inputs; outputs among them are not believed but computed again.

        Raises:
            ValueError: a field is missing, unknown, or not what its name says.
        """
        values = renamed(values)
        inputs = {f.name: f.default for f in fields(cls)}
        if missing := [name for name, default in inputs.items() if default is MISSING and name not in values]:
            raise ValueError(f"The certificate lacks {', '.join(missing)}; it has {', '.join(values) or 'nothing'}.")
        if unknown := [name for name in values if name not in inputs and name not in _OUTPUTS]:
            raise ValueError(f"A certificate has no {', '.join(unknown)}; take out what is not of {', '.join(inputs)}.")
        return cls(**{name: values[name] for name in inputs if name in values})

    def claim(self) -> str:
        """What is claimed, in a few words."""
        return f"error on new examples at most {_up(self.bound)}, with confidence {100 * (1 - self.delta):.15g} %"

    def report(self) -> str:
        """The certificate for people, one line for each thing; bounds are rounded up."""
        rows = [
            ("certified", self.claim()),
            ("vacuous", self._verdict()),
            ("training error", _share(self.errors, self.n)),
        ]
        if self.majority is not None:
            rows.append(("majority class's error", _share(self.majority, self.n)))
        if self.test_errors is not None and self.test_n is not None and self.test_bound is not None:
            share = _share(self.test_errors, self.test_n)
            rows.append(("test error", f"{share}, which bounds the error on new ones by {_up(self.test_bound)}"))
        others = [f"{name} {_up(value)}" for name, value in self.bounds.items() if name != "occam"]
        rows += [
            ("held-out bound", f"{_up(self.held_out)}, had {self.n} examples kept out of training shown this error"),
            ("message", f"{math.ceil(self.bits / 8)} bytes: all coded parts of the adapter ({self.bits:g} bits)"),
            ("counted", f"{self.nats / math.log(2):.1f} bits: message, its length, which of {self.num_tried} tried"),
            ("claimed bound", "occam, named beforehand"),
            ("other bounds", ", ".join(others)),
        ]
        lines = [f"{name:<24}{value}" for name, value in rows]
        return "\n".join([*lines, "Nothing is claimed where", *(f"- {condition}" for condition in CONDITIONS)]) + "\n"

    def _verdict(self) -> str:
        trivial = "100 %" if self.majority is None else "the majority class's error"
        return f"yes: not below {trivial}" if self.vacuous else f"no: below {trivial}"


def _up(share: float) -> str:
    return f"{math.ceil(share * 1e4) / 100:.2f} %"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} % ({part} of {whole})"
