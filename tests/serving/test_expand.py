"""Stored adapters as LoRAs for servers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import build, evaluate
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.codec import compress, read_packed
from peft_intrinsic.serving import LoraExpander

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
ROUNDED = {"rtol": 1e-3, "atol": 2e-4}  # θ as float16


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expander(base) -> LoraExpander:
    return LoraExpander(base)


def adapted(seed: int, **options) -> PeftModel:
    torch.manual_seed(seed)
    options = {"d": 20, "projection": "value_lora", "init_weights": False, "task_type": "CAUSAL_LM", **options}
    return get_peft_model(build("llama"), IntrinsicConfig(**options)).eval()


def bare(folder: Path, change: dict | None = None, metadata: str = "adapter_config") -> bytes:
    """θ of a saved adapter in safetensors, with its configuration as metadata, in which options are changed."""
    options = {**json.loads((folder / "adapter_config.json").read_text()), **(change or {})}
    return save(load_file(folder / "adapter_model.safetensors"), {metadata: json.dumps(options)})


def served(expander: LoraExpander, adapter: bytes | Path) -> torch.Tensor:
    """Output of the base model with the LoRA, as PEFT loads it."""
    config, state = expander.expand(adapter)
    config.base_model_name_or_path = None
    model = get_peft_model(build("llama"), config)
    assert not set_peft_model_state_dict(model, state).unexpected_keys
    return evaluate(model.eval(), "llama")


def test_the_least_recently_used_kind_leaves_memory(base, monkeypatch):
    monkeypatch.setattr("peft_intrinsic.serving.expand.KINDS", 2)
    loaded, expander = [], LoraExpander(base)
    load = expander._load
    monkeypatch.setattr(expander, "_load", lambda: loaded.append(1) or load())
    packed = [compress(adapted(1, d=d), 10) for d in (20, 21, 22)]
    counts = []
    for kind in (0, 1, 0, 2, 0, 1):
        expander.expand(packed[kind])
        counts.append(len(loaded))
    assert counts == [1, 2, 2, 3, 3, 4]  # 2 replaced 1


@pytest.mark.parametrize("options", [{}, {"projection": "fastfood", "target_modules": "all-linear", "block_size": 8}])
def test_packed_and_saved_adapters_give_their_outputs_as_a_lora(expander, options, tmp_path):
    rank = options.get("block_size", 1)
    for seed in (1, 2, 1):
        model = adapted(seed, **options)
        expected = evaluate(model, "llama")
        data = compress(model, levels=256)
        assert expander.expand(data)[0].r == rank
        torch.testing.assert_close(served(expander, data), expected, **ROUNDED)
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(served(expander, tmp_path), expected, **CLOSE)
        torch.testing.assert_close(served(expander, bare(tmp_path)), expected, **CLOSE)
    assert (evaluate(build("llama"), "llama") - expected).abs().max() > 1e-3


def test_the_weights_of_the_base_model_are_freed(expander):
    expander.expand(compress(adapted(1)))
    for model in expander._kinds.values():
        parameters = {name: p.numel() for name, p in model.named_parameters() if "intrinsic_" not in name}
        assert not any(parameters.values())


def test_adapters_that_a_server_cannot_hold_raise(expander):
    for options, message in (
        ({"projection": "value_bias"}, r"A LoRA cannot represent 2 of the adapted parameters.*v_proj\.bias"),
        ({"projection": "fastfood"}, "A LoRA cannot represent"),
    ):
        with pytest.raises(ValueError, match=message):
            expander.expand(compress(adapted(1, **options)))
    large = compress(adapted(1, projection="fastfood", target_modules=["q_proj"]))
    with pytest.raises(
        ValueError, match=r"rank 64, and the server takes ranks up to 16\. Start it with --max-lora-rank of at least 64"
    ):
        expander.expand(large, max_rank=16)


def test_an_adapter_of_other_parameters_raises_after_a_good_one(expander):
    packed = read_packed(compress(adapted(1)))
    expander.expand(packed.to_bytes())
    with pytest.raises(ValueError, match="manifest"):
        expander.expand(replace(packed, manifest_digest=bytes(8)).to_bytes())


def test_damaged_and_foreign_adapters_raise(expander):
    data = compress(adapted(1))
    with pytest.raises(ValueError, match="damaged"):
        expander.expand(data[:-1] + b"x")
    base = build("llama")
    with torch.no_grad():
        base.model.norm.weight.mul_(2)
    model = get_peft_model(base, IntrinsicConfig(d=20, projection="value_lora", task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"The adapter was made for .* \(digest [0-9a-f]{16}\), and the server has"):
        expander.expand(compress(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "not the parameters and options that were saved"),
        ({"manifest": None}, "has no manifest"),
        ({"projection": "trajectory", "subspace": "/etc/passwd"}, "it needs a subspace file"),
        ({"peft_type": "LORA"}, "cannot be read"),
        ({"peft_type": "NONE"}, "cannot be read"),
        ({"d": "twenty"}, "cannot be read: d must be an int"),
    ],
)
def test_a_configuration_of_other_parameters_raises(expander, tmp_path, change, message):
    adapted(1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        expander.expand(bare(tmp_path, change))


def test_another_length_of_theta_raises(expander, tmp_path):
    """Also that of one entry, which torch would copy to all."""
    adapted(1, projection="fastfood", target_modules=["q_proj"]).save_pretrained(tmp_path)
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    for length in (1, 21):
        theta = {"base_model.model.intrinsic.intrinsic_theta.weight": torch.zeros(length)}
        data = save(theta, {"adapter_config": json.dumps({**options, "checksum": None})})
        with pytest.raises(ValueError, match=rf"The adapter has \[{length}\] entries of θ and λ instead of \[20\]"):
            expander.expand(data)


def test_a_file_without_theta_raises(expander, tmp_path):
    adapted(1).save_pretrained(tmp_path)
    data = save({"other": torch.zeros(2)}, {"adapter_config": (tmp_path / "adapter_config.json").read_text()})
    with pytest.raises(ValueError, match=r"The adapter has \[\] entries of θ and λ instead of \[20\]"):
        expander.expand(data)


def test_safetensors_without_their_configuration_raise(expander, tmp_path):
    adapted(1).save_pretrained(tmp_path)
    data = bare(tmp_path)
    with pytest.raises(ValueError, match="the safetensors file has no metadata 'adapter_config'"):
        expander.expand(bare(tmp_path, metadata="other"))
    for damaged in (data[:-1], data[:40], data.replace(b"peft_type", b"peft_typo")):
        with pytest.raises(ValueError, match="cannot be read"):
            expander.expand(damaged)
    with pytest.raises(ValueError, match="no packed adapter: it begins with"):
        expander.expand(b"something else")


def test_saved_folders_that_are_damaged_or_of_other_methods_raise(expander, tmp_path):
    adapted(1).save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cannot be read"):
        expander.expand(tmp_path / "cut")
    get_peft_model(build("llama"), LoraConfig()).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="an adapter of the method LORA"):
        expander.expand(tmp_path / "lora")
