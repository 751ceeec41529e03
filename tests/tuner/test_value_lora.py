"""Value biases as weights of rank one: the inputs that are measured, and the calls that need a LoRA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from conftest import SIZES, batch, build, evaluate, output, train
from helpers.oracle import words
from peft import PeftModel, get_peft_model
from torch import nn

from peft_intrinsic import AdapterBank, IntrinsicConfig, convert_to_lora, save_as_lora
from peft_intrinsic.codec import compress, load_packed

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
ROUNDED = {"rtol": 1e-3, "atol": 2e-4}  # θ as float16
D = 20
VALUES = {"llama": "model.layers.{}.self_attn.v_proj", "gpt2": "transformer.h.{}.attn.c_attn"}


def adapted(family: str = "llama", base: nn.Module | None = None, **options) -> PeftModel:
    """An adapter with a random θ, the same at every call."""
    base = base or build(family)
    torch.manual_seed(1)
    return get_peft_model(
        base, IntrinsicConfig(**{"d": D, "projection": "value_lora", "init_weights": False, **options})
    ).eval()


def offset_of(model: PeftModel, name: str, own: str) -> torch.Tensor:
    layer = model.get_base_model().get_submodule(name)
    return layer.get_delta_weight(layer.active_adapters[0], own).detach()


@torch.no_grad()
def inputs_of(model: nn.Module, name: str, ids: torch.Tensor) -> torch.Tensor:
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, result: seen.append(args[0]))
    model(input_ids=ids)
    handle.remove()
    return seen[0].flatten(0, -2).double()


@pytest.mark.parametrize("family", VALUES)
def test_the_weight_is_the_bias_times_a_ridge_regression_of_one_on_the_inputs(family):
    base = build(family)
    vocabulary = 64  # a power of two, at most the vocabulary
    ids = torch.tensor([word % vocabulary for word in words(0, "tokens", "", 512)]).view(8, 64)
    model, biases = adapted(family), adapted(family, projection="value_bias")
    for name in (VALUES[family].format(i) for i in range(2)):
        x = inputs_of(base, name, ids).numpy()
        gram = x.T @ x
        direction = np.linalg.solve(gram + 0.01 * np.trace(gram) / len(gram) * np.eye(len(gram)), x.sum(0))
        expected = torch.from_numpy(np.outer(offset_of(biases, name, "bias"), direction))
        expected = expected.T if family == "gpt2" else expected
        torch.testing.assert_close(offset_of(model, name, "weight").double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", VALUES)
def test_training_learns_and_a_saved_adapter_loads(family, tmp_path):
    model = adapted(family, init_weights=True, task_type="CAUSAL_LM")
    assert torch.equal(evaluate(model, family), evaluate(build(family), family))
    ids = batch(family)["input_ids"]
    losses = train(model, {"input_ids": ids, "labels": ids}, 12, 2e-3)
    assert losses[-1] < losses[0] - 0.01
    model.eval().save_pretrained(tmp_path)
    expected = evaluate(model, family)
    loaded = PeftModel.from_pretrained(build(family), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(evaluate(loaded, family), expected)
    loaded = load_packed(build(family), compress(model, levels=256)).eval()
    torch.testing.assert_close(evaluate(loaded, family), expected, **ROUNDED)


@pytest.mark.parametrize("family", VALUES)
def test_it_is_exactly_a_lora_of_rank_one(family, tmp_path):
    model = adapted(family)
    expected = evaluate(model, family)
    assert (expected - evaluate(build(family), family)).abs().max() > 1e-3
    assert convert_to_lora(model)[0].r == 1
    save_as_lora(tmp_path, model)
    loaded = PeftModel.from_pretrained(build(family), tmp_path).eval()
    torch.testing.assert_close(evaluate(loaded, family), expected, **CLOSE)


def test_it_merges_into_a_class_without_biases():
    torch.manual_seed(0)
    model = adapted(base=transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, num_key_value_heads=2)))
    expected = evaluate(model, "llama")
    torch.testing.assert_close(evaluate(model.merge_and_unload(), "llama"), expected, **CLOSE)


def test_samples_of_a_batch_can_have_different_adapters():
    model, inputs = adapted(), batch("llama")
    rows = torch.randn(3, D, generator=torch.Generator().manual_seed(2)) / 500
    with AdapterBank(model, rows).select([0, 2, 1, -1]), torch.no_grad():
        mixed = output(model, inputs)
    for sample, row in enumerate([rows[0], rows[2], rows[1], torch.zeros(D)]):
        model.base_model.vector.intrinsic_theta["default"].weight.data.copy_(row)
        torch.testing.assert_close(mixed[sample], evaluate(model, "llama")[sample], **CLOSE)


def test_other_adapters_and_dropout_do_not_change_the_measured_inputs():
    expected = offset_of(adapted(), VALUES["llama"].format(1), "weight")
    base = build("llama")
    base.config.attention_dropout = 0.5
    model = get_peft_model(base, IntrinsicConfig(d=50, target_modules="all", init_weights=False)).train()
    torch.manual_seed(1)
    model.add_adapter("second", IntrinsicConfig(d=D, projection="value_lora", init_weights=False))
    assert all(module.training for module in model.modules())
    assert not any(layer.disable_adapters for layer in model.base_model.tuner_layers())
    model.set_adapter("second")
    assert torch.equal(offset_of(model, VALUES["llama"].format(1), "weight"), expected)
