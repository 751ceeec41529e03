"""Merging: all or nothing, exact undoing, and a warning where rounding eats the offset."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import build, evaluate, same, trained
from peft import get_peft_model
from torch import nn

from peft_intrinsic import IntrinsicConfig

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "intrinsic_" not in name}


def equal(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = values(model)
    return all(torch.equal(now[name], before[name]) for name in before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("unload", [False, True])
def test_safe_merge_is_all_or_nothing(bad, unload):
    """1e38 is finite, but not in half precision: some layers merge well before one fails."""
    model = get_peft_model(build("bert").half(), IntrinsicConfig(d=200, init_weights=False, target_modules="all"))
    before = values(model)
    with torch.no_grad():
        model.get_base_model().intrinsic.intrinsic_theta["default"].weight[-1] = bad
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights. The adapter default seems"):
        model.merge_and_unload(safe_merge=True) if unload else model.merge_adapter(safe_merge=True)
    assert equal(model, before)
    assert model.get_model_status().merged_adapters == []
    assert model.get_nb_trainable_parameters()[0] == 200


def test_a_failed_merge_preserves_earlier_merges():
    model = trained("bert")
    model.add_adapter("broken", IntrinsicConfig(d=20, target_modules="all"))
    model.merge_adapter(["default"])
    before, expected = values(model), evaluate(model, "bert")
    model.get_base_model().intrinsic.intrinsic_theta["broken"].weight.data.fill_(float("nan"))
    with (
        pytest.warns(UserWarning, match="already|Already"),
        pytest.raises(ValueError, match="The adapter broken seems to be broken"),
    ):
        model.merge_adapter(["broken"], safe_merge=True)
    assert equal(model, before)
    assert torch.equal(evaluate(model, "bert"), expected)
    assert model.get_model_status().merged_adapters == ["default"]


@pytest.mark.slow
def test_several_adapters_merge_together_or_one_after_the_other(family):
    model = trained(family)
    model.add_adapter("second", IntrinsicConfig(d=31, seed=5, said=True, init_weights=False, target_modules="all"))
    model.base_model.set_adapter(["default", "second"])
    before, expected = values(model), evaluate(model, family)
    model.merge_adapter(["default", "second"])
    torch.testing.assert_close(evaluate(model, family), expected, **CLOSE)
    model.unmerge_adapter()
    assert equal(model, before)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="Already following adapters were merged default"):
        model.merge_adapter(["second"])
    torch.testing.assert_close(evaluate(model, family), expected, **CLOSE)
    model.unmerge_adapter()
    assert equal(model, before)
    assert same(evaluate(model, family), expected, family)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_warns_of_the_fraction_lost_to_rounding(dtype):
    """Compare the fraction in the warning with one computed from the weights."""
    model = get_peft_model(build("llama").to(dtype), IntrinsicConfig(d=200, target_modules="all"))
    theta = model.get_base_model().intrinsic.intrinsic_theta["default"].weight
    with torch.no_grad():
        theta.copy_(torch.randn(200, generator=torch.Generator().manual_seed(0)) * 1e-6)
    before = values(model)
    wanted = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for layer in model.base_model.tuner_layers():
        for own in layer.offsets.get("default", {}):
            wanted[names[id(layer.base_parameter(own))]] = layer.get_delta_weight("default", own).detach()
    with pytest.warns(UserWarning, match="preserved .*% of the offset's norm.*float32") as caught:
        model.merge_adapter()
    after = values(model)
    lost = sum((after[n].double() - before[n].double() - wanted[n]).square().sum() for n in before if n in wanted)
    whole = sum(wanted[n].double().square().sum() for n in before if n in wanted)
    share = 1 - (lost / whole).sqrt().item()
    assert share < 0.95
    assert f"preserved {max(share, 0):.0%}" in str(caught[0].message)
    model.unmerge_adapter()
    assert equal(model, before)


def test_merging_in_float32_does_not_warn(family):
    model = trained(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_and_unload(safe_merge=True)


def test_unmerge_works_after_the_dtype_changed():
    model = trained("bert")
    original = values(model)
    model.merge_adapter()
    model.double()
    model.unmerge_adapter()
    assert all(torch.equal(p, original[name].double()) for name, p in values(model).items())


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "custom"])
def test_merging_some_rows_at_a_time_gives_the_same_weights(name, monkeypatch):
    results = []
    for step in (7, 2**20):
        monkeypatch.setattr("peft_intrinsic.tuner.merging.STEP", step)
        model = trained(name)
        model.merge_adapter()
        results.append(values(model))
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=1e-5, atol=1e-6)


def test_a_layer_that_fails_to_merge_is_unchanged():
    model = trained("llama", target_modules=["q_proj"])
    (layer, *_) = model.base_model.tuner_layers()
    before = layer.base_layer.weight.clone()
    layer.vector.intrinsic_theta["default"].weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="The adapter default seems to be broken"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged


def test_merging_an_unknown_adapter_raises_and_changes_nothing():
    model = trained("bert")
    with pytest.raises(ValueError, match="adapter='typo' is not attached"):
        model.merge_adapter(["typo"])
    assert model.get_model_status().merged_adapters == []
