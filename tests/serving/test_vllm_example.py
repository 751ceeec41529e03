"""The store that examples/vllm_server makes. `make test-vllm` runs vLLM itself."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import build

from peft_intrinsic.serving import LoraExpander, open_store

SCRIPT = Path(__file__).parents[2] / "examples" / "vllm_server" / "make_store.py"


def test_each_row_of_the_example_store_is_a_lora_of_rank_one(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sqlalchemy")
    build("llama").save_pretrained(tmp_path / "base")
    arguments = [
        "--model",
        str(tmp_path / "base"),
        "--store",
        str(tmp_path / "adapters.db"),
        "--count",
        "3",
        "--d",
        "20",
    ]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().out.startswith("3 adapters in ")
    store, expander = open_store(f"sqlite:///{tmp_path / 'adapters.db'}"), LoraExpander(tmp_path / "base")
    assert list(store.names()) == ["user0", "user1", "user2"]
    found = [expander.expand(store.get(name)) for name in store.names()]
    assert [config.r for config, _ in found] == [1, 1, 1]
    key = "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"
    assert not torch.equal(found[0][1][key], found[1][1][key])


def test_zeros_leave_the_base_model_as_it_is(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    config, state = LoraExpander(tmp_path / "base").zeros()
    assert config.r == 1
    products = [state[key.replace("lora_A", "lora_B")] @ state[key] for key in state if "lora_A" in key]
    assert len(products) == 14  # two layers
    assert not any(product.any() for product in products)
