"""Quantized bases: 8 and 4 bits of bitsandbytes, int8 of torchao, and unsupported linear layers."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import batch, build, evaluate, train
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from peft_intrinsic import IntrinsicConfig

WIDE = LlamaConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)
KINDS = ["bnb 8 bit", "bnb 4 bit", "torchao"]
LINEAR = {"target_modules": "all-linear"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wide")
    LlamaForCausalLM(WIDE).save_pretrained(folder)
    return str(folder)


def quantized(kind: str, checkpoint: str) -> nn.Module:
    if kind.startswith("bnb"):
        pytest.importorskip("bitsandbytes")
        bits = (
            {"load_in_8bit": True} if "8" in kind else {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
        )
        settings = BitsAndBytesConfig(**bits)
    else:
        torchao = pytest.importorskip("torchao")
        settings = TorchAoConfig(torchao.quantization.Int8WeightOnlyConfig(version=2))
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=settings, device_map="cpu", dtype=torch.float32
    ).eval()


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def attached(kind: str, checkpoint: str, **options) -> PeftModel:
    base = quantized(kind, checkpoint)
    torch.manual_seed(1)  # of θ
    return get_peft_model(base, IntrinsicConfig(d=60, **{**LINEAR, **options})).eval()


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["all-linear", "all"])
def test_inference_adds_the_same_offset_as_on_the_plain_base(kind, checkpoint, targets, tmp_path):
    """The output of a quantized linear layer changes by x ΔWᵀ, with ΔW of the model in full precision."""
    model = attached(kind, checkpoint, init_weights=False, target_modules=targets)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    torch.manual_seed(1)
    plain = get_peft_model(plain, IntrinsicConfig(d=60, init_weights=False, target_modules=targets))
    path = "model.layers.1.mlp.up_proj"
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    layer = model.get_base_model().get_submodule(path)
    delta = plain.get_base_model().get_submodule(path).get_delta_weight("default").detach()
    with torch.no_grad():
        moved = layer(x) - layer.base_layer(x)
    torch.testing.assert_close(moved, x @ delta.T, rtol=1e-3, atol=1e-4)
    # The same adapter on both bases.
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(kind, checkpoint), tmp_path).eval()
    assert torch.equal(evaluate(loaded, "llama"), evaluate(model, "llama"))
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path)


def test_training_on_a_quantized_base_learns(kind, checkpoint):
    base = prepare_model_for_kbit_training(quantized(kind, checkpoint), use_gradient_checkpointing=False)
    model = get_peft_model(base, IntrinsicConfig(d=60, **LINEAR))
    theta = model.get_base_model().intrinsic.intrinsic_theta["default"].weight
    assert theta.dtype == torch.float32
    ids = batch("llama")["input_ids"]
    losses = train(model, {"input_ids": ids, "labels": ids}, 15, 2e-4)
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("options", [{}, {"serving": "lora"}])
def test_the_defaults_of_a_decoder_learn_on_a_quantized_base(kind, checkpoint, options):
    """Attaching them runs the base model, which must not change its 4-bit weights."""
    model = get_peft_model(quantized(kind, checkpoint), IntrinsicConfig(d=64, task_type="CAUSAL_LM", **options))
    assert not any(module.training for module in model.get_base_model().model.layers.modules())
    assert model.peft_config["default"].projection in ("value_bias", "value_lora")
    ids = batch("llama")["input_ids"]
    losses = train(model, {"input_ids": ids, "labels": ids}, 15, 2e-3)
    assert losses[-1] < losses[0] - 0.01


@pytest.mark.filterwarnings("ignore:Rounding to the base model's precision")
def test_merge_then_unmerge_restores_quantized_weights_bitwise(kind, checkpoint):
    model = attached(kind, checkpoint)
    with torch.no_grad():
        theta = model.get_base_model().intrinsic.intrinsic_theta["default"].weight
        theta.copy_(torch.randn(60, generator=torch.Generator().manual_seed(0)) / 500)
    expected = evaluate(model, "llama")
    with model.disable_adapter():
        base = evaluate(model, "llama")
    model.merge_adapter(safe_merge=True)
    merged = evaluate(model, "llama")
    # Quantizing again changes every weight by up to half a step.
    assert (merged - expected).norm() < 0.35 * (base - expected).norm()
    model.unmerge_adapter()
    assert torch.equal(evaluate(model, "llama"), expected)
    with model.disable_adapter():
        assert torch.equal(evaluate(model, "llama"), base)
    unloaded = model.merge_and_unload()
    assert torch.equal(evaluate(unloaded, "llama"), merged)


@pytest.mark.filterwarnings("ignore:Rounding to the base model's precision")
def test_merging_measures_the_rounding_error(kind, checkpoint):
    """Weights are read off a layer's own output, those before the merge on a model of their own."""
    path = "model.layers.1.mlp.up_proj"
    model = attached(kind, checkpoint, init_weights=False, target_modules=["up_proj"])
    layer, plain = model.get_base_model().get_submodule(path), quantized(kind, checkpoint).get_submodule(path)
    model.merge_adapter()
    with torch.no_grad():
        offset = layer.get_delta_weight("default")
        gone = layer.base_layer(torch.eye(64)).T - plain(torch.eye(64)).T - offset
    lost, whole = map(float, layer.rounding)
    assert whole == pytest.approx(float(offset.square().sum()), rel=1e-4)
    assert lost == pytest.approx(float(gone.square().sum()), rel=0.02)


