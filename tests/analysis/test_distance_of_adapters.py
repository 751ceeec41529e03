"""Distances of models with adapters include the offsets and leave the weights unchanged."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import build, evaluate, trained
from peft import IA3Config, LoraConfig, OFTConfig, PeftModel, get_peft_model

from peft_intrinsic import IntrinsicConfig, SupermaskConfig
from peft_intrinsic.analysis import parameter_distance


@pytest.mark.parametrize("family", ["bert", "gpt2", "bert_mlm"])
def test_the_distance_of_an_adapter_equals_that_of_the_merged_model(family):
    model = trained(family)
    found = parameter_distance(build(family), model)
    merged = parameter_distance(build(family), model.merge_and_unload())
    assert found.tensors.keys() == merged.tensors.keys()
    assert found.total.l2_relative > 0
    for name, sums in found.tensors.items():
        for measure in ("l1", "l2_relative", "angular"):
            a, b = getattr(sums, measure), getattr(merged.tensors[name], measure)
            assert a == pytest.approx(b, rel=1e-3, abs=1e-6, nan_ok=True), (name, measure)


OTHERS = [
    LoraConfig(target_modules=["query", "dense"], init_lora_weights=False, modules_to_save=["classifier"]),
    LoraConfig(target_modules=["query"], init_lora_weights=False, use_dora=True),
    OFTConfig(target_modules=["query"], oft_block_size=4),
    IA3Config(target_modules=["key"], feedforward_modules=[], init_ia3_weights=False),
    SupermaskConfig(target_modules=["query", "dense"], initial_sparsity=0.2),
]


@pytest.mark.parametrize("config", OTHERS, ids=lambda config: type(config).__name__)
def test_adapters_of_other_tuners_are_measured_and_unchanged(config):
    model = get_peft_model(build("bert"), copy.deepcopy(config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape) * p.requires_grad)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = parameter_distance(build("bert"), model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    merged = parameter_distance(build("bert"), model.merge_and_unload())
    assert found.total.l1 > 0
    for name, sums in found.tensors.items():
        assert sums.l1 == pytest.approx(merged.tensors[name].l1, rel=1e-4, abs=1e-5), name


def test_two_equal_masks_give_the_distance_of_one(tmp_path):
    model = get_peft_model(build("bert"), SupermaskConfig(target_modules=["query"], initial_sparsity=0.2))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path)
    loaded.load_adapter(tmp_path, "same")
    loaded.base_model.set_adapter(["default", "same"])
    one = parameter_distance(build("bert"), model).total
    assert parameter_distance(build("bert"), loaded).total.l1 == pytest.approx(one.l1) != 0


def test_a_mask_that_a_forward_pass_applied_is_measured_and_unchanged(tmp_path):
    """The first forward pass writes its zeros into the weight."""
    model = get_peft_model(build("bert"), SupermaskConfig(target_modules=["query"], initial_sparsity=0.2))
    model.save_pretrained(tmp_path)
    wanted = parameter_distance(build("bert"), model).total
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path).eval()
    masked = evaluate(loaded, "bert")
    assert parameter_distance(build("bert"), loaded).total.l1 == pytest.approx(wanted.l1) != 0
    assert parameter_distance(loaded.get_base_model(), loaded).total.l1 == pytest.approx(wanted.l1)
    assert torch.equal(evaluate(loaded, "bert"), masked)
    weights = dict(build("bert").named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in loaded.unload().named_parameters())


@pytest.mark.parametrize(
    "config", [IntrinsicConfig(d=20, modules_to_save=["classifier"]), OTHERS[0]], ids=lambda config: config.peft_type
)
def test_fully_trained_modules_differ_from_the_base_that_holds_the_adapter(config):
    model = get_peft_model(build("bert"), copy.deepcopy(config))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape) * p.requires_grad)
    wanted = parameter_distance(build("bert"), model)
    found = parameter_distance(model.get_base_model(), model)
    assert found.tensors["classifier.weight"].l1 > 0
    assert {name: sums.l1 for name, sums in found.tensors.items()} == {
        name: sums.l1 for name, sums in wanted.tensors.items()
    }


def test_merged_adapters_raise_an_error_and_tied_parameters_count_once():
    model = get_peft_model(build("bert"), LoraConfig(target_modules=["query"], init_lora_weights=False))
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged into the model"):
        parameter_distance(build("bert"), model)
    config = IntrinsicConfig(d=20, target_modules=["lm_head"], init_weights=False)
    found = parameter_distance(build("gpt2"), get_peft_model(build("gpt2"), config))
    assert [name for name, sums in found.tensors.items() if sums.l1] == ["transformer.wte.weight"]
    state = build("gpt2").state_dict()
    assert parameter_distance(state, build("gpt2")).total.l1 == 0
