"""Certificates: bounds, report, and the round trip through JSON."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, replace

import pytest

from peft_intrinsic.bounds import CONDITIONS, Certificate, clopper_pearson, kl_inverse, occam, seeger

PLAIN = Certificate(n=1000, errors=100, bits=64)
WHOLE = Certificate(
    n=1000, errors=100, bits=64, num_tried=8, delta=0.1, majority=400, test_errors=12, test_n=100
)  # 64 + 2·6 + 3 bits


def test_the_claimed_bound_counts_the_message_its_length_and_what_was_tried():
    assert WHOLE.risk == 0.1
    assert WHOLE.nats == pytest.approx(79 * math.log(2))
    assert WHOLE.bound == kl_inverse(0.1, (WHOLE.nats + math.log(10)) / 1000)
    assert PLAIN.nats == pytest.approx(76 * math.log(2))


def test_bounds_are_by_name_with_the_claimed_one_first():
    assert list(WHOLE.bounds) == ["occam", "seeger", "catoni", "mcallester", "hoeffding"]
    assert WHOLE.bounds["occam"] == WHOLE.bound == occam(0.1, 1000, WHOLE.nats, 0.1)
    assert WHOLE.bounds["seeger"] == seeger(0.1, 1000, WHOLE.nats, 0.1)


def test_held_out_and_test_bounds_are_those_of_clopper_and_pearson():
    assert WHOLE.held_out == clopper_pearson(100, 1000, 0.1)
    assert WHOLE.test_bound == clopper_pearson(12, 100, 0.1)
    assert PLAIN.test_bound is None
    assert WHOLE.risk < WHOLE.held_out < WHOLE.bound


def test_vacuous_means_not_below_the_majority_class_or_100_percent():
    at = math.ceil(PLAIN.bound * 1000)
    assert not PLAIN.vacuous
    assert not replace(PLAIN, majority=at).vacuous
    assert replace(PLAIN, majority=at - 1).vacuous
    assert replace(PLAIN, bits=1e6).vacuous
    assert replace(PLAIN, errors=1000, majority=1000).vacuous  # equal is no better


@pytest.mark.parametrize("made", [PLAIN, WHOLE])
def test_json_has_inputs_and_outputs_and_gives_the_certificate_back(made):
    content = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert Certificate.from_dict(content) == made
    for name in ("bounds", "bound", "held_out", "test_bound", "vacuous", "risk", "nats"):
        assert content[name] == getattr(made, name)


def test_from_dict_ignores_outputs_and_fills_in_defaults():
    forged = PLAIN.to_dict() | {"bound": 0.0, "bounds": {}, "vacuous": False}
    assert Certificate.from_dict(forged).bound == PLAIN.bound
    made = Certificate.from_dict({"n": 1000, "errors": 100, "bits": 64})
    assert made == PLAIN == replace(PLAIN, num_tried=1, delta=0.05, majority=None, test_errors=None, test_n=None)


def test_a_certificate_is_immutable():
    with pytest.raises(FrozenInstanceError):
        PLAIN.errors = 0


@pytest.mark.parametrize(
    ("change", "message"),
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
def test_wrong_fields_raise(change, message):
    with pytest.raises(ValueError, match=message):
        Certificate.from_dict(PLAIN.to_dict() | change)


@pytest.mark.parametrize("missing", [["n"], ["errors"], ["bits"], list(PLAIN.to_dict())])
def test_missing_fields_raise(missing):
    message = f"lacks {missing[0]}; it has n?" if len(missing) == 1 else "lacks n, errors, bits; it has nothing"
    with pytest.raises(ValueError, match=message):
        Certificate.from_dict({key: value for key, value in PLAIN.to_dict().items() if key not in missing})


def rows(made: Certificate) -> dict[str, str]:
    """The rows of a report by name, without the conditions."""
    text, _ = made.report().split("The certificate is void if\n")
    return {line[:24].strip(): line[24:] for line in text.splitlines()}


def test_report_shows_all_inputs_and_rounds_the_bound_up():
    table = rows(WHOLE)
    shown, confidence = table["certified"].removeprefix("error on new examples at most ").split(" %, with confidence ")
    assert 0 <= float(shown) - 100 * WHOLE.bound < 0.0100001
    assert confidence == "90 %"
    assert table["vacuous"] == "no: below the majority class's error"
    assert table["training error"] == "10.00 % (100 of 1000)"
    assert table["majority class's error"] == "40.00 % (400 of 1000)"
    assert table["test error"].startswith("12.00 % (12 of 100), which bounds the error on new ones by 17.")
    assert table["held-out bound"].startswith("11.3")
    assert table["message"] == "8 bytes: all coded parts of the adapter (64 bits)"
    assert table["counted"] == "79.0 bits: message, its length, which of 8 tried"
    assert [item.split()[0] for item in table["other bounds"].split(", ")] == list(WHOLE.bounds)[1:]
    assert max(map(len, WHOLE.report().splitlines())) < 120


def test_confidence_is_never_rounded_to_100_percent():
    assert replace(PLAIN, delta=1e-13).claim().endswith("with confidence 99.99999999999 %")
    assert replace(PLAIN, delta=0.07).claim().endswith("with confidence 93 %")


def test_report_leaves_out_what_is_unknown():
    table = rows(PLAIN)
    assert not {"majority class's error", "test error"} & set(table)
    assert table["vacuous"] == "no: below 100 %"
    assert rows(replace(PLAIN, bits=1e6))["vacuous"] == "yes: not below 100 %"
    assert rows(replace(PLAIN, majority=100))["vacuous"] == "yes: not below the majority class's error"


def test_report_ends_with_the_conditions():
    assert len(CONDITIONS) >= 4
    assert PLAIN.report().endswith("void if\n" + "".join(f"- {condition}\n" for condition in CONDITIONS))
