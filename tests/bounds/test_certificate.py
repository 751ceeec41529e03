"""The certificate: what it claims, what it says to people, and the way to JSON and back."""

from __future__ import annotations

import doctest
import json
import math
from dataclasses import FrozenInstanceError, replace

import pytest

from peft_intrinsic.bounds import CONDITIONS, Certificate, certificate, clopper_pearson, kl_inverse, occam, seeger

PLAIN = Certificate(n=1000, errors=100, bits=64)
WHOLE = Certificate(
    n=1000, errors=100, bits=64, num_tried=8, delta=0.1, majority=400, test_errors=12, test_n=100
)  # 64 + 2·6 + 3 bits


def test_the_example_in_the_docstring():
    found = doctest.testmod(certificate)
    assert found.attempted == 2
    assert not found.failed


def test_the_claimed_bound_pays_for_the_message_its_length_and_the_choice():
    assert WHOLE.risk == 0.1
    assert WHOLE.nats == pytest.approx(79 * math.log(2))
    assert WHOLE.bound == kl_inverse(0.1, (WHOLE.nats + math.log(10)) / 1000)
    assert PLAIN.nats == pytest.approx(76 * math.log(2))


def test_all_bounds_by_name_the_claimed_one_first():
    assert list(WHOLE.bounds) == ["occam", "seeger", "catoni", "mcallester", "hoeffding"]
    assert WHOLE.bounds["occam"] == WHOLE.bound == occam(0.1, 1000, WHOLE.nats, 0.1)
    assert WHOLE.bounds["seeger"] == seeger(0.1, 1000, WHOLE.nats, 0.1)


def test_bounds_from_examples_kept_out():
    assert WHOLE.held_out == clopper_pearson(100, 1000, 0.1)
    assert WHOLE.test_bound == clopper_pearson(12, 100, 0.1)
    assert PLAIN.test_bound is None
    assert WHOLE.risk < WHOLE.held_out < WHOLE.bound


def test_vacuous_against_the_majority_class_or_nothing():
    at = math.ceil(PLAIN.bound * 1000)
    assert not PLAIN.vacuous
    assert not replace(PLAIN, majority=at).vacuous
    assert replace(PLAIN, majority=at - 1).vacuous
    assert replace(PLAIN, bits=1e6).vacuous
    assert replace(PLAIN, errors=1000, majority=1000).vacuous  # equal is no better


@pytest.mark.parametrize("made", [PLAIN, WHOLE])
def test_to_json_and_back(made):
    told = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert Certificate.from_dict(told) == made
    assert told["bounds"] == made.bounds
    assert {name: told[name] for name in ("bound", "held_out", "test_bound", "vacuous", "risk", "nats")} == {
        "bound": made.bound,
        "held_out": made.held_out,
        "test_bound": made.test_bound,
        "vacuous": made.vacuous,
        "risk": made.risk,
        "nats": made.nats,
    }


def test_outputs_are_not_believed():
    forged = PLAIN.to_dict() | {"bound": 0.0, "bounds": {}, "vacuous": False}
    assert Certificate.from_dict(forged).bound == PLAIN.bound


def test_few_fields_are_enough():
    made = Certificate.from_dict({"n": 1000, "errors": 100, "bits": 64})
    assert made == PLAIN == replace(PLAIN, num_tried=1, delta=0.05, majority=None, test_errors=None, test_n=None)


def test_what_is_certified_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        PLAIN.errors = 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tryed": 8}, "has no tryed"),
        ({"errors": 1001}, "errors must be at most n, 1000; got 1001"),
        ({"errors": None}, "errors must be a whole number, 0 or more, as a Python number; got None"),
        ({"n": "1000"}, "n must be a whole number, 1 or more, as a Python number; got '1000'"),
        ({"bits": math.inf}, "bits must be"),
        ({"num_tried": 0}, "num_tried must be"),
        ({"delta": 5}, "delta must be"),
        ({"majority": 1001}, "majority must be at most n"),
        ({"test_errors": 3, "test_n": 2}, "test_errors must be at most test_n"),
        ({"test_errors": 3}, "together; got 3 and None"),
        ({"test_n": 3}, "together; got None and 3"),
    ],
)
def test_wrong_fields_are_named(change, told):
    with pytest.raises(ValueError, match=told):
        Certificate.from_dict(PLAIN.to_dict() | change)


@pytest.mark.parametrize("name", ["n", "errors", "bits"])
def test_missing_fields_are_named(name):
    with pytest.raises(ValueError, match=f"lacks {name}; it has "):
        Certificate.from_dict({key: value for key, value in PLAIN.to_dict().items() if key != name})
    with pytest.raises(ValueError, match="lacks n, errors, bits; it has nothing"):
        Certificate.from_dict({})


def rows(made: Certificate) -> dict[str, str]:
    """The report's lines by their names, without the conditions."""
    table, _ = made.report().split("Nothing is claimed where\n")
    return {line[:24].strip(): line[24:] for line in table.splitlines()}


def test_report():
    """Bounds are rounded up: what is printed holds as well."""
    told = rows(WHOLE)
    shown, confidence = told["certified"].removeprefix("error on new examples at most ").split(" %, with confidence ")
    assert 0 <= float(shown) - 100 * WHOLE.bound < 0.0100001
    assert confidence == "90 %"
    assert told["vacuous"] == "no: below the majority class's error"
    assert told["training error"] == "10.00 % (100 of 1000)"
    assert told["majority class's error"] == "40.00 % (400 of 1000)"
    assert told["test error"].startswith("12.00 % (12 of 100), which bounds the error on new ones by 17.")
    assert told["held-out bound"].startswith("11.3")
    assert told["message"] == "8 bytes: all coded parts of the adapter (64 bits)"
    assert told["counted"] == "79.0 bits: message, its length, which of 8 tried"
    assert [item.split()[0] for item in told["other bounds"].split(", ")] == list(WHOLE.bounds)[1:]
    assert max(map(len, WHOLE.report().splitlines())) < 120


def test_confidence_is_never_whole():
    assert replace(PLAIN, delta=1e-13).claim().endswith("with confidence 99.99999999999 %")
    assert replace(PLAIN, delta=0.07).claim().endswith("with confidence 93 %")


def test_report_of_what_is_unknown():
    told = rows(PLAIN)
    assert not {"majority class's error", "test error"} & set(told)
    assert told["vacuous"] == "no: below 100 %"
    assert rows(replace(PLAIN, bits=1e6))["vacuous"] == "yes: not below 100 %"
    assert rows(replace(PLAIN, majority=100))["vacuous"] == "yes: not below the majority class's error"


def test_report_ends_with_the_conditions():
    assert len(CONDITIONS) >= 4
    assert PLAIN.report().endswith("where\n" + "".join(f"- {condition}\n" for condition in CONDITIONS))
