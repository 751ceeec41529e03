"""Conversion to LoRA, checked by loading the result with plain PEFT LoRA on the plain base model."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import batch, build, evaluate, output, trained
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.conversion import convert_to_lora as peft_convert
from peft.tuners.lora.conversion import save_as_lora as peft_save
from peft.utils.save_and_load import get_base_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from peft_intrinsic import IntrinsicConfig, convert_to_lora, save_as_lora

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
HELD = {  # what a LoRA can hold of each family
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"],
    "gemma": ["q_proj", "o_proj", "down_proj", "embed_tokens"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "moe": ["q_proj", "o_proj"],
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT's LoRA, of merging
@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("said", [False, True])
def test_a_lora_has_the_same_outputs(name, said, tmp_path):
    model = trained(name, said=said, target_modules=HELD[name])
    expected = evaluate(model, name)
    save_as_lora(tmp_path, model)
    lora = PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert lora.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(evaluate(lora, name), expected, **CLOSE)
    assert (expected - evaluate(build(name), name)).abs().max() > 1e-3


def test_conv1d_converts_without_what_a_lora_cannot_represent(tmp_path):
    """GPT-2's linear layers store the transpose and have biases."""
    model = trained("gpt2", target_modules=["c_attn", "c_fc", "c_proj"])
    with pytest.raises(ValueError, match=r"cannot represent 8 of the adapted.*c_attn.bias.*accept_loss=True"):
        save_as_lora(tmp_path, model)
    assert not (tmp_path / "adapter_config.json").exists()
    save_as_lora(tmp_path, model, accept_loss=True)
    lora = PeftModel.from_pretrained(build("gpt2"), tmp_path).eval()
    without = build("gpt2")
    merged = model.merge_and_unload()
    with torch.no_grad():
        for name, p in merged.named_parameters():
            if name.endswith("weight"):
                without.get_parameter(name).copy_(p)
    torch.testing.assert_close(evaluate(lora, "gpt2"), evaluate(without, "gpt2"), **CLOSE)


def test_the_error_states_the_lost_fraction_of_the_norm():
    """Against the norms of the merged and the plain model's difference."""
    model = trained("bert")
    with pytest.raises(ValueError, match="cannot represent") as raised:
        convert_to_lora(model)
    merged, plain = model.merge_and_unload(), build("bert")
    squared = {n: (p - plain.get_parameter(n)).square().sum() for n, p in merged.named_parameters()}
    two = {n for n, p in plain.named_parameters() if p.dim() > 1}
    share = (sum(v for n, v in squared.items() if n not in two) / sum(squared.values())).sqrt().item()
    assert f"with {share:.1%} of the offset's norm" in str(raised.value)


def test_chunks_of_a_tall_matrix_get_a_rank_of_their_own(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 20_000, bias=False), nn.Linear(20_000, 3, bias=False))
    config = IntrinsicConfig(d=9, block_size=4, init_weights=False, target_modules="all")
    model = get_peft_model(base, config)
    x = torch.randn(5, 8)
    expected = model(x).detach()
    lora_config, state = convert_to_lora(model)
    assert lora_config.r == 8  # the largest: a server that looks at r alone knows what it must hold
    assert lora_config.rank_pattern == lora_config.alpha_pattern == {"1": 4}
    assert state["base_model.model.0.lora_A.weight"].shape == (8, 8)
    save_as_lora(tmp_path, model)
    torch.testing.assert_close(PeftModel.from_pretrained(model.unload(), tmp_path)(x), expected, **CLOSE)


