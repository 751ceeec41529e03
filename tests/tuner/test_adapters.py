"""Merging, disabling, several adapters, deletion, and the other calls that users of PEFT know."""

from __future__ import annotations

import copy

import torch
from conftest import build, evaluate, same, trained
from peft import PeftModel, PeftType, get_peft_model
from torch import nn

import peft_intrinsic
from peft_intrinsic import IntrinsicConfig

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_registration_is_idempotent():
    peft_intrinsic.register()
    assert PeftType("INTRINSIC") is PeftType.INTRINSIC
    assert "INTRINSIC" in [member.value for member in PeftType]


@torch.no_grad()
def test_merge_and_unmerge(family):
    model = trained(family)
    before, expected = parameters(model), evaluate(model, family)
    model.merge_adapter()
    torch.testing.assert_close(evaluate(model, family), expected, **CLOSE)
    model.unmerge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in parameters(model).items())
    assert same(evaluate(model, family), expected, family)


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
def test_disable(family):
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


@torch.no_grad()
def test_several_adapters(family):
    """Different d, seed and targets; switching, both at once, deletion."""
    model = trained(family)
    first = evaluate(model, family)
    targets = {"custom": ["head.0", "norm"]}.get(family, "all-linear")
    second = IntrinsicConfig(d=31, seed=5, said=True, target_modules=targets, init_weights=False)
    model.add_adapter("second", second)
    assert same(evaluate(model, family), first, family)
    model.set_adapter("second")
    alone = get_peft_model(build(family), copy.copy(second)).eval()
    assert same(evaluate(model, family), evaluate(alone, family), family)
    model.base_model.set_adapter(["default", "second"])
    both = evaluate(model, family)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(evaluate(merged, family), both, **CLOSE)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert same(evaluate(model, family), first, family)
    assert model.get_model_status().available_adapters == ["default"]


def test_trained_numbers_follow_the_active_adapter():
    model = get_peft_model(build("bert"), IntrinsicConfig(d=20))
    model.add_adapter("second", IntrinsicConfig(d=31, said=True))
    assert model.get_nb_trainable_parameters()[0] == 20
    model.set_adapter("second")
    assert model.get_nb_trainable_parameters()[0] == 31
    assert model.get_model_status().requires_grad == {"default": False, "second": True}


def test_adapters_keep_their_names_when_loaded_under_another(tmp_path):
    model = trained("bert")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path, adapter_name="renamed")
    loaded.load_adapter(str(tmp_path), "again")
    expected = evaluate(model, "bert")
    for name in ("renamed", "again"):
        loaded.set_adapter(name)
        assert torch.equal(evaluate(loaded.eval(), "bert"), expected)


@torch.no_grad()
def test_a_configuration_serves_two_models():
    config = IntrinsicConfig(d=20)
    get_peft_model(build("bert"), config)
    get_peft_model(build("gpt2"), config)
    assert config.manifest is None
    assert config.block_size is None
