"""Merging, disabling, several adapters, deletion, and the other calls that users of PEFT know."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import batch, build, evaluate, output
from peft import PeftModel, PeftType, get_peft_model
from test_save_load import trained
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
    assert torch.equal(evaluate(model, family), expected)


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
    assert torch.equal(evaluate(plain, family), evaluate(merged, family))


@torch.no_grad()
def test_unload_restores_the_base(family):
    expected = evaluate(build(family), family)
    assert torch.equal(evaluate(trained(family).unload(), family), expected)


@torch.no_grad()
def test_disable(family):
    expected = evaluate(build(family), family)
    model = trained(family)
    adapted = evaluate(model, family)
    assert not torch.allclose(adapted, expected, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(evaluate(model, family), expected)
        with model.disable_adapter():
            assert torch.equal(evaluate(model, family), expected)
    assert torch.equal(evaluate(model, family), adapted)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(evaluate(model, family), expected)


@torch.no_grad()
def test_several_adapters(family):
    """Different d, seed and targets; switching, both at once, deletion."""
    model = trained(family)
    first = evaluate(model, family)
    targets = {"custom": ["head.0", "norm"]}.get(family, "all-linear")
    second = IntrinsicConfig(d=31, seed=5, said=True, target_modules=targets, init_weights=False)
    model.add_adapter("second", second)
    assert torch.equal(evaluate(model, family), first)
    model.set_adapter("second")
    alone = get_peft_model(build(family), copy.copy(second)).eval()
    assert torch.equal(evaluate(model, family), evaluate(alone, family))
    model.base_model.set_adapter(["default", "second"])
    both = evaluate(model, family)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(evaluate(merged, family), both, **CLOSE)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(evaluate(model, family), first)
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


@torch.no_grad()
def test_safe_merge_refuses_nan():
    model = trained("bert")
    model.get_base_model().intrinsic.intrinsic_theta["default"].weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.merge_and_unload(safe_merge=True)


@torch.no_grad()
def test_fast_path_of_torch_encoders_is_not_silently_unadapted():
    """In evaluation without gradients torch's encoder layer reads the weights of its children itself."""
    for targets in (None, ["linear1"], ["self_attn"], ["out_proj"], ["norm1"]):
        model = trained("custom", target_modules=targets)
        adapted = evaluate(model, "custom")
        with torch.enable_grad():
            slow = evaluate(model, "custom")
        torch.testing.assert_close(adapted, slow, **CLOSE)
        assert not torch.allclose(adapted, evaluate(build("custom"), "custom"), atol=1e-5)


@torch.no_grad()
def test_tied_weights_move_together():
    """Targeting one of a tied pair moves the other: merging does not change the model, and the tie holds."""
    model = trained("llama", target_modules=["embed_tokens"])
    expected = evaluate(model, "llama")
    merged = model.merge_and_unload()
    torch.testing.assert_close(evaluate(merged, "llama"), expected, **CLOSE)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


@torch.no_grad()
def test_bfloat16_base_moves_below_its_rounding_step():
    """W0 + ΔW would round the offset away; the factored form does not."""
    model = get_peft_model(build("llama").bfloat16(), IntrinsicConfig(d=200, target_modules="all-linear")).eval()
    base = evaluate(model, "llama")
    theta = model.get_base_model().intrinsic.intrinsic_theta["default"].weight
    assert theta.dtype == torch.float32
    theta.copy_(torch.randn(200, generator=torch.Generator().manual_seed(0)) * 1e-5)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    weight, delta = layer.base_layer.weight, layer.get_delta_weight("default")
    assert (weight + delta.bfloat16() == weight).float().mean() > 0.9
    assert not torch.equal(evaluate(model, "llama"), base)


def test_dtype_without_autocast_is_the_base_dtype():
    model = get_peft_model(build("bert").bfloat16(), IntrinsicConfig(d=20, said=True), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    output(model, batch("bert")).sum().backward()


def test_mixed_batches_are_refused():
    with pytest.raises(ValueError, match="adapter_names"):
        trained("bert")(**batch("bert"), adapter_names=["default"] * 4)


def test_deepcopy_does_not_alias():
    model = trained("custom")
    copied = copy.deepcopy(model)
    expected = evaluate(model, "custom")
    copied.get_base_model().intrinsic.intrinsic_theta["default"].weight.data.zero_()
    assert torch.equal(evaluate(model, "custom"), expected)
    assert torch.equal(evaluate(copied, "custom"), evaluate(build("custom"), "custom"))
