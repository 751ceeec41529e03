"""Biases for linear layers that have none, against a model whose class has them."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import SIZES, batch, build, evaluate, output
from peft import PeftModel, get_peft_model
from torch.func import functional_call

from peft_intrinsic import AdapterBank, IntrinsicConfig

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def biased(family: str = "llama", **options) -> PeftModel:
    """An adapter of norms and added biases, with a random θ."""
    config = IntrinsicConfig(**{"d": 60, "add_bias": True, "init_weights": False, **options})
    return get_peft_model(build(family), config).eval()


def offsets_of(model: PeftModel) -> dict[str, torch.Tensor]:
    """Offset of every adapted parameter, by its name."""
    layers = model.base_model.tuner_layers()
    return {
        o.name: layer.get_delta_weight("default", own)
        for layer in layers
        for own, o in layer.offsets["default"].items()
    }


def with_biases() -> transformers.PreTrainedModel:
    """The base with biases of zero, in a class that has them."""
    config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=2, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    )
    model = transformers.LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(build("llama").state_dict(), strict=False)
    assert len(missing) == 14
    assert not unexpected
    return model.eval()


@pytest.mark.parametrize("targets", [None, ["q_proj", "norm"], "all"])
def test_targeted_linear_layers_without_a_bias_get_one(targets):
    names = set(offsets_of(biased(target_modules=targets)))
    plain = set(offsets_of(biased(target_modules=targets, add_bias=False)))
    linear = {name for name in names - plain if name.rsplit(".", 2)[1] in LINEAR}
    assert names - plain == linear  # and so not lm_head
    assert len(linear) == (2 if isinstance(targets, list) else 14)
    assert all(name.endswith(".bias") for name in linear)
    if targets is None:
        assert all("norm" in name for name in plain)


def test_heads_and_layers_that_have_a_bias_get_none():
    assert set(offsets_of(biased("bert"))) == set(offsets_of(biased("bert", add_bias=False)))
    torch.manual_seed(0)
    base = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZES, num_labels=3))
    config = IntrinsicConfig(d=60, add_bias=True, task_type="SEQ_CLS", reinitialized=[])
    names = set(offsets_of(get_peft_model(base, config)))
    assert "score.weight" in names
    assert "score.bias" not in names
    assert sum(name.endswith(".bias") for name in names) == 14


def test_outputs_and_gradients_are_those_of_a_model_with_biases():
    model, reference = biased(), with_biases()
    theta = model.get_base_model().intrinsic.intrinsic_theta["default"].weight
    logits = model(**batch("llama")).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (logits * weights).sum().backward()
    gradient, theta.grad = theta.grad, None

    offsets = offsets_of(model)
    base = dict(reference.named_parameters())
    values = {name: base[name].detach() + offset for name, offset in offsets.items()}
    expected = functional_call(reference, values, (), batch("llama")).logits
    torch.testing.assert_close(logits, expected, **CLOSE)
    (expected * weights).sum().backward()
    assert gradient.norm() > 0
    torch.testing.assert_close(gradient, theta.grad, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def test_at_theta_zero_the_output_is_the_base_s_bitwise_and_the_bias_can_be_read():
    model = biased(init_weights=True)
    assert torch.equal(evaluate(model, "llama"), evaluate(build("llama"), "llama"))
    model = biased()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    torch.testing.assert_close(layer.bias, layer.get_delta_weight("default", "bias"))
    with model.disable_adapter():
        assert layer.bias is None


def test_added_biases_are_saved_and_loaded(tmp_path):
    model = biased()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path)
    assert torch.equal(evaluate(loaded, "llama"), evaluate(model, "llama"))
    assert sum(p.numel() for n, p in loaded.named_parameters() if "intrinsic_" in n) == 60


def test_merge_then_unmerge_adds_and_removes_biases():
    model = biased()
    expected = evaluate(model, "llama")
    names = list(model.state_dict())
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    for _ in range(2):
        model.merge_adapter()
        torch.testing.assert_close(evaluate(model, "llama"), expected, **CLOSE)
        assert layer.base_layer.bias.shape == (24,)
        assert not layer.base_layer.bias.requires_grad
        model.unmerge_adapter()
        assert layer.base_layer.bias is None
        assert list(model.state_dict()) == names
        assert torch.equal(evaluate(model, "llama"), expected)


@pytest.mark.parametrize("merged_before", [False, True])
def test_merge_and_unload_saves_biases_that_the_class_supports(tmp_path, merged_before):
    model = biased()
    expected = evaluate(model, "llama")
    if merged_before:
        model.merge_adapter()
    plain = model.unload() if merged_before else model.merge_and_unload()
    assert plain.config.attention_bias
    assert plain.config.mlp_bias
    plain.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(evaluate(loaded, "llama"), expected, **CLOSE)


def test_a_failed_merge_leaves_the_configuration_unchanged():
    model = biased()
    with torch.no_grad():
        model.get_base_model().intrinsic.intrinsic_theta["default"].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    assert not model.get_base_model().config.attention_bias
    assert model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.bias is None


def test_merge_and_unload_sets_only_the_flags_that_are_needed():
    plain = biased(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]).merge_and_unload()
    assert plain.config.attention_bias
    assert not plain.config.mlp_bias


def test_merge_and_unload_fills_other_biases_of_the_flag_with_zeros(tmp_path):
    """The option of Llama's configuration gives biases to k, v and o too."""
    model = biased(target_modules=["q_proj"])
    expected = evaluate(model, "llama")
    plain = model.merge_and_unload()
    attention = plain.model.layers[0].self_attn
    assert attention.q_proj.bias.any()
    assert not any(layer.bias.any() for layer in (attention.k_proj, attention.v_proj, attention.o_proj))
    torch.testing.assert_close(evaluate(plain, "llama"), expected, **CLOSE)
    plain.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(evaluate(loaded, "llama"), expected, **CLOSE)


def test_merge_and_unload_raises_where_a_saved_model_would_lose_biases():
    model = biased("qwen2")  # q, k and v have biases, the class has none for the others
    expected = evaluate(model, "qwen2")
    with pytest.raises(
        ValueError, match=r"A saved Qwen2ForCausalLM cannot hold these added biases: .*mlp.down_proj.bias, "
    ):
        model.merge_and_unload()
    assert torch.equal(evaluate(model, "qwen2"), expected)
    assert model.get_model_status().merged_adapters == []
    model.merge_adapter()
    with pytest.raises(ValueError, match="cannot hold"):
        model.unload()
    model.unmerge_adapter()
    assert torch.equal(evaluate(model.unload(), "qwen2"), evaluate(build("qwen2"), "qwen2"))


@torch.no_grad()
def test_samples_can_have_different_added_biases():
    model = biased()
    numbers = torch.randn(4, 60, generator=torch.Generator().manual_seed(0)) / 300
    expected = []
    for i, each in enumerate(numbers):
        model.get_base_model().intrinsic.intrinsic_theta["default"].weight.copy_(each)
        expected.append(output(model, {k: v[i : i + 1] for k, v in batch("llama").items()}))
    with AdapterBank(model, numbers).select(range(4)):
        torch.testing.assert_close(output(model, batch("llama")), torch.cat(expected), **CLOSE)


def test_add_bias_must_be_true_or_false():
    with pytest.raises(TypeError, match="add_bias must be True or False, got 1"):
        IntrinsicConfig(add_bias=1)
