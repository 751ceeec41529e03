"""Re-initialization from a fixed seed: of parameters that transformers reported as missing and nothing has changed."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from conftest import batch, build, evaluate, output
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    MarianConfig,
    MarianMTModel,
)

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.projection.randomness import normals, words
from peft_intrinsic.tuner.attach import random_theta
from peft_intrinsic.tuner.loading import _NEW

TASK = {"d": 40, "task_type": "SEQ_CLS"}


def headless(folder: Path, seed: int = 1) -> nn.Module:
    """A classifier whose head is missing from the checkpoint."""
    if not folder.exists():
        build("bert").bert.save_pretrained(folder)
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()


def leaves_unchanged(base: nn.Module, name: str, **options) -> bool:
    """Whether an adapter at θ = 0 leaves the output unchanged, bitwise."""
    expected = evaluate(base, name)
    model = get_peft_model(base, IntrinsicConfig(**{**TASK, **options})).eval()
    assert model.peft_config["default"].reinitialized == []
    return torch.equal(evaluate(model, name), expected)


def test_random_streams_have_their_golden_values():
    """Computed once from the definition in the projection's README, with numpy and scipy alone."""
    head = normals(words(0, "head", "classifier.weight", 4)).tolist()
    theta = random_theta(7, 4).tolist()
    assert head == [-0.46936798095703125, -0.17726898193359375, 0.5326766967773438, -0.8354873657226562]
    assert theta == [0.02600555419921875, 0.45564422607421873, 0.13698272705078124, -0.12406768798828124]


def test_a_new_head_starts_from_a_fixed_seed(tmp_path):
    model = get_peft_model(headless(tmp_path / "encoder"), IntrinsicConfig(**TASK))
    weight = model.get_base_model().classifier.base_layer.weight
    expected = normals(words(0, "head", "classifier.weight", weight.numel())) * 0.02
    assert torch.equal(weight.flatten(), torch.from_numpy(expected).float())


def test_a_normal_run_reports_new_parameters_without_a_warning(tmp_path, caplog):
    base = headless(tmp_path / "encoder")
    with caplog.at_level(logging.INFO, "peft_intrinsic"):
        get_peft_model(base, IntrinsicConfig(**TASK))
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert "because the checkpoint does not contain them: classifier.weight. Pass head='keep'" in record.getMessage()


def test_an_offloaded_new_head_raises(tmp_path):
    base = cpu_offload(headless(tmp_path / "encoder"), execution_device="cpu")
    with pytest.raises(ValueError, match=r"classifier\.weight is offloaded and missing from the checkpoint"):
        get_peft_model(base, IntrinsicConfig(**TASK))
    assert get_peft_model(base, IntrinsicConfig(**TASK, head="keep")).peft_config["default"].reinitialized == []


def test_a_head_from_a_state_dict_keeps_its_values(tmp_path):
    base = headless(tmp_path / "encoder")
    base.load_state_dict({**base.state_dict(), "classifier.weight": torch.randn(3, 24)})
    assert leaves_unchanged(base, "bert")


