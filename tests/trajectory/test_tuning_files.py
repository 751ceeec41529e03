"""Adapters in a learned subspace on disk: where its file is found, and errors."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import build, evaluate
from helpers.subspaces import attach, make_subspace, set_theta
from peft import PeftModel, get_peft_model

from peft_intrinsic import IntrinsicConfig


def test_an_embedded_subspace_is_saved_beside_the_adapter(tmp_path):
    subspace = make_subspace("bert", tmp_path)
    model = attach("bert", subspace, embed_subspace=True)
    set_theta(model)
    before = evaluate(model, "bert")
    model.save_pretrained(tmp_path / "adapter")
    assert model.peft_config["default"].subspace == str(subspace.path)
    shutil.move(tmp_path / "adapter", tmp_path / "elsewhere")
    subspace.path.unlink()
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path / "elsewhere").eval()
    assert torch.equal(evaluate(loaded, "bert"), before)
    loaded.save_pretrained(tmp_path / "elsewhere")  # onto itself
    again = PeftModel.from_pretrained(build("bert"), tmp_path / "elsewhere").eval()
    assert torch.equal(evaluate(again, "bert"), before)


def test_a_file_beside_the_adapter_is_found_and_compared_by_its_digest(tmp_path):
    subspace = make_subspace("bert", tmp_path)
    model = attach("bert", subspace)
    model.save_pretrained(tmp_path / "adapter")
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stored["subspace"] == str(subspace.path)
    assert stored["subspace_digest"] == subspace.digest
    moved = tmp_path / "adapter" / subspace.path.name
    subspace.path.rename(moved)
    PeftModel.from_pretrained(build("bert"), tmp_path / "adapter")
    moved.unlink()
    with pytest.raises(ValueError, match=r"subspace=.* cannot be read"):
        PeftModel.from_pretrained(build("bert"), tmp_path / "adapter")
    make_subspace("bert", tmp_path / "other", seed=1).path.rename(moved)
    with pytest.raises(ValueError, match=r"has the digest .* but the adapter was trained with"):
        PeftModel.from_pretrained(build("bert"), tmp_path / "adapter")


def test_a_file_of_a_former_adapter_does_not_hide_that_of_this_one(tmp_path):
    """Both have the name that `fit_subspace` gives by default."""
    subspaces = [make_subspace("bert", tmp_path / name, seed=seed) for seed, name in enumerate(("former", "own"))]
    models = [attach("bert", subspace, embed_subspace=i == 0) for i, subspace in enumerate(subspaces)]
    for model in models:
        model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path / "adapter")
    assert loaded.peft_config["default"].subspace == str(subspaces[1].path)


def test_a_subspace_of_another_base_raises_an_error(tmp_path):
    subspace = make_subspace("bert", tmp_path)
    options = {"d": 6, "projection": "trajectory", "subspace": str(subspace.path)}
    model = build("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.add_(0.1)
    with pytest.raises(ValueError, match="was recorded from other weights"):
        get_peft_model(model, IntrinsicConfig(**options))
    assert not hasattr(model, "intrinsic")
    with pytest.raises(ValueError, match=r"adapts .* but this model has none there"):
        get_peft_model(build("gpt2"), IntrinsicConfig(**options))
    headed = build("bert")
    with torch.no_grad():
        headed.classifier.weight.add_(0.1)  # of another task
    get_peft_model(headed, IntrinsicConfig(**options))
    get_peft_model(build("bert").to(torch.bfloat16), IntrinsicConfig(**options))
    get_peft_model(build("bert").to(torch.float16), IntrinsicConfig(**options))


def test_fully_trained_embeddings_are_saved_and_loaded(tmp_path):
    """PEFT compares ends of names, and `word_embeddings` ends in `embeddings` too."""
    model = attach(
        "bert", make_subspace("bert", tmp_path), modules_to_save=["classifier", "embeddings"], task_type="SEQ_CLS"
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * p.requires_grad)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path / "adapter").eval()
    assert model.peft_config["default"].full_modules == ["bert.embeddings", "classifier"]
    assert torch.equal(evaluate(loaded, "bert"), evaluate(model, "bert"))
    encoder = build("bert").bert
    with pytest.raises(ValueError, match=r"fits embeddings and embeddings\.word_embeddings.*Name the inner"):
        get_peft_model(encoder, IntrinsicConfig(d=20, modules_to_save=["embeddings"]))


def test_a_file_that_was_fitted_again_raises_an_error(tmp_path):
    subspace = make_subspace("bert", tmp_path)
    model = attach("bert", subspace, embed_subspace=True)
    set_theta(model)
    shutil.copy(make_subspace("bert", tmp_path / "other", seed=1).path, subspace.path)
    with pytest.raises(ValueError, match="has the digest"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(ValueError, match="has changed since"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    subspace.path.write_bytes(subspace.path.read_bytes()[:-2] + b"xx")
    with pytest.raises(ValueError, match="is damaged"):
        attach("bert", subspace)
