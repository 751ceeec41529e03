"""Merging, disabling, several adapters, deletion, and the other calls that users of PEFT know."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import batch, build, evaluate, output, same, trained
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import save_and_load
from torch import nn

from peft_intrinsic import IntrinsicConfig

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.skipif(not hasattr(save_and_load, "get_base_model_state_dict"), reason="this PEFT has no such call")
def test_the_state_dict_of_the_base_contains_nothing_of_the_adapter():
    state = save_and_load.get_base_model_state_dict(trained("bert", said=True))
    plain = build("bert").state_dict()
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[name], plain[name]) for name in plain)


@pytest.mark.slow
@torch.no_grad()
def test_merge_then_unmerge_restores_base_weights_bitwise(family):
    model = trained(family)
    before, expected = parameters(model), evaluate(model, family)
    model.merge_adapter()
    torch.testing.assert_close(evaluate(model, family), expected, **CLOSE)
    model.unmerge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in parameters(model).items())
    assert same(evaluate(model, family), expected, family)


@pytest.mark.slow
@torch.no_grad()
def test_merge_and_unload_gives_the_plain_model(family):
    model = trained(family, said=True)
    expected = evaluate(model, family)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(evaluate(merged, family), expected, **CLOSE)
    plain = build(family)
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [type(m) for m in merged.modules()] == [type(m) for m in plain.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in merged.modules())
    plain.load_state_dict(merged.state_dict())
    assert same(evaluate(plain, family), evaluate(merged, family), family)


@torch.no_grad()
def test_unload_restores_the_base(family):
    expected = evaluate(build(family), family)
    assert same(evaluate(trained(family).unload(), family), expected, family)


@torch.no_grad()
def test_disabled_adapters_give_the_output_of_the_base(family):
    expected = evaluate(build(family), family)
    model = trained(family)
    adapted = evaluate(model, family)
    assert not torch.allclose(adapted, expected, atol=1e-4)
    with model.disable_adapter():
        assert same(evaluate(model, family), expected, family)
        with model.disable_adapter():
            assert same(evaluate(model, family), expected, family)
    assert same(evaluate(model, family), adapted, family)
    model.merge_adapter()
    with model.disable_adapter():
        assert same(evaluate(model, family), expected, family)


@pytest.mark.slow
@torch.no_grad()
def test_adapters_can_be_added_switched_combined_and_deleted(family):
    """Different d, seed and targets; switching, both at once, deletion."""
    model = trained(family)
    first = evaluate(model, family)
    targets = {"custom": ["head.0", "norm"]}.get(family, "all-linear")
    second = IntrinsicConfig(d=31, seed=5, said=True, target_modules=targets, init_weights=False)
    torch.manual_seed(3)
    model.add_adapter("second", second)
    assert same(evaluate(model, family), first, family)
    model.set_adapter("second")
    base = build(family)
    torch.manual_seed(3)
    alone = get_peft_model(base, copy.copy(second)).eval()
    assert same(evaluate(model, family), evaluate(alone, family), family)
    model.base_model.set_adapter(["default", "second"])
    both = evaluate(model, family)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(evaluate(merged, family), both, **CLOSE)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert same(evaluate(model, family), first, family)
    assert model.get_model_status().available_adapters == ["default"]


def test_trainable_parameters_are_those_of_the_active_adapter():
    model = get_peft_model(build("bert"), IntrinsicConfig(d=20, target_modules="all"))
    model.add_adapter("second", IntrinsicConfig(d=31, said=True, target_modules="all"))
    assert model.get_nb_trainable_parameters()[0] == 20
    model.set_adapter("second")
    assert model.get_nb_trainable_parameters()[0] == 31
    assert model.get_model_status().requires_grad == {"default": False, "second": True}


def test_an_adapter_can_be_loaded_under_another_name(tmp_path):
    model = trained("bert")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path, adapter_name="renamed")
    loaded.load_adapter(str(tmp_path), "again")
    expected = evaluate(model, "bert")
    for name in ("renamed", "again"):
        loaded.set_adapter(name)
        assert torch.equal(evaluate(loaded.eval(), "bert"), expected)


@torch.no_grad()
def test_a_configuration_can_be_used_for_several_models():
    """It stores the options of the first model. The adapter of the second starts from the requested options."""
    config = IntrinsicConfig(d=20, target_modules="all-linear")
    first = get_peft_model(build("bert"), config)
    assert first.peft_config["default"] is config
    manifest = config.manifest
    second = get_peft_model(build("gpt2"), config)
    assert config.manifest == manifest
    assert second.peft_config["default"].manifest != manifest
    again = get_peft_model(build("bert"), config)
    assert again.peft_config["default"] is config


def several(**options) -> PeftModel:
    """Adapters of one projection, and two that fit no other."""
    options = {"target_modules": "all", **options}
    model = get_peft_model(build("llama"), IntrinsicConfig(d=60, **options))
    model.add_adapter("second", IntrinsicConfig(d=60, **options))
    model.add_adapter("wider", IntrinsicConfig(d=61, **options))
    model.add_adapter("elsewhere", IntrinsicConfig(d=60, seed=1, **options))
    generator = torch.Generator().manual_seed(0)
    for vector in model.get_base_model().intrinsic.intrinsic_theta.values():
        vector.weight.data = torch.randn(vector.weight.shape, generator=generator) / 500
    return model.eval()


@pytest.mark.parametrize("said", [False, True])
def test_weighted_sum_is_exact(said):
    """Against the weighted sum of the offsets themselves, read off the merged weights."""
    model = several(said=said)
    model.base_model.add_weighted_adapter(["default", "second"], [0.75, -2.0], "sum")
    plain = dict(build("llama").named_parameters())

    def offsets(name: str) -> dict[str, torch.Tensor]:
        model.set_adapter(name)
        merged = copy.deepcopy(model).merge_and_unload()
        return {key: p - plain[key] for key, p in merged.named_parameters()}

    one, two, both = (offsets(name) for name in ("default", "second", "sum"))
    for key, offset in both.items():
        torch.testing.assert_close(offset, 0.75 * one[key] - 2 * two[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["default", "wider"], [1, 1], "sum"), r"no exact sum.*d \(60 and 61\)"),
        ((["default", "elsewhere"], [1, 1], "sum"), r"no exact sum.*seed \(0 and 1\)"),
        ((["default", "absent"], [1, 1], "sum"), r"adapters=\['absent'\] are not attached"),
        ((["default", "second"], [1], "sum"), "must be as many"),
        ((["default", "second"], [1, math.nan], "sum"), r"weights=\[1, nan\] must be finite"),
        ((["default", "second"], [1, 1], "wider"), "adapter_name='wider' is taken"),
        ((["default", "second"], [1, 1], "sum", "svd"), "combination_type must be 'linear'"),
    ],
)
def test_sums_of_different_projections_raise(arguments, message):
    model = several()
    before = list(model.peft_config)
    with pytest.raises(ValueError, match=message):
        model.base_model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == before


def test_a_sum_that_cannot_be_attached_leaves_no_trace():
    model = several()
    with pytest.raises(ValueError, match="part of the keys"):
        model.base_model.add_weighted_adapter(["default", "second"], [1, 1], "intrinsic_theta")
    assert list(model.peft_config) == ["default", "second", "wider", "elsewhere"]


def test_sums_of_adapters_with_different_scales_raise():
    model = several(said=True)
    model.get_base_model().intrinsic.intrinsic_lambda["second"].weight.data[0] = 2.0
    with pytest.raises(ValueError, match=r"different λ.*set_adapter"):
        model.base_model.add_weighted_adapter(["default", "second"], [1, 1], "sum")


def test_adapters_are_frozen_and_unfrozen_by_name():
    model = several()
    thetas = model.get_base_model().intrinsic.intrinsic_theta
    assert {name for name, vector in thetas.items() if vector.weight.requires_grad} == {"default"}
    model.set_requires_grad("second")
    assert {name for name, vector in thetas.items() if vector.weight.requires_grad} == {"default", "second"}
    model.set_requires_grad(["default", "second"], requires_grad=False)
    assert model.get_nb_trainable_parameters()[0] == 0
    model.set_adapter("wider", inference_mode=True)
    assert model.get_nb_trainable_parameters()[0] == 0
    model.set_adapter("wider")
    assert model.get_nb_trainable_parameters()[0] == 61


def test_an_adapter_in_inference_mode_has_no_trainable_parameters():
    model = get_peft_model(build("bert"), IntrinsicConfig(d=20, inference_mode=True, target_modules="all"))
    assert model.get_nb_trainable_parameters()[0] == 0
    assert not any(p.requires_grad for p in model.parameters())


def test_model_and_layer_status_describe_the_adapters():
    model = several()
    model.base_model.set_adapter(["default", "second"])
    status = model.get_model_status()
    assert status.adapter_model_type == "IntrinsicModel"
    assert status.active_adapters == ["default", "second"]
    assert set(status.available_adapters) == {"default", "second", "wider", "elsewhere"}
    assert status.trainable_params == 120
    assert status.enabled is True
    model.merge_adapter(["second"])
    assert model.get_model_status().merged_adapters == ["second"]
    kinds = {layer.module_type for layer in model.get_layer_status()}
    assert kinds == {f"intrinsic.Intrinsic{kind}" for kind in ("Parameters", "Linear", "Embedding")}
    assert all(layer.merged_adapters == ["second"] for layer in model.get_layer_status())


def test_disabled_adapters_give_the_output_of_the_base_in_training_mode():
    """Dropout is seeded, so the output is bitwise that of the base model."""
    base, model = build("bert").train(), trained("bert").train()
    inputs = batch("bert")
    with model.disable_adapter():
        torch.manual_seed(1)
        found = output(model, inputs)
        assert not found.requires_grad
    torch.manual_seed(1)
    assert torch.equal(found, output(base, inputs))


def test_deleting_the_active_adapter_activates_another():
    model = several()
    model.set_adapter("second")
    with pytest.warns(UserWarning, match="second was active which is now deleted"):
        model.delete_adapter("second")
    assert "second" not in model.peft_config
    assert model.base_model.active_adapters != ["second"]
    output(model, batch("llama"))
    model.add_adapter("second", IntrinsicConfig(d=10, target_modules="all"))
    assert len(model.get_base_model().intrinsic.intrinsic_theta["second"].weight) == 10


def test_adapters_of_different_dtypes_can_be_active_together():
    model = get_peft_model(build("llama"), IntrinsicConfig(d=60, init_weights=False, target_modules="all"))
    small = IntrinsicConfig(d=31, init_weights=False, target_modules="all")
    model.add_adapter("small", small, autocast_adapter_dtype=False)
    model.base_model.set_adapter(["default", "small"])
    thetas = model.get_base_model().intrinsic.intrinsic_theta
    thetas["small"].to(torch.bfloat16)
    found = evaluate(model.eval(), "llama")
    merged = evaluate(copy.deepcopy(model).merge_and_unload(), "llama")
    base = evaluate(build("llama"), "llama")
    assert (found - merged).norm() < 0.03 * (merged - base).norm()


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_other_adapters_stay_trainable_or_frozen(tmp_path):
    model = get_peft_model(build("llama"), IntrinsicConfig(d=40, target_modules="all"))
    before = trainable(model)
    model.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), "reference")
    assert trainable(model) == before
    model.set_requires_grad("default", False)
    model.add_adapter("second", IntrinsicConfig(d=40, target_modules="all"))
    assert trainable(model) == set()


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_a_failed_attachment_leaves_no_trace():
    base = build("llama")
    before = trainable(base)
    with pytest.raises(ValueError, match="d=2 must exceed"):
        get_peft_model(base, IntrinsicConfig(d=2, said=True, target_modules="all"))
    assert trainable(base) == before
    inject_adapter_in_model(IntrinsicConfig(d=20, init_weights=False, target_modules="all"), base)
    expected = evaluate(base, "llama")
    with pytest.raises(ValueError, match="'default' is attached already"):
        inject_adapter_in_model(IntrinsicConfig(d=20, target_modules="all"), base)
    assert torch.equal(evaluate(base, "llama"), expected)
