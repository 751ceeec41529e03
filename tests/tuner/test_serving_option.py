"""`serving="lora"`: adapters that are exactly a LoRA, and options that select anything else."""

from __future__ import annotations

import json
import logging
import re

import pytest
import torch
import transformers
from conftest import SIZES, build, evaluate
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from peft_intrinsic import IntrinsicConfig, convert_to_lora, save_as_lora
from peft_intrinsic.codec import compress, load_packed

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
ROUNDED = {"rtol": 1e-3, "atol": 2e-4}  # θ as float16
VALUES, LINEAR = {"d": 20}, {"d": 60}  # two layers have 24 values, or 48 in GPT-2


def base(family: str) -> nn.Module:
    if family != "mistral":
        return build(family)
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, num_key_value_heads=2)).eval()


def adapted(family: str = "llama", **options) -> PeftModel:
    torch.manual_seed(1)
    config = IntrinsicConfig(**{"d": 20, "serving": "lora", "init_weights": False, "task_type": "CAUSAL_LM", **options})
    return get_peft_model(base(family), config).eval()


def adapted_names(model: PeftModel) -> set[str]:
    layers = model.base_model.tuner_layers()
    return {offset.name for layer in layers for offset in layer.offsets["default"].values()}


@pytest.mark.parametrize(("options", "projection", "rank"), [(VALUES, "value_lora", 1), (LINEAR, "fastfood", 8)])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "qwen2"])
def test_everything_is_exported_exactly(family, options, projection, rank, tmp_path, caplog):
    """Also an adapter that was saved and loaded, or packed, without the option."""
    with caplog.at_level(logging.INFO, "peft_intrinsic"):
        model = adapted(family, **options)
    expected = evaluate(model, family)
    assert (expected - evaluate(base(family), family)).abs().max() > 1e-3
    save_as_lora(tmp_path / "lora", model)
    lora = PeftModel.from_pretrained(base(family), tmp_path / "lora").eval()
    torch.testing.assert_close(evaluate(lora, family), expected, **CLOSE)
    config = lora.peft_config["default"]
    assert (config.peft_type, config.r, config.modules_to_save) == ("LORA", rank, None)
    weights = [p for name, p in lora.named_parameters() if "lora_" in name]
    size = sum(p.numel() * p.element_size() for p in weights)
    report = f"a LoRA of rank {rank} on {len(weights) // 2} layers, of {size} bytes in torch.float32."
    assert report in caplog.text

    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "serving" not in stored
    assert stored["projection"] == projection
    loaded = PeftModel.from_pretrained(base(family), tmp_path).eval()
    assert loaded.peft_config["default"].serving is None
    assert torch.equal(evaluate(loaded, family), expected)
    data = compress(model, levels=256)
    torch.testing.assert_close(evaluate(load_packed(base(family), data), family), expected, **ROUNDED)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "qwen2", "t5", "bert_mlm", "vit"])
def test_it_adapts_the_weights_that_peft_s_lora_adapts_by_all_linear(family):
    options = {"d": 60, "projection": "fastfood", "task_type": None}
    lora = get_peft_model(base(family), LoraConfig(target_modules="all-linear", fan_in_fan_out=family == "gpt2"))
    modules = lora.get_base_model().named_modules()
    expected = {f"{name}.weight" for name, module in modules if isinstance(module, LoraLayer)}
    assert adapted_names(adapted(family, **options)) == expected
    assert adapted_names(adapted(family, **options, target_modules="all-linear")) == expected


def test_options_select_among_the_weights(tmp_path):
    prefix = "model.layers.{}.self_attn.{}_proj.weight".format
    for options, expected in (
        ({"target_modules": ["q_proj", "v_proj"]}, {prefix(i, name) for i in (0, 1) for name in "qv"}),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, {prefix(1, "q")}),
        ({"target_modules": ["q_proj"], "exclude_modules": ["0.self_attn.q_proj"]}, {prefix(1, "q")}),
        ({"target_parameters": ["0.self_attn.o_proj.weight"]}, {prefix(0, "o")}),
        ({"target_modules": r".*\.0\.self_attn\.[kv]_proj"}, {prefix(0, "k"), prefix(0, "v")}),
        ({"target_modules": ["embed_tokens"]}, {"model.embed_tokens.weight"}),
    ):
        model = adapted("qwen2", projection="fastfood", **options)
        assert adapted_names(model) == expected
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base("qwen2"), tmp_path).eval()
        assert torch.equal(evaluate(loaded, "qwen2"), evaluate(model, "qwen2"))
    assert adapted(block_size=16).peft_config["default"].block_size == 16
    assert adapted(block_size=16).peft_config["default"].projection == "fastfood"