@pytest.mark.parametrize(
    "head",
    [lambda: nn.Sequential(nn.Linear(24, 8), nn.Linear(8, 3)), lambda: nn.Linear(24, 5), lambda: nn.Linear(24, 3)],
)
@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_a_replaced_head_raises_unless_reinitialized_is_passed(head, task, tmp_path):
    """It is random or trained elsewhere, and a file of d parameters does not store it."""
    options: dict = {"d": 40, "task_type": task}

    def replaced(seed: int) -> nn.Module:
        base = headless(tmp_path / "encoder")
        torch.manual_seed(seed)
        base.classifier, base.num_labels = head(), 5
        return copy.deepcopy(base).eval()

    names = [f"classifier.{name}" for name, _ in head().named_parameters()]
    with pytest.raises(ValueError, match=rf"unknown whether .*{names[0]}.*reinitialized=\[names\] to start them"):
        get_peft_model(replaced(1), IntrinsicConfig(**options))
    model = get_peft_model(replaced(1), IntrinsicConfig(**options, reinitialized=names, init_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(replaced(2), tmp_path / "adapter").eval()
    assert torch.equal(evaluate(loaded, "bert"), evaluate(model, "bert"))
    merged = model.merge_and_unload()  # which clears all notes
    assert get_peft_model(merged, IntrinsicConfig(**options)).peft_config["default"].reinitialized == []
    kept = get_peft_model(replaced(1), IntrinsicConfig(**options, reinitialized=[])).eval()
    assert torch.equal(evaluate(kept, "bert"), evaluate(replaced(1), "bert"))


def test_a_head_that_was_rounded_to_half_precision_is_still_new(tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        base = headless(tmp_path / "encoder").to(dtype).float()
        model = get_peft_model(base, IntrinsicConfig(**TASK))
        assert model.peft_config["default"].reinitialized == ["classifier.weight"]


def test_a_model_with_a_new_head_loads_on_the_meta_device(tmp_path):
    headless(tmp_path / "encoder")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder", num_labels=3, device_map="meta")
    assert base.classifier.weight.is_meta


def test_a_head_from_a_merged_lora_keeps_its_values(tmp_path):
    both: list[dict] = [{}, {"modules_to_save": []}]
    for options in both:
        model = get_peft_model(headless(tmp_path / "encoder"), LoraConfig(target_modules=["query", "classifier"]))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1)
        assert leaves_unchanged(model.merge_and_unload(), "bert", **options)


def test_resized_embeddings_keep_their_values(tmp_path):
    build("llama").save_pretrained(tmp_path)
    for tied in (True, False):
        base = AutoModelForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=tied).eval()
        base.resize_token_embeddings(101)
        assert leaves_unchanged(base, "llama", task_type=None)


@pytest.mark.parametrize("change", [copy.deepcopy, lambda base: base.bfloat16(), lambda base: base.double()])
def test_a_copy_of_the_base_has_its_notes(change, tmp_path):
    base = headless(tmp_path / "encoder")
    model = get_peft_model(change(base), IntrinsicConfig(**TASK, init_weights=False)).eval()
    assert model.peft_config["default"].reinitialized == ["classifier.weight"]
    model.save_pretrained(tmp_path / "adapter")
    expected = evaluate(model, "bert")
    loaded = PeftModel.from_pretrained(change(headless(tmp_path / "encoder", 2)), tmp_path / "adapter").eval()
    assert torch.equal(evaluate(loaded, "bert"), expected)


def test_loading_raises_where_the_base_starts_from_other_values(tmp_path):
    model = get_peft_model(headless(tmp_path / "encoder"), IntrinsicConfig(**TASK))
    model.save_pretrained(tmp_path / "adapter")
    trained = headless(tmp_path / "encoder")
    trained.classifier.weight.data.mul_(2)
    with pytest.raises(ValueError, match=r"starts classifier.weight from a fixed seed.*loaded or trained values"):
        PeftModel.from_pretrained(trained, tmp_path / "adapter")
    build("bert").save_pretrained(tmp_path / "whole")
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    get_peft_model(whole, IntrinsicConfig(**TASK)).save_pretrained(tmp_path / "second")
    with pytest.raises(ValueError, match=r"classifier.weight is missing from the checkpoint.*head included"):
        PeftModel.from_pretrained(headless(tmp_path / "encoder"), tmp_path / "second")


def test_an_adapter_loads_onto_a_base_that_was_saved_with_the_reinitialized_head(tmp_path):
    model = get_peft_model(headless(tmp_path / "encoder"), IntrinsicConfig(**TASK, init_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    expected = evaluate(model, "bert")
    started = headless(tmp_path / "encoder")
    started.classifier.weight.data.copy_(model.get_base_model().classifier.base_layer.weight)
    started.save_pretrained(tmp_path / "started")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "started")
    assert torch.equal(evaluate(PeftModel.from_pretrained(base, tmp_path / "adapter").eval(), "bert"), expected)


def test_unload_restores_the_head(tmp_path):
    base = headless(tmp_path / "encoder")
    expected = evaluate(base, "bert")
    model = get_peft_model(base, IntrinsicConfig(**TASK, init_weights=False))
    unloaded = model.unload()
    assert torch.equal(evaluate(unloaded, "bert"), expected)
    again = get_peft_model(unloaded, IntrinsicConfig(**TASK))  # it is new as before
    assert again.peft_config["default"].reinitialized == ["classifier.weight"]


def test_unload_restores_the_head_after_another_adapter_was_deleted(tmp_path):
    base = headless(tmp_path / "encoder")
    expected = evaluate(base, "bert")
    model = get_peft_model(base, IntrinsicConfig(**TASK))
    model.delete_adapter("default")
    model.add_adapter("second", IntrinsicConfig(**TASK))
    assert torch.equal(evaluate(model.unload(), "bert"), expected)


def test_a_second_adapter_without_task_type_raises_and_says_so(tmp_path):
    model = get_peft_model(headless(tmp_path / "encoder"), IntrinsicConfig(**TASK))
    with pytest.raises(ValueError, match="PEFT adds the head if task_type=None: pass that of the other adapter"):
        model.add_adapter("second", IntrinsicConfig(d=40))


def test_tables_that_a_class_computes_are_unchanged(tmp_path):
    """Marian computes its sinusoidal positions, and no checkpoint contains them."""
    sizes = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    MarianMTModel(MarianConfig(vocab_size=50, d_model=32, **sizes, **layers)).save_pretrained(tmp_path)
    base = MarianMTModel.from_pretrained(tmp_path).eval()
    inputs = {**batch("bert"), "decoder_input_ids": batch("bert")["input_ids"]}
    expected = output(base, inputs)
    model = get_peft_model(base, IntrinsicConfig(d=40, task_type="SEQ_2_SEQ_LM")).eval()
    assert model.peft_config["default"].reinitialized == []
    assert torch.equal(output(model, inputs), expected)


def test_an_adapter_can_be_added_while_another_is_merged(tmp_path):
    model = get_peft_model(headless(tmp_path / "encoder"), IntrinsicConfig(**TASK, init_weights=False)).eval()
    expected = evaluate(model, "bert")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):  # as PEFT does for all methods
        model.add_adapter("second", IntrinsicConfig(**TASK))
    assert model.peft_config["second"].reinitialized == ["classifier.weight"]
    assert torch.equal(evaluate(model, "bert"), expected)


def test_reinitialized_overrides_what_the_checkpoint_contains(tmp_path):
    base = build("bert")
    assert leaves_unchanged(headless(tmp_path / "encoder"), "bert", reinitialized=[])
    model = get_peft_model(base, IntrinsicConfig(**TASK, reinitialized=["classifier.weight"]))
    assert not torch.equal(model.get_base_model().classifier.base_layer.weight, build("bert").classifier.weight)
    with pytest.raises(ValueError, match=r"reinitialized=\['nowhere'\] are no parameters"):
        get_peft_model(build("bert"), IntrinsicConfig(**TASK, reinitialized=["nowhere"]))


def test_constant_parameters_are_not_reinitialized():
    """Here the bias, which has one entry; the weight has two."""
    model = nn.Sequential(nn.Linear(2, 1))
    model.__dict__[_NEW] = {name: p.detach().flatten().clone() for name, p in model.named_parameters()}
    assert get_peft_model(model, IntrinsicConfig(d=2, target_modules="all")).peft_config["default"].reinitialized == [
        "0.weight"
    ]


@pytest.mark.slow
def test_a_model_loaded_before_the_import_raises_without_autoload(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_INTRINSIC_AUTOLOAD", "0")
    headless(tmp_path / "encoder")
    code = f"""
import torch
from transformers import AutoModelForSequenceClassification
base = AutoModelForSequenceClassification.from_pretrained({str(tmp_path / "encoder")!r}, num_labels=3)
from peft import get_peft_model
from peft_intrinsic import IntrinsicConfig
try:
    get_peft_model(base, IntrinsicConfig(d=20, target_modules="all"))
except ValueError as error:
    print(error)
model = get_peft_model(base, IntrinsicConfig(d=20, reinitialized=[], target_modules="all"))
print(model.peft_config["default"].reinitialized)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert "unknown whether the checkpoint contains these parameters: classifier.weight" in done.stdout
    assert done.stdout.endswith("[]\n")


def test_from_pretrained_returns_its_loading_information_as_before(tmp_path):
    headless(tmp_path / "encoder")
    _, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert "classifier.weight" in info["missing_keys"]


def test_tie_weights_after_attaching_changes_nothing():
    model = get_peft_model(build("bert_mlm"), IntrinsicConfig(d=40, init_weights=False, target_modules="all")).eval()
    expected = evaluate(model, "bert_mlm")
    model.get_base_model().tie_weights()
    assert torch.equal(evaluate(model, "bert_mlm"), expected)
    output(model, batch("bert_mlm")).square().sum().backward()
    assert model.get_base_model().intrinsic.intrinsic_theta["default"].weight.grad.abs().min() > 0


def test_a_new_head_on_transformers_ignore_list_is_recognized(tmp_path, monkeypatch):
    """TRL's RewardTrainer puts the new head there, and transformers' report leaves it out."""
    monkeypatch.setattr(BertForSequenceClassification, "_keys_to_ignore_on_load_missing", ["classifier"])
    model = get_peft_model(headless(tmp_path / "base"), IntrinsicConfig(**TASK, init_weights=False)).eval()
    assert model.peft_config["default"].reinitialized == ["classifier.weight"]
    model.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(BertForSequenceClassification, "_keys_to_ignore_on_load_missing", None)
    loaded = PeftModel.from_pretrained(headless(tmp_path / "base", seed=2), tmp_path / "adapter").eval()
    assert torch.equal(evaluate(loaded, "bert"), evaluate(model, "bert"))


def test_a_loaded_head_on_transformers_ignore_list_keeps_its_values(tmp_path, monkeypatch):
    build("bert").save_pretrained(tmp_path)
    monkeypatch.setattr(BertForSequenceClassification, "_keys_to_ignore_on_load_missing", ["classifier"])
    base = BertForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(base.classifier.weight, build("bert").classifier.weight)
    assert leaves_unchanged(base.eval(), "bert")


@pytest.mark.parametrize(("d", "labels"), [(219, 11), (40, 50)])
def test_too_few_parameters_for_many_labels_warn(d, labels, tmp_path):
    build("bert").bert.save_pretrained(tmp_path)

    def attach(d: int, **options) -> None:
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=labels)
        get_peft_model(base, IntrinsicConfig(d=d, task_type="SEQ_CLS", **options))

    with pytest.warns(UserWarning, match=f"d={d} is little for .* {labels} labels, .* below d = {20 * labels} most"):
        attach(d)
    attach(20 * labels)  # warnings are errors here
    attach(d, head="keep")
    labels = 10
    attach(d)