class CodeBookLinear(nn.Module):
    """A quantized linear layer of a library that neither PEFT nor this package supports."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        steps = linear.weight.abs().max() / 127
        self.register_buffer("steps", steps)
        self.weight = nn.Parameter((linear.weight / steps).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.steps)


def unknown() -> nn.Module:
    model = build("llama")
    for block in model.model.layers:
        block.mlp.up_proj = CodeBookLinear(block.mlp.up_proj)
    return model


def test_unsupported_quantized_layers_stay_frozen_and_are_reported(caplog):
    """Their weight cannot be read, and whether they compute x·Wᵀ is not known."""
    with pytest.raises(ValueError, match=r"target_modules=.*up_proj.* matched no module with parameters of its own"):
        get_peft_model(unknown(), IntrinsicConfig(d=60, target_modules=["up_proj"]))
    with caplog.at_level(logging.INFO):
        model = get_peft_model(unknown(), IntrinsicConfig(d=60, init_weights=False, target_modules="all")).eval()
    assert "layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight" in caplog.text
    expected = evaluate(model, "llama")
    assert (expected - evaluate(unknown(), "llama")).abs().max() > 1e-3
    torch.testing.assert_close(evaluate(model.merge_and_unload(), "llama"), expected, rtol=1e-4, atol=1e-5)


def test_a_merge_that_fails_at_a_quantized_layer_changes_nothing(checkpoint, monkeypatch):
    """A backend that cannot write, as PEFT has for some types of torchao."""
    model = attached("bnb 8 bit", checkpoint, init_weights=False, target_modules="all")
    expected = evaluate(model, "llama")
    monkeypatch.setattr("peft.utils.quantization_utils.Bnb8bitBackend.supports_merge", False)
    with pytest.raises(ValueError, match=r"Cannot merge into the weight of a Linear8bitLt.*without quantization"):
        model.merge_and_unload()
    assert torch.equal(evaluate(model, "llama"), expected)


def test_added_biases_of_quantized_layers_merge_and_unmerge(kind, checkpoint):
    """Only the bias, which is not quantized: merged, it has the same values."""
    model = attached(kind, checkpoint, init_weights=False, target_modules="norms-and-biases", add_bias=True)
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.base_layer(x)  # bitsandbytes may repack its weights at the first use
        plain, moved = layer.base_layer(x), layer(x)
        torch.testing.assert_close(moved, plain + layer.get_delta_weight("default", "bias"), rtol=1e-5, atol=1e-5)
        model.merge_adapter()
        torch.testing.assert_close(layer.base_layer(x), moved, rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()
    assert layer.base_layer.bias is None
    assert torch.equal(layer.base_layer(x), plain)


def test_directions_of_value_biases_are_those_of_the_dequantized_base(kind, checkpoint):
    """The layers themselves dequantize: their outputs of unit vectors are the columns of their weights."""
    options = {"projection": "value_bias", "target_modules": None, "init_weights": False}
    model, plain = attached(kind, checkpoint, **options), AutoModelForCausalLM.from_pretrained(checkpoint)
    pairs = list(zip(model.get_base_model().model.layers, plain.model.layers, strict=True))
    with torch.no_grad():
        for layer, exact in pairs:
            for name in (name for name, module in exact.named_modules() if isinstance(module, torch.nn.Linear)):
                module, weight = layer.get_submodule(name), exact.get_submodule(name).weight
                weight.copy_(getattr(module, "base_layer", module)(torch.eye(weight.shape[1])).T)
    torch.manual_seed(1)
    plain = get_peft_model(plain, IntrinsicConfig(d=60, **options))
    for layer, exact in pairs:
        offset, expected = (each.self_attn.v_proj.get_delta_weight("default", "bias") for each in (layer, exact))
        assert (offset - expected).norm() < 0.02 * expected.norm()
    x = batch("llama")["input_ids"]
    layer = model.get_base_model().model.layers[0].self_attn.v_proj
    hidden = torch.randn(*x.shape, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        added = layer(hidden) - layer.base_layer(hidden)
    torch.testing.assert_close(added, layer.get_delta_weight("default", "bias").expand_as(added), rtol=1e-4, atol=1e-5)
