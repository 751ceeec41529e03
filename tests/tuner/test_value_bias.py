"""Biases of value projections: what is read from the base model, and the tuner's calls with them."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace

import pytest
import torch
import transformers
from accelerate import cpu_offload
from conftest import SIZES, TWO_STACKS, batch, build, evaluate, output, train
from helpers.oracle import draw, words
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM, MistralConfig, MistralForCausalLM

from peft_intrinsic import AdapterBank, IntrinsicConfig
from peft_intrinsic.codec import compress, load_packed
from peft_intrinsic.tuner import attention
from peft_intrinsic.tuner.attention import find_value_projections

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
FIRST = {
    **dict.fromkeys(("llama", "qwen2", "gemma", "moe"), ("model.layers.0.self_attn.v_proj", "o_proj")),
    **dict.fromkeys(("bart", "whisper"), ("model.encoder.layers.0.self_attn.v_proj", "out_proj")),
    "bert": ("bert.encoder.layer.0.attention.self.value", "output.dense"),
    "distilbert": ("distilbert.transformer.layer.0.attention.v_lin", "out_lin"),
    "gpt2": ("transformer.h.0.attn.c_attn", "c_proj"),
    "vit": ("vit.layers.0.attention.v_proj", "o_proj"),
    "t5": ("encoder.block.0.layer.0.SelfAttention.v", "o"),
}
"""The value projection of the first attention layer, and the output projection beside it."""

MECHANICS = ["llama", "qwen2", "gemma", "gpt2"]
D = 20


def mistral() -> nn.Module:
    """A decoder whose class has no biases of values."""
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2)).eval()


def adapted(family: str = "llama", base: nn.Module | None = None, **options) -> PeftModel:
    """An adapter with a random θ, the same at every call."""
    base = base or build(family)
    torch.manual_seed(1)
    config = IntrinsicConfig(**{"d": D, "projection": "value_bias", "init_weights": False, **options})
    return get_peft_model(base, config).eval()


def offsets_of(model: PeftModel) -> dict[str, torch.Tensor]:
    layers = model.base_model.tuner_layers()
    return {
        offset.name: layer.get_delta_weight(adapter, own).detach()
        for layer in layers
        for adapter in layer.active_adapters
        for own, offset in layer.offsets.get(adapter, {}).items()
    }


@torch.no_grad()
def record(model: nn.Module, family: str, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and output of a module, when the model runs."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, result: seen.append((args[0], result)))
    evaluate(model, family)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", FIRST)
def test_a_bias_changes_the_output_of_attention_by_the_map_that_was_read(family):
    """The weights of attention sum to one, so a bias of the values passes through it."""
    model, (name, output_name) = build(family), FIRST[family]
    biases = find_value_projections(model)
    assert len(biases) == (6 if family in ("t5", "bart", "whisper") else 2)
    bias, layer = biases[f"{name}.bias"], model.get_submodule(name)
    at_output = f"{name.removesuffix('self.value').rpartition('.')[0]}.{output_name}"
    _, before = record(model, family, at_output)
    values = torch.zeros(record(model, family, name)[1].shape[-1])
    values[bias.first : bias.first + bias.size] = draw(bias.size)
    layer.bias = nn.Parameter(values if layer.bias is None else layer.bias + values)
    _, after = record(model, family, at_output)
    expected = torch.from_numpy(bias.read_map()) @ draw(bias.size).double()
    torch.testing.assert_close((after - before).double(), expected.expand_as(before), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "bart", "t5", "bert"])
def test_the_size_is_the_rms_of_the_values_for_random_tokens(family):
    model, (name, _) = build(family), FIRST[family]
    vocabulary = 64  # a power of two, at most the vocabulary
    length = 40 if family == "bart" else 64  # its positions
    ids = torch.tensor([word % vocabulary for word in words(0, "tokens", "", 8 * length)]).view(8, length)
    bias, seen = find_value_projections(model)[f"{name}.bias"], []
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, values: seen.append(values))
    model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    handle.remove()
    expected = seen[0][..., bias.first : bias.first + bias.size].square().mean().sqrt().item()
    assert bias.measure() == (pytest.approx(expected, rel=1e-4), None)


def test_a_model_that_does_not_run_on_tokens_raises():
    base = build("vit")
    with pytest.raises(ValueError, match=r"scaled by a run of the base model on tokens, which failed for ViT"):
        adapted("vit", base)
    assert list(base.state_dict()) == list(build("vit").state_dict())
    adapted("vit", base, scale="isometric")  # which needs no run


@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("family", MECHANICS)
def test_training_learns_and_a_saved_adapter_loads(family, said, tmp_path):
    model = adapted(family, init_weights=True, said=said, task_type="CAUSAL_LM")
    assert torch.equal(evaluate(model, family), evaluate(build(family), family))
    ids = batch(family)["input_ids"]
    losses = train(model, {"input_ids": ids, "labels": ids}, 12, 2e-3)
    assert losses[-1] < losses[0] - 0.01
    assert model.get_nb_trainable_parameters()[0] == D
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(family), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(evaluate(loaded, family), evaluate(model, family))
    assert all(torch.equal(value, offsets_of(model)[name]) for name, value in offsets_of(loaded).items())


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_existing_biases_are_adapted_and_merged(family):
    model = adapted(family)
    expected = evaluate(model, family)
    assert (expected - evaluate(build(family), family)).abs().max() > 1e-3
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(evaluate(model, family), expected)
    torch.testing.assert_close(evaluate(model.merge_and_unload(), family), expected, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_merged_model_is_saved_with_the_biases_that_its_class_can_have(family, tmp_path):
    model = adapted(family)
    expected = evaluate(model, family)
    plain = model.merge_and_unload()
    assert plain.config.attention_bias
    plain.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(evaluate(loaded, family), expected, **CLOSE)


def test_merging_raises_where_the_class_cannot_have_the_bias():
    model = adapted(base=mistral())
    expected = evaluate(model, "llama")
    error = r"MistralForCausalLM cannot hold these added biases: model\.layers\.0.* with projection='value_lora' or"
    with pytest.raises(ValueError, match=error):
        model.merge_and_unload()
    model.merge_adapter()
    torch.testing.assert_close(evaluate(model, "llama"), expected, **CLOSE)
    model.unmerge_adapter()
    assert torch.equal(evaluate(model, "llama"), expected)


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, [0, 1]),
        ({"target_modules": ["v_proj"]}, [0, 1]),
        ({"target_modules": "all-linear"}, [0, 1]),
        ({"target_modules": "all"}, [0, 1]),
        ({"target_modules": r".*layers\.1\..*v_proj"}, [1]),
        ({"layers_to_transform": 0}, [0]),
        ({"exclude_modules": r".*layers\.0.*"}, [1]),
        ({"target_parameters": ["layers.1.self_attn.v_proj.bias"]}, [1]),
    ],
)
def test_options_of_targets_select_attention_layers(options, layers):
    names = set(offsets_of(adapted(d=5, **options)))
    assert names == {f"model.layers.{i}.self_attn.v_proj.bias" for i in layers}


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("custom", {}, "Of those that it knows, Custom has 0"),
        (
            "llama",
            {"target_modules": ["q_proj"]},
            r"LlamaForCausalLM has 2, and target_modules={'q_proj'} selects none",
        ),
        (
            "llama",
            {"d": 25},
            r"d=25 exceeds the 24 values of the attention layers\. Use d ≤ 24 or projection='fastfood'",
        ),
        ("gpt2", {"d": 49}, "d=49 exceeds the 48 values"),  # of 144, with queries and keys
        ("bert", {"d": 200, "task_type": "SEQ_CLS", "reinitialized": []}, "the 123 values .* and weights of the head"),
        ("llama", {"add_bias": True}, "add_bias=True does not go with projection='value_bias'"),
        ("llama", {"block_size": 8}, "block_size=8 has no effect on projection='value_bias'"),
    ],
)
def test_what_cannot_work_raises(family, options, message):
    base = build(family)
    with pytest.raises(ValueError, match=message):
        adapted(family, base, **options)
    assert list(base.state_dict()) == list(build(family).state_dict())


def test_d_counts_a_task_head_too():
    options = {"d": 90, "task_type": "SEQ_CLS", "reinitialized": []}
    offsets = offsets_of(adapted("bert", **options))
    values = {f"bert.encoder.layer.{i}.attention.self.value.bias" for i in range(2)}
    assert set(offsets) == values | {"classifier.weight", "classifier.bias"}
    assert all(offset.any() for offset in offsets.values())
    assert set(offsets_of(adapted("bert", **{**options, "d": D, "head": "keep"}))) == values


def test_another_adapter_does_not_change_the_directions():
    expected = offsets_of(adapted())
    base = build("llama")
    model = get_peft_model(base, IntrinsicConfig(d=50, target_modules="all", init_weights=False))
    torch.manual_seed(1)
    model.add_adapter("second", IntrinsicConfig(d=D, projection="value_bias", init_weights=False))
    model.set_adapter("second")
    actual = offsets_of(model)
    assert all(torch.equal(actual[name], offset) for name, offset in expected.items())
    model.set_adapter("default")
    model.merge_adapter()
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="Unmerging the model first"):  # PEFT
        model.add_adapter("third", IntrinsicConfig(d=D, seed=1, projection="value_bias", init_weights=False))
    model.set_adapter("third")
    actual = offsets_of(model)
    assert all(torch.equal(actual[name], offset) for name, offset in offsets_of(adapted(seed=1)).items())


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_default_can_be_added_beside_a_merged_adapter(family):
    model = get_peft_model(build(family), IntrinsicConfig(d=50, target_modules="all", init_weights=False))
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):  # PEFT
        model.add_adapter("second", IntrinsicConfig(d=200))
    assert model.peft_config["second"].projection == "fastfood"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("q_proj", "scaled by a run of the base model, but an adapter is merged into it. Call unmerge_adapter"),
        ("o_proj", r"reads the weights of model\.layers\.1\.self_attn\.o_proj, but an adapter is merged"),
    ],
)
def test_values_are_not_measured_under_a_merged_lora(target, message):
    model = get_peft_model(build("llama"), LoraConfig(target_modules=[target]))
    value = find_value_projections(model.get_base_model())["model.layers.1.self_attn.v_proj.bias"]
    model.merge_adapter()
    with pytest.raises(ValueError, match=message):
        value.read_map(), value.measure()
    model.unmerge_adapter()
    assert value.read_map().shape == (24, 12)
    assert value.measure()[0] > 0


def test_adapters_with_the_same_options_share_their_projections():
    def projections(name: str) -> list:
        layers = model.base_model.tuner_layers()
        return [offset.projection for layer in layers for offset in layer.offsets.get(name, {}).values()]

    model = adapted()
    for name, seed in (("same", 0), ("other", 1)):
        model.add_adapter(name, IntrinsicConfig(d=D, seed=seed, projection="value_bias"))
    first, same, other = map(projections, ("default", "same", "other"))
    assert len(first) == 2
    assert all(one is another for one, another in zip(first, same, strict=True))
    assert not any(one is another for one, another in zip(first, other, strict=True))


def test_weights_without_values_raise_and_offloaded_ones_are_read():
    with torch.device("meta"):
        base = build("llama")
    error = r"needs the values of model.layers.0.self_attn.o_proj.weight, but .*, or use projection='fastfood'"
    with pytest.raises(ValueError, match=error):
        adapted(base=base)
    base = build("llama")
    base.model.layers[0].self_attn.o_proj.weight.data = torch.empty(0)  # as DeepSpeed ZeRO-3 leaves it
    with pytest.raises(ValueError, match=error):
        adapted(base=base)
    expected = offsets_of(adapted())
    actual = offsets_of(adapted(base=cpu_offload(build("llama"), execution_device="cpu")))
    assert all(torch.equal(actual[name], offset) for name, offset in expected.items())


def test_an_offloaded_model_runs_after_merging():
    """The class then has biases of queries, keys and outputs too, which are zero."""
    expected = evaluate(adapted(), "llama")
    plain = adapted(base=cpu_offload(build("llama"), execution_device="cpu")).merge_and_unload()
    torch.testing.assert_close(evaluate(plain, "llama"), expected, **CLOSE)


@pytest.mark.parametrize(
    ("projection", "value", "message"),
    [
        ("v_proj", 0.0, r"no effect: .* are zero \(model\.layers\.0\.self_attn\.v_proj\.bias"),
        ("o_proj", 0.0, "θ has no effect"),
        ("o_proj", float("nan"), r"model\.layers\.1\.self_attn\.o_proj\.weight contains values that are not finite"),
    ],
)
def test_weights_that_give_no_directions_raise(projection, value, message):
    base = build("llama")
    for layer in base.model.layers[1 if value else 0 :]:
        nn.init.constant_(layer.self_attn.get_submodule(projection).weight, value)
    with pytest.raises(ValueError, match=message):
        adapted(base=base)


def test_attention_to_an_encoder_is_adapted_only_where_there_is_one():
    bert = transformers.BertLMHeadModel(transformers.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True))
    sizes = {"vocab_size": 97, "n_embd": 24, "n_layer": 2, "n_head": 4, "add_cross_attention": True}
    bart = transformers.BartForCausalLM(transformers.BartConfig(**TWO_STACKS))
    for model in (bert, bart, transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))):
        assert any("cross" in name or "encoder_attn" in name for name, _ in model.named_modules())
        names = list(find_value_projections(model))
        assert len(names) == 2
        assert not any("cross" in name or "encoder_attn" in name for name in names)


def test_targeted_modules_without_an_adapted_parameter_are_logged(caplog):
    with caplog.at_level(logging.INFO, "peft_intrinsic"):
        names = set(offsets_of(adapted(target_modules=["q_proj", "v_proj"])))
    assert names == {f"model.layers.{i}.self_attn.v_proj.bias" for i in range(2)}
    text = "Not adapted (projection='value_bias' adapts values alone): " + ", ".join(
        f"model.layers.{i}.self_attn.q_proj" for i in range(2)
    )
    assert text in caplog.messages
    caplog.clear()
    with caplog.at_level(logging.INFO, "peft_intrinsic"):
        adapted(target_modules=["v_proj"])
        adapted()
    assert not caplog.messages


def test_the_default_reports_a_class_that_cannot_save_merged_biases(caplog):
    with caplog.at_level(logging.INFO, "peft_intrinsic"):
        get_peft_model(build("llama"), IntrinsicConfig(d=D))
        adapted(base=mistral())
        assert not caplog.messages
        get_peft_model(mistral(), IntrinsicConfig(d=D))
    assert len(caplog.messages) == 1
    assert "A saved MistralForCausalLM cannot hold these added biases" in caplog.messages[0]


def test_a_layer_that_reads_differences_of_values_has_no_value_biases():
    base = DiffLlamaForCausalLM(DiffLlamaConfig(**SIZES, num_key_value_heads=2))
    assert not find_value_projections(base)
    assert get_peft_model(base, IntrinsicConfig(d=D)).peft_config["default"].projection == "fastfood"


def test_value_projections_are_searched_once(monkeypatch):
    calls = []

    def base_modules(model):
        calls.append(model)
        return list(base_modules_of(model))

    base_modules_of = attention.base_modules
    monkeypatch.setattr(attention, "base_modules", base_modules)
    for options in ({"projection": None}, {"target_modules": ["v_proj"]}, {"target_parameters": ["v_proj.bias"]}):
        calls.clear()
        adapted(**options)
        assert len(calls) == 1


@torch.no_grad()
@pytest.mark.parametrize("family", MECHANICS)
def test_samples_of_a_batch_can_have_different_adapters(family):
    model, vectors = adapted(family), draw(4, D) / 300
    expected = []
    for i, each in enumerate(vectors):
        model.get_base_model().intrinsic.intrinsic_theta["default"].weight.copy_(each)
        expected.append(output(model, {k: v[i : i + 1] for k, v in batch(family).items()}))
    with AdapterBank(model, vectors).select(range(4)):
        torch.testing.assert_close(output(model, batch(family)), torch.cat(expected), **CLOSE)


def test_a_compiled_model_has_the_same_outputs_and_gradients():
    model = adapted()
    theta = model.get_base_model().intrinsic.intrinsic_theta["default"].weight
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        theta.grad = None
        logits = output(run, batch("llama"))
        logits.square().sum().backward()
        results.append((logits.detach(), theta.grad))
    torch.compiler.reset()
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_rounding_the_base_to_bfloat16_changes_offsets_by_less_than_three_percent():
    exact, rounded = offsets_of(adapted()), offsets_of(adapted(base=build("llama").bfloat16()))
    for name, offset in exact.items():
        assert 0 < (rounded[name] - offset).norm() < 0.03 * offset.norm()


def test_other_directions_than_in_training_raise_or_warn(tmp_path):
    """A sketch of P is stored, because the directions follow from the base weights."""

    def load(change) -> PeftModel:
        base = build("llama")
        for layer in base.model.layers:
            change(layer.self_attn.o_proj.weight.data)
        return PeftModel.from_pretrained(base, tmp_path)

    model = adapted()
    model.save_pretrained(tmp_path)
    stored = model.peft_config["default"].value_sketch
    assert load(lambda weight: None).peft_config["default"].value_sketch == stored
    load(lambda weight: weight.copy_(weight.half()))  # warnings are errors here
    with pytest.warns(UserWarning, match=r"directions .* differ from those in training .* as where it is quantized"):
        load(lambda weight: weight.copy_((weight * 128).round() / 128))
    with pytest.raises(ValueError, match=r"directions .* differ .* it has other weights, or another tokenizer\. Load"):
        load(lambda weight: weight.copy_(weight.flip(1)))


def test_tokens_that_are_added_to_the_vocabulary_do_not_change_the_offsets():
    expected, base = offsets_of(adapted()), build("llama")
    base.resize_token_embeddings(base.config.vocab_size + 5, mean_resizing=False)
    actual = offsets_of(adapted(base=base))
    for name, offset in expected.items():
        torch.testing.assert_close(actual[name], offset)


def test_copies_of_a_model_have_the_same_offsets():
    model = adapted()
    assert torch.equal(evaluate(copy.deepcopy(model), "llama"), evaluate(model, "llama"))


def test_a_seed_can_be_replaced_in_a_configuration_that_was_used():
    config = IntrinsicConfig(d=D)
    get_peft_model(build("llama"), config)
    model = get_peft_model(build("llama"), replace(config, seed=3))
    plain = get_peft_model(build("llama"), IntrinsicConfig(d=D, seed=3))
    assert model.peft_config["default"].value_sketch == plain.peft_config["default"].value_sketch


def test_a_saved_adapter_without_a_sketch_raises(tmp_path):
    adapted().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**stored, "value_sketch": None}))
    with pytest.raises(ValueError, match="lacks value_sketch, so it is damaged"):
        PeftModel.from_pretrained(build("llama"), tmp_path)


def test_a_packed_adapter_is_compared_with_a_base_that_is_not_checked():
    data = compress(adapted(), 20)
    base = build("llama")
    for layer in base.model.layers:
        layer.self_attn.o_proj.weight.data = layer.self_attn.o_proj.weight.data.flip(1)
    with pytest.raises(ValueError, match="directions of value biases of this base model differ"):
        load_packed(base, data, check_base=False)
