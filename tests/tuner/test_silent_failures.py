"""Errors instead of silently wrong results."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import batch, build, evaluate, trained
from peft import PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import nn
from transformers import BertForSequenceClassification

from peft_intrinsic import AdapterBank, IntrinsicConfig, save_as_lora

LAYERS = [{f"layers.{i}.up.{own}" for own in ("weight", "bias")} for i in (0, 1)]
WHOLE = {"d": 40, "target_modules": ["query", "value"], "modules_to_save": ["classifier"], "init_weights": False}


def with_whole(family: str, **options) -> PeftModel:
    """An adapter with a fully trained module."""
    model = get_peft_model(build(family), IntrinsicConfig(**{**WHOLE, **options})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.default" in name:
                parameter.add_(0.5)
    return model


def test_a_bank_of_adapters_with_fully_trained_modules_raises(tmp_path):
    model = with_whole("bert")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"modules_to_save=\['classifier'\] of adapter 'default': a bank stores d"):
        AdapterBank(model, torch.zeros(1, 40))
    plain = get_peft_model(build("bert"), IntrinsicConfig(**{**WHOLE, "modules_to_save": None})).eval()
    with pytest.raises(ValueError, match=rf"modules_to_save=\['classifier'\] of {tmp_path}"):
        AdapterBank.from_pretrained(plain, [str(tmp_path)])
    plain.add_adapter("whole", IntrinsicConfig(**WHOLE))
    bank = AdapterBank(plain, torch.zeros(1, 40), "default")
    plain.set_adapter("whole")
    with pytest.raises(ValueError, match="of the active adapter 'whole'"), bank.select([0]):
        pass
    plain.set_adapter("default")
    with bank.select([0]):
        pass


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted")
def test_a_bank_raises_after_its_adapter_was_merged_or_deleted():
    model = trained("bert")
    bank = AdapterBank(model, torch.zeros(1, 200))
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"), bank.select([0]):
        pass
    model.unmerge_adapter()
    model.add_adapter("other", IntrinsicConfig(d=200, target_modules="all"))
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="Adapter 'default' with the projection of the bank is no longer attached"):
        bank.select([0]).__enter__()
    model.add_adapter("default", IntrinsicConfig(d=200, target_modules="all", seed=7))
    with pytest.raises(ValueError, match="Adapter 'default' with the projection"):
        bank.select([0]).__enter__()


def test_a_sum_with_fully_trained_modules_raises():
    model = get_peft_model(build("bert"), IntrinsicConfig(**{**WHOLE, "modules_to_save": None}))
    model.add_adapter("whole", IntrinsicConfig(**WHOLE))
    with pytest.raises(ValueError, match=r"\['classifier'\] of adapter 'whole' cannot be combined"):
        model.base_model.add_weighted_adapter(["default", "whole"], [0.0, 1.0], "sum")


def test_fully_trained_modules_are_stored_in_a_lora(tmp_path):
    model = with_whole("llama", target_modules=["q_proj", "v_proj"], modules_to_save=["model.norm"])
    expected = evaluate(model, "llama")
    model.merge_adapter()
    with pytest.raises(ValueError, match="An adapter is merged"):
        save_as_lora(tmp_path, model)
    model.unmerge_adapter()
    save_as_lora(tmp_path, model)
    lora = PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    torch.testing.assert_close(evaluate(lora, "llama"), expected, rtol=1e-4, atol=1e-5)


def test_a_new_head_that_is_not_adapted_is_stored_in_a_lora(tmp_path):
    """A plain base model has another random head."""
    build("bert").bert.save_pretrained(tmp_path / "encoder")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "encoder", num_labels=3)
    options = {"d": 40, "task_type": "SEQ_CLS", "exclude_modules": ["classifier"], "target_modules": ["query"]}
    model = get_peft_model(base, IntrinsicConfig(**options, init_weights=False))
    save_as_lora(tmp_path / "lora", model, accept_loss=True)
    other = BertForSequenceClassification.from_pretrained(tmp_path / "encoder", num_labels=3)
    lora = PeftModel.from_pretrained(other, tmp_path / "lora").get_base_model()
    assert torch.equal(lora.classifier.modules_to_save["default"].weight, base.classifier.weight)


def test_writing_into_an_adapted_weight_raises():
    """The value would be lost, because the weight is computed at each read."""
    model = trained("bert")
    weight = model.get_base_model().classifier.weight
    for write in (lambda: weight.copy_(torch.ones_like(weight)), lambda: nn.init.ones_(weight), lambda: weight.zero_()):
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"writes into an adapted parameter"):
            write()
    out = torch.empty(len(weight), 24)
    torch.add(weight.detach(), 0, out=out)  # reading it into another is fine
    assert torch.equal(out, weight)


def test_replicas_of_data_parallel_raise():
    """Its copies of modules would read the parameters of the first device."""
    norm = trained("bert").get_base_model().bert.embeddings.LayerNorm
    with pytest.raises(RuntimeError, match=r"DistributedDataParallel .*CUDA_VISIBLE_DEVICES=0"):
        norm._replicate_for_data_parallel()(torch.zeros(2, 24))


def test_offsets_of_activated_loras_raise():
    with pytest.raises(ValueError, match=r"alora_offsets=\[1, 1, 1, 1\] is only for activated LoRAs"):
        trained("bert")(**batch("bert"), alora_offsets=[1] * 4)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.merge_adapter(["other"]),
        lambda model: model.merge_and_unload(adapter_names=["other"]),
        lambda model: model.base_model.set_adapter(["default", "other"]),
        lambda model: model.set_requires_grad("other"),
    ],
)
def test_unknown_adapters_raise(call):
    model = trained("bert")
    expected = evaluate(model, "bert")
    with pytest.raises(ValueError, match=r"adapter='other' is not attached. Attached are \['default'\]"):
        call(model)
    assert torch.equal(evaluate(model, "bert"), expected)


def test_disabling_input_casting_does_not_change_outputs():
    model = trained("bert")
    expected = evaluate(model, "bert")
    with disable_input_dtype_casting(model):
        assert torch.equal(evaluate(model, "bert"), expected)


class Tokens(nn.Module):
    """Parameters at the root, as a vision transformer's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cls, self.place = nn.Parameter(torch.randn(24)), nn.Parameter(torch.randn(3, 24))
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(24, 24)}) for _ in range(2)])


