"""Saving and loading: complete and small files, the same logits everywhere, and errors for other models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build, evaluate, same, trained
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import peft_intrinsic  # noqa: F401
from peft_intrinsic import IntrinsicConfig

TESTS = str(Path(__file__).parents[1])


@pytest.mark.slow
@pytest.mark.parametrize("said", [False, True])
def test_a_loaded_adapter_gives_the_same_output(family, said, tmp_path):
    model = trained(family, said=said)
    expected = evaluate(model, family)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(family), tmp_path).eval()
    assert same(evaluate(loaded, family), expected, family)
    meta = PeftModel.from_pretrained(build(family), tmp_path, low_cpu_mem_usage=True).eval()
    assert same(evaluate(meta, family), expected, family)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
def test_transformers_loads_the_same_output(name, tmp_path):
    model = trained(name, said=True)
    expected = evaluate(model, name)
    model.save_pretrained(tmp_path)
    native = build(name)
    native.load_adapter(str(tmp_path))
    assert torch.equal(evaluate(native, name), expected)


def test_files_are_small_and_contain_no_embeddings(tmp_path):
    for targets in (None, ["query", "word_embeddings"], ".*embeddings.*|.*query"):
        folder = tmp_path / str(targets)[:5]
        trained("bert", target_modules=targets, task_type="SEQ_CLS").save_pretrained(folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        assert {name: tuple(t.shape) for name, t in tensors.items()} == {
            "base_model.model.intrinsic.intrinsic_theta.weight": (200,)
        }
        assert sum(p.stat().st_size for p in folder.iterdir() if p.name != "README.md") < 5000


def test_targeted_input_embeddings_of_a_decoder_are_not_saved(tmp_path):
    trained("llama", target_modules=["embed_tokens", "q_proj"]).save_pretrained(tmp_path)
    assert list(load_file(tmp_path / "adapter_model.safetensors")) == [
        "base_model.model.intrinsic.intrinsic_theta.weight"
    ]


PROCESS = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads({threads})
from conftest import batch, build, evaluate, output
import peft_intrinsic
from peft import PeftModel
model = PeftModel.from_pretrained(build("bert").to({dtype}), {folder!r}).eval()
torch.save(evaluate(model, "bert").float(), {folder!r} + "/logits")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("threads", "dtype", "tolerance"), [(1, "float32", 1e-6), (4, "float32", 1e-6), (4, "bfloat16", 2e-2)]
)
def test_a_new_process_computes_the_same_logits(tmp_path, threads, dtype, tolerance):
    model = trained("bert", said=True)
    model.save_pretrained(tmp_path)
    code = PROCESS.format(tests=TESTS, threads=threads, dtype=f"torch.{dtype}", folder=str(tmp_path))
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    expected = evaluate(model, "bert")
    found = torch.load(tmp_path / "logits")
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_a_new_head_is_reproducible(tmp_path):
    """Two loads of one checkpoint make two random heads, on which the adapter must not depend."""
    build("bert").bert.save_pretrained(tmp_path / "encoder")

    def base(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder", num_labels=3).eval()

    assert not torch.equal(base(1).classifier.weight, base(2).classifier.weight)
    model = get_peft_model(
        base(1), IntrinsicConfig(d=50, init_weights=False, task_type="SEQ_CLS", target_modules="all")
    ).eval()
    model.save_pretrained(tmp_path / "adapter")
    expected = evaluate(model, "bert")
    assert model.peft_config["default"].reinitialized == ["classifier.weight"]
    loaded = PeftModel.from_pretrained(base(2), tmp_path / "adapter").eval()
    assert torch.equal(evaluate(loaded, "bert"), expected)
    native = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3).eval()
    assert torch.equal(evaluate(native, "bert"), expected)
    # A second adapter of another seed leaves the head, and so the first, as it was.
    loaded.add_adapter("other", IntrinsicConfig(d=20, seed=9, task_type="SEQ_CLS", target_modules="all"))
    assert torch.equal(evaluate(loaded, "bert"), expected)


def test_a_head_from_the_checkpoint_keeps_its_values(tmp_path):
    build("bert").save_pretrained(tmp_path)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    before = base.classifier.weight.clone()
    model = get_peft_model(base, IntrinsicConfig(d=50, task_type="SEQ_CLS", target_modules="all"))
    assert torch.equal(model.get_base_model().classifier.base_layer.weight, before)
    assert model.peft_config["default"].reinitialized == []


def test_loading_onto_another_model_raises(tmp_path):
    trained("bert").save_pretrained(tmp_path)
    other = build("bert")
    other.classifier = torch.nn.Linear(24, 5)
    with pytest.raises(
        ValueError, match=r"2 of its 41 are not in this model.*classifier.bias 5x1 bias, classifier.weight 5x24 matrix"
    ):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("keep", [0, 100])
def test_loading_theta_of_another_length_raises(tmp_path, keep):
    trained("bert").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: t[:keep].clone() for name, t in load_file(path).items() if keep} or {"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=rf"{'nothing' if not keep else '100'}.*d=200.* requires * \(200,\)"):
        PeftModel.from_pretrained(build("bert"), tmp_path)


def test_loading_a_newer_algorithm_raises(tmp_path):
    trained("bert").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "algorithm_version": 99}))
    with pytest.raises(ValueError, match=r"algorithm_version=99.*pip install -U"):
        PeftModel.from_pretrained(build("bert"), tmp_path)


def test_files_have_their_golden_contents(tmp_path):
    """The files of an adapter of version 1. A change here breaks the adapters of users."""
    trained("bert", said=True, task_type="SEQ_CLS").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "base_model.model.intrinsic.intrinsic_lambda.weight": (4,),
        "base_model.model.intrinsic.intrinsic_theta.weight": (196,),
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["manifest"].startswith("d81582ccb7d02350:")
    assert config["algorithm_version"] == 1


def headless(folder: Path, seed: int = 1) -> torch.nn.Module:
    """A classifier whose head is missing from the checkpoint."""
    if not folder.exists():
        build("bert").bert.save_pretrained(folder)
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()


def test_a_head_in_modules_to_save_belongs_to_its_adapter(tmp_path):
    """A second adapter neither re-initializes nor adapts it; both are saved, loaded and merged."""
    base = headless(tmp_path / "encoder")
    full = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"], "d": 40, "init_weights": False}
    model = get_peft_model(base, IntrinsicConfig(**full)).eval()
    for parameter in model.base_model.model.classifier.modules_to_save["default"].parameters():
        parameter.data.add_(0.3)
    first = evaluate(model, "bert")
    model.add_adapter("second", IntrinsicConfig(d=40, init_weights=False, task_type="SEQ_CLS", target_modules="all"))
    assert torch.equal(evaluate(model, "bert"), first)
    assert model.peft_config["second"].reinitialized == ["classifier.weight"]
    model.set_adapter("second")
    second = evaluate(model, "bert")
    model.save_pretrained(tmp_path / "both")
    for name, folder, expected in (("default", "both", first), ("second", "both/second", second)):
        loaded = PeftModel.from_pretrained(headless(tmp_path / "encoder", 2), tmp_path / folder).eval()
        assert torch.equal(evaluate(loaded, "bert"), expected), name
    model.set_adapter("default")
    merged = model.merge_and_unload()
    assert type(merged.classifier) is torch.nn.Linear
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(evaluate(again, "bert"), first, rtol=1e-4, atol=1e-5)


def test_a_head_that_another_adapter_uses_is_not_reinitialized(tmp_path):
    model = get_peft_model(
        headless(tmp_path / "a"), IntrinsicConfig(d=40, task_type="SEQ_CLS", head="keep", target_modules="all")
    )
    with pytest.raises(
        ValueError, match=r"classifier.weight would be re-initialized, but adapter 'default'.*head='keep'"
    ):
        model.add_adapter("second", IntrinsicConfig(d=40, task_type="SEQ_CLS", target_modules="all"))
    model = get_peft_model(
        headless(tmp_path / "a"), IntrinsicConfig(d=40, task_type="SEQ_CLS", init_weights=False, target_modules="all")
    )
    merged = model.merge_and_unload()
    expected = evaluate(merged, "bert")
    again = get_peft_model(merged, IntrinsicConfig(d=40, task_type="SEQ_CLS", target_modules="all")).eval()
    assert torch.equal(evaluate(again, "bert"), expected)


def test_an_adapted_head_cannot_be_fully_trained_by_another_adapter():
    model = get_peft_model(build("bert"), IntrinsicConfig(d=40, task_type="SEQ_CLS", target_modules="all"))
    with pytest.raises(
        ValueError, match=r"modules_to_save=.*another adapter already adapts classifier.bias, classifier.weight"
    ):
        model.add_adapter(
            "full", IntrinsicConfig(d=40, task_type="SEQ_CLS", modules_to_save=["classifier"], target_modules="all")
        )


def test_the_configuration_of_a_saved_adapter_can_be_trained_again(tmp_path):
    """It has a new θ, which a Trainer saves and loads again at the end."""
    trained("bert").save_pretrained(tmp_path / "old")
    model = get_peft_model(build("bert"), IntrinsicConfig.from_pretrained(tmp_path / "old"))
    model.get_base_model().intrinsic.intrinsic_theta["default"].weight.data.fill_(0.01)
    model.save_pretrained(tmp_path / "best")
    expected = evaluate(model.eval(), "bert")
    model.get_base_model().intrinsic.intrinsic_theta["default"].weight.data.zero_()
    model.load_adapter(tmp_path / "best", "default", is_trainable=True)
    assert torch.equal(evaluate(model.eval(), "bert"), expected)


def test_a_container_with_an_adapted_module_cannot_be_fully_trained_by_another_adapter():
    model = get_peft_model(build("bert"), IntrinsicConfig(d=40))  # adapts bert.pooler.dense.bias in place
    before = evaluate(model, "bert")
    config = IntrinsicConfig(d=40, target_modules=["query"], head="keep", modules_to_save=["pooler"])
    with pytest.raises(ValueError, match=r"modules_to_save=\['pooler'\].*already adapts bert.pooler.dense.bias"):
        model.add_adapter("full", config)
    assert torch.equal(evaluate(model, "bert"), before)


@pytest.mark.filterwarnings("ignore:Adapter name 'intrinsic' should not be contained")  # PEFT's own hint
@pytest.mark.parametrize("name", ["intrinsic", "intrinsic_theta", "base_model", "model", "weight"])
def test_adapter_names_that_would_empty_other_files_raise(name):
    model = get_peft_model(build("bert"), IntrinsicConfig(d=40))
    with pytest.raises(ValueError, match=rf"adapter_name='{name}' is a part of the keys"):
        model.add_adapter(name, IntrinsicConfig(d=40, seed=1))
    with pytest.raises(ValueError, match=rf"adapter_name='{name}' is a part of the keys"):
        get_peft_model(build("bert"), IntrinsicConfig(d=40), adapter_name=name)


def test_adapter_names_that_are_parts_of_a_fully_trained_module_raise_whichever_comes_first():
    full = {"d": 40, "target_modules": ["query"], "head": "keep", "modules_to_save": ["classifier"]}
    model = get_peft_model(build("bert"), IntrinsicConfig(**full))
    with pytest.raises(ValueError, match="adapter_name='classifier'"):
        model.add_adapter("classifier", IntrinsicConfig(d=40, head="keep", target_modules=["query"]))
    model = get_peft_model(
        build("bert"), IntrinsicConfig(d=40, head="keep", target_modules=["query"]), adapter_name="classifier"
    )
    with pytest.raises(ValueError, match="adapter_name='classifier'"):
        model.add_adapter("second", IntrinsicConfig(**full))


@pytest.mark.parametrize("said", [False, True])
def test_saving_raises_instead_of_writing_a_file_that_cannot_be_loaded(said, tmp_path):
    model = trained("bert", said=said)
    model.save_pretrained(tmp_path)
    files = [tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"]
    old = [path.read_bytes() for path in files]
    vector = model.get_base_model().intrinsic
    weight = (vector.intrinsic_lambda if said else vector.intrinsic_theta)["default"].weight
    value = weight.detach().clone()
    weight.data[-1] = float("nan")
    with pytest.raises(ValueError, match=r"intrinsic_\w+ of adapter 'default' contains NaN"):
        model.save_pretrained(tmp_path)
    weight.data.copy_(value)
    state = {name: p for name, p in model.state_dict().items() if "intrinsic_theta" not in name}
    with pytest.raises(ValueError, match=r"contains \d+ of the d=200 parameters of adapter 'default'"):
        model.save_pretrained(tmp_path, state_dict=state)
    assert [path.read_bytes() for path in files] == old


def test_processes_without_a_state_dict_save_nothing(tmp_path):
    model = trained("bert")
    model.save_pretrained(tmp_path, state_dict={}, is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_the_result_of_get_peft_model_state_dict_can_be_saved(tmp_path):
    model = trained("bert")
    model.save_pretrained(tmp_path, state_dict=get_peft_model_state_dict(model))
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path)
    assert torch.equal(evaluate(loaded, "bert"), evaluate(model, "bert"))


def test_freezing_an_adapted_module_leaves_the_shared_parameters_trainable():
    model = get_peft_model(build("llama"), IntrinsicConfig(d=40, target_modules="all"))
    model.get_input_embeddings().requires_grad_(False)
    assert model.get_nb_trainable_parameters()[0] == 40