def test_parameters_that_stay_frozen_are_named_by_kind(caplog):
    with caplog.at_level(logging.INFO, "peft_intrinsic"):
        adapted("qwen2", **LINEAR)
        adapted("qwen2", target_modules=["q_proj", "o_proj"])
    lines = [record.message for record in caplog.records if record.message.startswith("Not adapted")]
    biases = "self_attn.q_proj.bias, self_attn.k_proj.bias, self_attn.v_proj.bias"
    norms = "input_layernorm.weight, post_attention_layernorm.weight, model.norm.weight"
    head = "Not adapted (a LoRA cannot represent them): "
    assert lines == [f"{head}{biases}, {norms}", f"{head}self_attn.q_proj.bias"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projection": "value_bias"}, "projection='value_bias'"),
        ({"projection": "dense"}, "projection='dense'"),
        ({"projection": "trajectory", "subspace": "none"}, "projection='trajectory'"),
        ({"add_bias": True}, "add_bias=True"),
        ({"target_modules": "norms-and-biases"}, "target_modules='norms-and-biases' .* no norms and biases"),
        ({"target_modules": "all"}, "target_modules='all' .* no norms and biases"),
        ({"target_modules": "norms-and-biases", "projection": "value_lora"}, "target_modules='norms-and-biases'"),
        ({"target_modules": ["q_proj", "norm"]}, "target_modules={.*'norm'.*}"),
        ({"target_modules": ".*"}, r"target_modules='\.\*'"),
        ({"target_parameters": ["norm.weight"]}, r"target_parameters=\['norm.weight'\]"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\]"),
        ({"serving": "vllm"}, r"serving must be one of \(None, 'lora'\), got 'vllm'"),
        ({"target_modules": ["quary"]}, "target_modules={'quary'}"),
    ],
)
def test_options_that_a_lora_cannot_hold_raise_and_are_named(options, message):
    model = base("llama")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, IntrinsicConfig(**{"d": 20, "serving": "lora", **options}))
    assert [name for name, _ in model.named_modules()] == names


def test_heads_raise_unless_they_stay_frozen():
    for options in ({"task_type": "SEQ_CLS"}, {"reinitialized": ["classifier.weight"]}):
        with pytest.raises(ValueError, match="head='subspace' does not go with serving='lora': it adapts classifier"):
            get_peft_model(base("bert"), IntrinsicConfig(d=60, serving="lora", **options))
    model = adapted("bert", d=60, task_type="SEQ_CLS", head="keep")
    assert not any("classifier" in name for name in adapted_names(model))


def test_layers_without_a_low_rank_form_raise_at_the_end():
    """A column is stored, not factored."""
    with pytest.raises(ValueError, match=r"a LoRA cannot represent the offset of 0\.weight"):
        get_peft_model(nn.Sequential(nn.Linear(1, 9), nn.Linear(9, 2)), IntrinsicConfig(d=4, serving="lora"))


def test_the_rank_of_a_tall_matrix_is_reported(caplog):
    """Its rows are two chunks of Fastfood."""
    base = nn.Sequential(nn.Linear(8, 20_000, bias=False), nn.Linear(20_000, 3, bias=False))
    with caplog.at_level(logging.INFO, "peft_intrinsic"):
        model = get_peft_model(base, IntrinsicConfig(d=9, block_size=4, serving="lora"))
    rank = convert_to_lora(model)[0].r
    assert f"a LoRA of rank {rank} on 2 layers" in caplog.text
    assert rank == 8


def test_a_layer_whose_name_ends_another_one_s_raises():
    base = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.ModuleDict({"a": nn.Linear(4, 4)})})
    with pytest.raises(ValueError, match=r"cannot adapt a\.weight alone"):
        get_peft_model(base, IntrinsicConfig(d=4, serving="lora", target_modules=r"a"))


def test_a_configuration_that_is_not_attached_yet_stores_the_option(tmp_path):
    IntrinsicConfig(d=20, serving="lora").save_pretrained(tmp_path)
    config = IntrinsicConfig.from_pretrained(tmp_path)
    assert get_peft_model(base("llama"), config).peft_config["default"].projection == "value_lora"


def test_one_configuration_serves_several_models():
    config = IntrinsicConfig(d=20, serving="lora")
    found = [get_peft_model(base(family), config).peft_config["default"] for family in ("llama", "vit", "gpt2")]
    assert [each.projection for each in found] == ["value_lora", "fastfood", "value_lora"]
    assert re.fullmatch(r"\['.*'\]", str(found[1].target_parameters))


@pytest.mark.parametrize("options", [VALUES, LINEAR])
def test_weighted_sums_keep_the_resolved_options(options):
    model = adapted(**options)
    model.add_adapter("second", IntrinsicConfig(**options, serving="lora", init_weights=False))
    model.base_model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum")
    assert not model.peft_config["sum"].differences(model.peft_config["default"])
