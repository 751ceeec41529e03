"""Critical layers of models whose critical layers are known."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from conftest import build, evaluate, trained

from peft_intrinsic.analysis import CriticalLayers, critical_layers, frozen_sweep


def tuned(sizes: dict[str, float]):
    """A model whose named parameters differ from the base by these values."""
    model = build("bert")
    with torch.no_grad():
        for name, size in sizes.items():
            model.get_parameter(name).add_(size)
    return model


FIRST = "bert.encoder.layer.0.output.dense.bias"
SECOND = "bert.encoder.layer.1.output.dense.bias"
SIZES = {FIRST: 1.0, SECOND: 0.25, "classifier.bias": 0.004}


def score_change(model) -> float:
    """A known score: the change of these parameters, at most 1.254."""
    base = build("bert")
    return sum(float((model.get_parameter(n) - base.get_parameter(n)).mean().detach()) for n in SIZES)


def test_parts_are_ranked_by_the_loss_of_score_and_the_model_is_unchanged():
    model = tuned(SIZES)
    before = evaluate(model, "bert")
    found = critical_layers(build("bert"), model, score_change)
    assert found.parts == ["bert.encoder.layer.0", "bert.encoder.layer.1", "classifier"]
    assert found.score == pytest.approx(1.254, abs=1e-5)
    assert found.scores == pytest.approx([0.254, 1.004, 1.25], abs=1e-5)
    assert found.cumulative_scores == pytest.approx([1.25, 1.0, 0.0], abs=1e-5)
    assert found.weights == [24, 24, 3]
    assert found.restorable == ["classifier"]  # 0.004 of 1.254 is below 1 %
    assert found.share == pytest.approx(3 / 51)
    assert found.layers_to_transform == [0, 1]
    assert torch.equal(evaluate(model, "bert"), before)
    report = found.report()
    assert "| bert.encoder.layer.0 | 24 | 0.2540 | 1.0000 | 0.0000 |" in report
    assert "5.9% of these parameters can be restored for at most 1% of the score: classifier." in report


def test_a_larger_tolerance_spares_more_parts():
    found = critical_layers(dict(build("bert").named_parameters()), tuned(SIZES), score_change, tolerance=0.21)
    assert found.restorable == ["bert.encoder.layer.1", "classifier"]
    assert found.layers_to_transform == [0]


def test_parts_without_critical_blocks_of_one_stack_have_no_layers_to_transform():
    found = critical_layers(build("bert"), tuned(SIZES), score_change, by="kind")
    with pytest.raises(ValueError, match="they are none"):
        _ = found.layers_to_transform
    stacks = CriticalLayers(1.0, ["encoder.0", "decoder.0"], [0.5, 0.6], [1, 1], [0.6, 0.1], 0.01)
    with pytest.raises(ValueError, match=r"they are encoder\.0, decoder\.0"):
        _ = stacks.layers_to_transform


def test_results_are_written_as_json_and_as_an_image(tmp_path):
    found = critical_layers(build("bert"), tuned(SIZES), score_change)
    values = json.loads(json.dumps(found.to_dict()))
    assert values["parts"] == found.parts
    assert values["share"] == pytest.approx(3 / 51)
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
def test_parts_are_kinds_or_single_parameters(by, parts):
    assert critical_layers(build("bert"), tuned(SIZES), score_change, by=by).parts == parts


def test_unlike_models_invalid_options_and_scores_that_are_not_finite_raise_errors():
    model = tuned(SIZES)
    with pytest.raises(ValueError, match="base and tuned are equal"):
        critical_layers(build("bert"), build("bert"), score_change)
    with pytest.raises(ValueError, match=r"base has no .* of shape"):
        critical_layers(build("gpt2"), model, score_change)
    with pytest.raises(ValueError, match="tolerance=nan is not in"):
        critical_layers(build("bert"), model, score_change, tolerance=math.nan)
    with pytest.raises(ValueError, match="tuned has adapters"):
        critical_layers(build("bert"), trained("bert"), score_change)
    with pytest.raises(ValueError, match="by='module' is not supported"):
        critical_layers(build("bert"), model, score_change, by="module")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="evaluate returned nan with 1 parameters"):
        critical_layers(build("bert"), model, lambda m: math.nan if score_change(m) < 1.2 else 1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_frozen_sweep_trains_the_first_parts_and_resumes_without_repeating_trials(tmp_path):
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
    assert len(calls) == 8
    with pytest.raises(ValueError, match="written by a run with other settings"):
        frozen_sweep(fit, order[::-1], tmp_path)
    for counts in ([4], [1.5]):
        with pytest.raises(ValueError, match=r"counts=.* are no integers from 0 to 3"):
            frozen_sweep(fit, order, tmp_path, counts=counts)
    with pytest.raises(ValueError, match="seeds=0 is less than 1"):
        frozen_sweep(fit, order, tmp_path, seeds=0)


def test_without_restorable_parts_nothing_can_be_restored():
    found = CriticalLayers(1.0, ["layer.0"], [0.5], [10], [0.5], 0.01)
    assert found.restorable == []
    assert found.share == 0
    assert "for at most 1% of the score: none." in found.report()
