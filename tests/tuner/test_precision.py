"""Precision: float32 θ under autocast, half-precision bases, and offsets far below a weight's rounding step."""

from __future__ import annotations

import pytest
import torch
from conftest import batch, build, evaluate, output, train
from peft import get_peft_model

from peft_intrinsic import IntrinsicConfig

HALVES = [torch.bfloat16, torch.float16]


@torch.no_grad()
def test_offsets_below_the_rounding_step_have_an_effect():
    """W0 + ΔW would round the offset away; the factored form does not."""
    model = get_peft_model(build("llama").bfloat16(), IntrinsicConfig(d=200, target_modules="all-linear")).eval()
    base = evaluate(model, "llama")
    theta = model.get_base_model().intrinsic.intrinsic_theta["default"].weight
    assert theta.dtype == torch.float32
    theta.copy_(torch.randn(200, generator=torch.Generator().manual_seed(0)) * 1e-7)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    weight, delta = layer.base_layer.weight, layer.get_delta_weight("default")
    assert (weight + delta.bfloat16() == weight).float().mean() > 0.9
    assert not torch.equal(evaluate(model, "llama"), base)


def test_without_autocast_theta_has_the_dtype_of_the_base():
    model = get_peft_model(
        build("bert").bfloat16(), IntrinsicConfig(d=20, said=True, target_modules="all"), autocast_adapter_dtype=False
    )
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    output(model, batch("bert")).sum().backward()


IDS = batch("llama")["input_ids"]
INPUTS = {"input_ids": IDS, "labels": IDS}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", "all"])
def test_half_precision_learns_like_float32(dtype, autocast, targets):
    """θ stays float32, under autocast and on a base of half precision; the losses follow those of float32."""
    base = build("llama")
    model = get_peft_model(base if autocast else base.to(dtype), IntrinsicConfig(d=60, target_modules=targets))
    found = train(model, INPUTS, 12, 4e-4, lambda: torch.autocast("cpu", dtype, enabled=autocast))
    theta = model.get_base_model().intrinsic.intrinsic_theta["default"].weight
    assert theta.dtype == torch.float32
    reference = get_peft_model(build("llama"), IntrinsicConfig(d=60, target_modules=targets))
    expected = train(reference, INPUTS, 12, 4e-4)
    assert expected[-1] < expected[0] - 0.1
    assert found == pytest.approx(expected, abs=0.1 * (expected[0] - expected[-1]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
def test_steps_below_the_rounding_step_are_learned(dtype):
    """Steps of 1e-9 would change no weight of the base, and still θ goes the way that it goes in float64."""
    learnt = {}
    for kind in (dtype, torch.float64):
        model = get_peft_model(build("llama").to(kind), IntrinsicConfig(d=60, target_modules="all-linear"))
        layer = model.get_base_model().model.layers[0].mlp.up_proj
        train(model, INPUTS, 5, 1e-9)
        weight, delta = layer.base_layer.weight.data, layer.get_delta_weight("default").detach()
        assert (weight + delta.to(kind) == weight).float().mean() > (0.97 if kind == dtype else -1)
        learnt[kind] = model.get_base_model().intrinsic.intrinsic_theta["default"].weight.detach().double()
    assert learnt[dtype].abs().min() > 1e-10
    cosine = torch.nn.functional.cosine_similarity(learnt[dtype], learnt[torch.float64], dim=0)
    assert cosine > 0.9


@pytest.mark.parametrize("targets", ["all-linear", "all"])
def test_no_copy_of_the_input_in_another_dtype_is_stored(targets):
    """Of a bfloat16 model, backward needs the inputs as they are."""
    model = get_peft_model(build("llama").bfloat16(), IntrinsicConfig(d=60, target_modules=targets))
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    layer = model.get_base_model().model.layers[0].mlp.up_proj
    x = torch.randn(5, 7, 24, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in kept)
    assert not any(tensor.dtype == torch.float32 and tensor.numel() == x.numel() for tensor in kept)
