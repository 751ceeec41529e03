"""Critical layers on models whose answer is known."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from conftest import build, evaluate, trained

from peft_intrinsic.analysis import CriticalLayers, critical_layers, frozen_sweep


def tuned(sizes: dict[str, float]):
    """A model in which the named parameters have moved so far."""
    model = build("bert")
    with torch.no_grad():
        for name, size in sizes.items():
            model.get_parameter(name).add_(size)
    return model


FIRST = "bert.encoder.layer.0.output.dense.bias"
SECOND = "bert.encoder.layer.1.output.dense.bias"
SIZES = {FIRST: 1.0, SECOND: 0.25, "classifier.bias": 0.004}


def moved(model) -> float:
    """A score that is known: how far these parameters are from the base, of 1.254."""
    base = build("bert")
    return sum(float((model.get_parameter(n) - base.get_parameter(n)).mean().detach()) for n in SIZES)


def test_the_layer_that_matters_comes_first():
    model = tuned(SIZES)
    before = evaluate(model, "bert")
    found = critical_layers(build("bert"), model, moved)
    assert found.parts == ["bert.encoder.layer.0", "bert.encoder.layer.1", "classifier"]
    assert found.score == pytest.approx(1.254, abs=1e-5)
    assert found.scores == pytest.approx([0.254, 1.004, 1.25], abs=1e-5)
    assert found.cumulative_scores == pytest.approx([1.25, 1.0, 0.0], abs=1e-5)
    assert found.weights == [24, 24, 3]
    assert found.restorable == ["classifier"]  # .004 of 1.254 is below 1 %
    assert found.share == pytest.approx(3 / 51)
    assert found.layers_to_transform == [0, 1]
    assert torch.equal(evaluate(model, "bert"), before)  # as it was
    report = found.report()
    assert "| bert.encoder.layer.0 | 24 | 0.2540 | 1.0000 | 0.0000 |" in report
    assert "5.9% of these parameters can stay at the base for at most 1% of the score: classifier." in report


def test_more_tolerance_spares_more():
    found = critical_layers(dict(build("bert").named_parameters()), tuned(SIZES), moved, tolerance=0.21)
    assert found.restorable == ["bert.encoder.layer.1", "classifier"]
    assert found.layers_to_transform == [0]


def test_layers_that_cannot_be_named():
    found = critical_layers(build("bert"), tuned(SIZES), moved, by="kind")
    with pytest.raises(ValueError, match="these are none"):
        _ = found.layers_to_transform
    stacks = CriticalLayers(1.0, ["encoder.0", "decoder.0"], [0.5, 0.6], [1, 1], [0.6, 0.1], 0.01)
    with pytest.raises(ValueError, match=r"these are encoder\.0, decoder\.0"):
        _ = stacks.layers_to_transform


def test_report_as_json_and_picture(tmp_path):
    found = critical_layers(build("bert"), tuned(SIZES), moved)
    told = json.loads(json.dumps(found.to_dict()))
    assert told["parts"] == found.parts
    assert told["share"] == pytest.approx(3 / 51)
    found.plot(tmp_path / "critical.png")
    assert (tmp_path / "critical.png").stat().st_size > 3000


def test_tied_parameters_count_once():
    model = build("gpt2")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    found = critical_layers(build("gpt2"), model, lambda m: float(m.lm_head.weight.mean()))
    assert sum(found.weights) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("by", "parts"),
    [("kind", ["output.dense.bias", "classifier.bias"]), ("tensor", [FIRST, SECOND, "classifier.bias"])],
)
def test_other_parts(by, parts):
    assert critical_layers(build("bert"), tuned(SIZES), moved, by=by).parts == parts


def test_what_is_refused():
    model = tuned(SIZES)
    with pytest.raises(ValueError, match="base and tuned are equal"):
        critical_layers(build("bert"), build("bert"), moved)
    with pytest.raises(ValueError, match=r"base has no .* in the shape"):
        critical_layers(build("gpt2"), model, moved)
    with pytest.raises(ValueError, match="tolerance must be"):
        critical_layers(build("bert"), model, moved, tolerance=math.nan)
    with pytest.raises(ValueError, match="tuned has adapters"):
        critical_layers(build("bert"), trained("bert"), moved)
    with pytest.raises(ValueError, match="by must be"):
        critical_layers(build("bert"), model, moved, by="module")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="evaluate returned nan with 1 parameters"):
        critical_layers(build("bert"), model, lambda m: math.nan if moved(m) < 1.2 else 1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_sweep_of_frozen_layers(tmp_path):
    order, calls = ["layer.2", "layer.0", "layer.1"], []

    def fit(parts: list[str], seed: int) -> float:
        calls.append((tuple(parts), seed))
        return len(parts) + seed / 10

    found = frozen_sweep(fit, order, tmp_path, seeds=2, counts=[0, 2])
    assert found == {0: [0.0, 0.1], 2: [2.0, 2.1]}
    assert calls == [((), 0), ((), 1), (("layer.2", "layer.0"), 0), (("layer.2", "layer.0"), 1)]
    again = frozen_sweep(fit, order, tmp_path, seeds=2)
    assert again[0] == found[0]
    assert again[3] == [3.0, 3.1]
    assert len(calls) == 8  # none twice
    with pytest.raises(ValueError, match="written by a run with other settings"):
        frozen_sweep(fit, order[::-1], tmp_path)
    for counts in ([4], [1.5]):
        with pytest.raises(ValueError, match=r"counts=.* are not whole numbers from 0 to 3"):
            frozen_sweep(fit, order, tmp_path, counts=counts)
    with pytest.raises(ValueError, match="seeds must be at least 1"):
        frozen_sweep(fit, order, tmp_path, seeds=0)


def test_no_part_is_restorable():
    found = CriticalLayers(1.0, ["layer.0"], [0.5], [10], [0.5], 0.01)
    assert found.restorable == []
    assert found.share == 0
    assert "for at most 1% of the score: none." in found.report()
