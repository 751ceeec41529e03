"""Offsets, outputs and gradients against an independent model whose weights are W0 + P θ, P made column by column."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest
import torch
from conftest import batch, build, output, same
from peft import get_peft_model
from torch import nn

import peft_intrinsic  # noqa: F401
from peft_intrinsic import IntrinsicConfig

RTOL = 2e-4  # float32 through a whole model, relative to the largest entry


def offsets(model: nn.Module) -> dict[str, torch.Tensor]:
    """ΔW of every parameter under its name in the base model, read off by merging."""
    merged = get_plain(model, merge=True)
    plain = get_plain(model, merge=False)
    return {name: merged[name] - plain[name] for name in plain}


def get_plain(model: nn.Module, merge: bool) -> dict[str, torch.Tensor]:
    if merge:
        model.merge_adapter()
    values = {
        name.replace(".base_layer", ""): value.detach().clone()
        for name, value in model.get_base_model().named_parameters()
        if not name.startswith("intrinsic.")
    }
    if merge:
        model.unmerge_adapter()
    return values


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= RTOL * b.abs().max().clamp(min=1e-6))


@pytest.mark.slow
@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize(("projection", "block_size"), [("fastfood", 16), ("dense", None)])
def test_gradient_is_the_transposed_projection_of_the_full_gradient(family, said, projection, block_size):
    d = 23
    config = IntrinsicConfig(
        d=d, said=said, projection=projection, init_weights=False, block_size=block_size, target_modules="all"
    )
    model = get_peft_model(build(family), config).eval()
    inputs = batch(family)
    holder = model.get_base_model().intrinsic
    theta = holder.intrinsic_theta["default"].weight
    scales = holder.intrinsic_lambda["default"].weight if said else None
    with torch.no_grad():
        theta.mul_(0.3)
        if said:
            scales.copy_(torch.linspace(0.5, 1.5, len(scales)) / 256)
    moved = offsets(model)
    plain = get_plain(model, merge=False)

    # An independent full model at the same point.
    full = build(family).requires_grad_(True)  # Whisper's positions are frozen from the start
    full.load_state_dict({n: plain[n] + moved[n] for n in plain}, strict=False)
    weights = torch.randn(output(full, inputs).shape, generator=torch.Generator().manual_seed(2))
    expected = output(full, inputs)
    assert close(output(model, inputs), expected)
    (expected * weights).sum().backward()
    full_gradient = {name: p.grad for name, p in full.named_parameters() if p.grad is not None}
    (output(model, inputs) * weights).sum().backward()

    # The columns of P: the offset for a unit vector θ. Everything is linear in θ, and in λ.
    trained = [theta, scales] if said else [theta]
    for parameter in trained:
        for j in range(len(parameter)):
            saved = parameter.detach().clone()
            with torch.no_grad():
                parameter.zero_()
                parameter[j] = 1.0
            column = offsets(model)
            with torch.no_grad():
                parameter.copy_(saved)
            slope = sum((full_gradient[n].double() * column[n].double()).sum() for n in full_gradient)
            scale = parameter.grad.abs().max().clamp(min=1e-6)
            assert abs(parameter.grad[j] - slope) <= 2e-3 * scale, (j, parameter.grad[j], slope)


def test_every_parameter_is_adapted(family):
    model = get_peft_model(build(family), IntrinsicConfig(d=30, init_weights=False, target_modules="all"))
    still = [name for name, offset in offsets(model).items() if not offset.abs().max() > 0]
    assert still == []


def test_the_global_projection_is_that_of_the_paper():
    """DID of the paper: every weight mixes all of θ, and P preserves norms over the whole model."""
    d = 200
    paper = {"target_modules": "all", "projection": "global", "scale": "isometric", "block_size": 256}
    model = get_peft_model(build("bert"), IntrinsicConfig(d=d, **paper))
    theta = model.get_base_model().intrinsic.intrinsic_theta["default"].weight
    for seed in range(3):
        with torch.no_grad():
            theta.copy_(torch.randn(d, generator=torch.Generator().manual_seed(seed)))
        moved = offsets(model)
        length = sum(offset.double().square().sum() for offset in moved.values()).sqrt()
        assert 0.85 < length / theta.norm() < 1.15  # 13,000 weights for 200 parameters
        assert all(offset.count_nonzero() == offset.numel() for offset in moved.values())


def test_the_default_adapts_norms_biases_and_head(family):
    """The offsets of the default, factored against merged; each tensor has entries of its own."""
    base = build(family)
    vectors = {name for name, p in base.named_parameters() if p.dim() < 2}
    if not vectors:
        pytest.skip("no norms and no biases")
    model = get_peft_model(
        base, IntrinsicConfig(d=min(len(vectors), 20), target_modules="norms-and-biases", init_weights=False)
    )
    moved = offsets(model.eval())
    assert {name for name, offset in moved.items() if offset.any()} == vectors
    expected = output(model, batch(family))
    model.merge_adapter()
    assert close(output(model, batch(family)), expected)


def test_at_theta_zero_the_output_is_the_base_s_bitwise(family):
    expected = output(build(family), batch(family))
    for said in (False, True):
        model = get_peft_model(build(family), IntrinsicConfig(d=30, said=said, target_modules="all")).eval()
        assert same(output(model, batch(family)), expected, family)


def test_exactly_d_parameters_are_trainable(family, capsys):
    for said in (False, True):
        model = get_peft_model(build(family), IntrinsicConfig(d=200, said=said, target_modules="all"))
        assert model.get_nb_trainable_parameters()[0] == 200
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 200
        model.print_trainable_parameters()
        assert "trainable params: 200 " in capsys.readouterr().out


@pytest.mark.parametrize("reentrant", [True, False])
def test_reentrant_checkpointing_in_several_processes_raises_in_training(reentrant, monkeypatch):
    model = get_peft_model(build("llama"), IntrinsicConfig(d=30, target_modules="all"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    processes = [1]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes[0])
    for count, training in itertools.product((1, 2), (True, False)):
        processes[0] = count
        wrong = reentrant and training and count > 1
        with pytest.raises(RuntimeError, match="Reentrant gradient checkpointing") if wrong else nullcontext():
            model.train(training)(**batch("llama"))