@pytest.mark.filterwarnings("ignore:You have passed exclude_modules")  # PEFT counts modules alone
@pytest.mark.parametrize(
    ("options", "moved"),
    [
        ({}, {"cls", "place", *LAYERS[0], *LAYERS[1]}),
        ({"exclude_modules": ["cls"]}, {"place", *LAYERS[0], *LAYERS[1]}),
        ({"exclude_modules": r"cls|place|.*\.0\..*"}, LAYERS[1]),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, LAYERS[0]),
        ({"target_modules": None, "exclude_modules": ["cls"]}, {"layers.0.up.bias", "layers.1.up.bias"}),
    ],
)
def test_parameters_of_the_root_can_be_excluded(options, moved):
    model = get_peft_model(Tokens(), IntrinsicConfig(**{"d": 20, "target_modules": "all", **options}))
    offsets = [layer.offsets["default"] for layer in model.base_model.tuner_layers()]
    assert {offset.name for each in offsets for offset in each.values()} == moved


def test_unfrozen_base_parameters_get_their_gradient():
    """As those of a plain layer do, however they are read."""
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 2))
    plain, images = copy.deepcopy(conv), torch.randn(5, 3, 2, 2)
    model = get_peft_model(conv, IntrinsicConfig(d=30, target_modules="all"))
    kernel = model.get_base_model()[0]._parameters["weight"].requires_grad_(True)
    model(images).square().sum().backward()
    plain(images).square().sum().backward()
    torch.testing.assert_close(kernel.grad, plain[0].weight.grad)