def test_a_new_head_is_stored_in_modules_to_save(tmp_path):
    build("bert").bert.save_pretrained(tmp_path / "encoder")

    def base(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder", num_labels=3).eval()

    config = IntrinsicConfig(
        d=50,
        init_weights=False,
        task_type="SEQ_CLS",
        exclude_modules=".*(LayerNorm|embeddings).*",
        target_modules="all",
    )
    model = get_peft_model(base(1), config).eval()
    save_as_lora(tmp_path / "lora", model, accept_loss=True)
    lora = PeftModel.from_pretrained(base(2), tmp_path / "lora").eval()
    assert "classifier" in lora.peft_config["default"].modules_to_save
    found = lora.get_base_model().classifier.modules_to_save["default"]
    merged = model.merge_and_unload().classifier
    torch.testing.assert_close(found.weight, merged.weight, **CLOSE)
    torch.testing.assert_close(found.bias, merged.bias, **CLOSE)


HEAD = [f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")]


@pytest.mark.parametrize(
    ("options", "saved"),
    [
        ({"reinitialized": HEAD}, ["classifier"]),
        ({"reinitialized": []}, ["classifier"]),  # the checkpoint has a head, which is adapted
        ({"reinitialized": [], "head": "keep"}, None),
        ({"head": "keep", "modules_to_save": ["out_proj"]}, ["classifier"]),
    ],
    ids=["new", "trained", "frozen", "part"],
)
def test_heads_of_several_layers_load_in_peft(tmp_path, options, saved):
    """PEFT looks for the whole head in the file, whatever the configuration lists."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        settings = {"vocab_size": 97, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
        return RobertaForSequenceClassification(RobertaConfig(**settings, intermediate_size=40, num_labels=3)).eval()

    config = IntrinsicConfig(
        d=60, init_weights=False, task_type="SEQ_CLS", target_parameters=["value.weight"], block_size=8, **options
    )
    model = get_peft_model(base(), config).eval()
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.add_(0.1)
    expected = evaluate(model, "bert")
    save_as_lora(tmp_path, model)
    lora = PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(evaluate(lora, "bert"), expected, **CLOSE)
    assert convert_to_lora(model)[0].modules_to_save == saved
    assert (expected - evaluate(base(), "bert")).abs().max() > 1e-4


def test_conversions_that_cannot_work_raise():
    with pytest.raises(ValueError, match="no linear layer or embedding"):
        convert_to_lora(trained("llama", target_modules=["norm"], d=20), accept_loss=True)
    with pytest.raises(ValueError, match="cannot represent"):
        convert_to_lora(trained("llama", target_modules=["q_proj"], projection="dense"))
    with pytest.raises(ValueError, match="adapter='nope' is not attached"):
        convert_to_lora(trained("llama"), "nope")


def test_peft_s_own_converter_is_exact_at_full_rank(tmp_path):
    """By singular values; at the full rank it is exact too."""
    model = trained("llama", target_modules=HELD["llama"][:-1], block_size=8)
    expected = evaluate(model, "llama")
    assert model.supports_lora_conversion()
    config, state = peft_convert(model, rank=8)
    assert isinstance(config, LoraConfig)
    assert all("lora_" in key for key in state)
    peft_save(tmp_path, model, rank=8)
    lora = PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    torch.testing.assert_close(evaluate(lora, "llama"), expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft_convert(trained("bert", target_modules=["query"]), rank=8)  # adapts the biases too


@pytest.mark.slow
def test_a_converted_lora_loads_without_this_package(tmp_path):
    model = trained("llama", target_modules=["q_proj"])
    save_as_lora(tmp_path, model)
    torch.save(evaluate(model, "llama"), tmp_path / "expected")
    code = f"""
import sys, torch
from peft import PeftConfig, PeftModel
from transformers import LlamaConfig, LlamaForCausalLM
config = PeftConfig.from_pretrained({str(tmp_path)!r})
assert config.peft_type == "LORA" and "peft_intrinsic" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    lora = PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    with torch.no_grad():
        found = output(lora, batch("llama"))
    torch.testing.assert_close(found, torch.load(tmp_path / "expected"), **CLOSE)


def test_the_lora_has_the_dtype_of_the_base_or_the_requested_one(tmp_path):
    """By default that of the base model."""
    model = get_peft_model(build("llama").bfloat16(), IntrinsicConfig(d=60, target_modules=["q_proj"])).eval()
    for dtype, expected in ((None, torch.bfloat16), (torch.float16, torch.float16)):
        assert {value.dtype for value in convert_to_lora(model, dtype=dtype)[1].values()} == {expected}
        save_as_lora(tmp_path / str(dtype), model, dtype=dtype)
        assert {v.dtype for v in load_file(tmp_path / str(dtype) / "adapter_model.safetensors").values()} == {expected}


def test_peft_s_base_state_dict_has_no_theta():
    model = trained("llama")
    assert set(get_base_model_state_dict(model)) == set(build("llama").state_dict())
