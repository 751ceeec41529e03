"""`projection=None`: which models get biases of values, and which Fastfood."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from conftest import SIZES, build, evaluate
from peft import PeftModel, get_peft_model
from torch import nn

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.tuner.attention import find_value_projections

D = 20


@pytest.mark.parametrize(
    ("family", "options", "projection"),
    [
        ("llama", {}, "value_bias"),
        ("gpt2", {"task_type": "CAUSAL_LM"}, "value_bias"),
        ("llama", {"d": 24}, "value_bias"),
        ("llama", {"d": 25}, "fastfood"),  # two layers of 12 values
        ("llama", {"target_modules": "norms-and-biases"}, "fastfood"),
        ("llama", {"target_parameters": ["norm.weight"]}, "fastfood"),
        ("llama", {"said": True}, "fastfood"),
        ("llama", {"add_bias": True, "target_modules": ["q_proj"]}, "fastfood"),
        ("bert", {}, "fastfood"),
        ("t5", {}, "fastfood"),
        ("custom", {}, "fastfood"),
        ("llama", {"modules_to_save": ["v_proj"]}, "fastfood"),
        ("llama", {"modules_to_save": ["model.layers.0"]}, "fastfood"),
        ("llama", {"modules_to_save": ["model.layers.0"], "d": 12}, "value_bias"),
    ],
)
def test_decoders_get_biases_of_values_by_default(family, options, projection):
    model = get_peft_model(build(family), IntrinsicConfig(**{"d": D, **options}))
    assert model.peft_config["default"].projection == projection


def test_a_shared_bias_counts_once():
    base = build("qwen2")
    first, second = (layer.self_attn.v_proj for layer in base.model.layers)
    second.bias = first.bias
    assert get_peft_model(base, IntrinsicConfig(d=D)).peft_config["default"].projection == "fastfood"


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"d": 20}, list(range(8, 16))),
        ({"d": 20, "projection": "value_bias"}, list(range(8, 16))),
        ({"d": 20, "projection": "value_lora"}, list(range(8, 16))),
        ({"d": 100}, list(range(8, 18))),
        ({"d": 144}, list(range(8, 20))),
        ({"d": 196}, None),
        ({"d": 20, "projection": "value_bias", "target_modules": "all"}, None),
        ({"d": 20, "projection": "value_bias", "exclude_modules": ["layers.9.self_attn.v_proj"]}, None),
        ({"d": 12, "projection": "value_bias", "layers_to_transform": [1]}, [1]),
        ({"d": 20, "projection": "fastfood"}, None),
    ],
)
def test_few_parameters_adapt_as_many_layers_as_their_square_root(options, layers, tmp_path):
    """Twenty layers of 12 values. Eight are the fewest, and 196 parameters need all."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 20}, num_key_value_heads=2)
        )

    model = get_peft_model(base(), IntrinsicConfig(**options, init_weights=False)).eval()
    assert model.peft_config["default"].layers_to_transform == layers
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(evaluate(loaded, "llama"), evaluate(model, "llama"))


def git() -> nn.Module:
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    return transformers.GitForCausalLM(transformers.GitConfig(**SIZES, vision_config=vision))


def phi4() -> nn.Module:
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    audio = {"hidden_size": 24, "intermediate_size": 40, "num_blocks": 2, "num_attention_heads": 4, "input_size": 8}
    audio |= {"ext_pw_out_channel": 24, "depthwise_separable_out_channel": 24, "nemo_conv_channels": 24}
    config = transformers.Phi4MultimodalConfig(
        **SIZES,
        num_key_value_heads=2,
        vision_config={**sizes, "image_size": 56, "patch_size": 14, "crop_size": 56},
        audio_config=audio,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    return transformers.Phi4MultimodalForCausalLM(config)


def with_an_unknown_layer() -> nn.Module:
    base = build("llama")
    base.model.layers[1].self_attn = nn.Identity()
    return base


def with_values_outside_the_decoder() -> nn.Module:
    base = build("llama")
    base.outside = base.model.layers[1].self_attn
    base.model.layers[1].self_attn = nn.Identity()
    return base


@pytest.mark.parametrize("model", [git, phi4, with_an_unknown_layer, with_values_outside_the_decoder])
def test_models_whose_attention_is_known_in_part_get_fastfood(model):
    base = model()
    assert sum(value.size for value in find_value_projections(base).values()) >= 12
    assert get_peft_model(base, IntrinsicConfig(d=12)).peft_config["default"].projection == "fastfood"


def test_the_default_selects_all_value_projections():
    assert get_peft_model(build("llama"), IntrinsicConfig(d=D)).peft_config["default"].target_modules == "all"


def test_one_configuration_serves_decoders_and_encoders():
    config = IntrinsicConfig(d=D)
    found = [get_peft_model(build(family), config).peft_config["default"] for family in ("llama", "bert", "llama")]
    assert [each.projection for each in found] == ["value_bias", "fastfood", "value_bias"]
    assert config.projection == "value_bias"


def test_a_saved_configuration_without_a_projection_keeps_the_first_one(tmp_path):
    model = get_peft_model(build("llama"), IntrinsicConfig(d=D, projection="fastfood", init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored.pop("projection") == "fastfood"
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored))
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    assert torch.equal(evaluate(loaded, "llama"), evaluate(model, "llama"))
