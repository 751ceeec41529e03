"""Digests of the base model in a packed adapter, against their definition in docs/packed_format.md."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import build, trained
from helpers.reader import base_digest, read
from helpers.samples import headless
from peft import get_peft_model
from torch import nn

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.codec import compress
from peft_intrinsic.tuner import base_model


def by_the_page(model: nn.Module, without: tuple[str, ...] = ()) -> str:
    """The digest of a model without adapters, by the reader that was written from the page."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return base_digest(
        (name, parameter.detach().float().numpy())
        for name, parameter in parameters.items()
        if parameter.is_floating_point() and name not in without
    )


def digest(model: nn.Module, *without: str) -> str:
    return base_model.base_digest(model, without).hex()


@pytest.mark.parametrize("family", ["bert", "bert_mlm", "gpt2", "vit", "custom", "mamba"])
def test_digest_is_that_of_the_page(family):
    assert digest(build(family)) == by_the_page(build(family))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_digest_does_not_depend_on_the_precision_of_loading(family):
    stored = build(family).to(torch.bfloat16)
    assert digest(stored) == digest(build(family).to(torch.bfloat16).float()) == digest(build(family))


def test_digest_rounds_halves_to_even_as_the_page_does():
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8]])
    assert digest(model) == by_the_page(model) == by_the_page(model.to(torch.bfloat16))


def test_digest_of_a_parameter_without_axes_is_that_of_the_page():
    model = nn.Module()
    model.temperature = nn.Parameter(torch.tensor(0.5))
    assert digest(model) == by_the_page(model)


def test_digest_leaves_out_integers():
    model = nn.Linear(3, 2)
    before = digest(model)
    model.code = nn.Parameter(torch.arange(4), requires_grad=False)
    assert digest(model) == before


def scale_one_weight(model: nn.Module) -> None:
    model.bert.encoder.layer[1].output.dense.weight.data[3, 5] *= 1.01


def transpose_a_weight(model: nn.Module) -> None:
    weight = model.bert.encoder.layer[0].output.dense.weight
    weight.data = weight.data.reshape(weight.shape[::-1])


def rename_a_parameter(model: nn.Module) -> None:
    model.bert.other = model.bert.pooler
    del model.bert.pooler


@pytest.mark.parametrize("change", [scale_one_weight, transpose_a_weight, rename_a_parameter])
def test_other_values_shapes_and_names_change_the_digest(change):
    model = build("bert")
    change(model)
    assert digest(model) != digest(build("bert"))


@pytest.mark.parametrize("family", ["bert", "bert_mlm", "llama", "vit", "custom", "mamba"])
@pytest.mark.parametrize("options", [{}, {"target_modules": "norms-and-biases", "said": True, "d": 100}])
def test_attached_adapters_do_not_change_the_digest(family, options):
    model = trained(family, **options)
    assert digest(model.get_base_model()) == digest(build(family))
    model.add_adapter("second", IntrinsicConfig(d=20, target_modules="all"))
    assert digest(model.get_base_model()) == digest(build(family))


def test_added_biases_and_modules_to_save_do_not_change_the_digest():
    model = trained("llama", add_bias=True, target_modules=["q_proj"], d=48)
    assert digest(model.get_base_model()) == digest(build("llama"))
    model = trained("bert", modules_to_save=["classifier"])
    model.base_model.model.classifier.modules_to_save["default"].weight.data.add_(1)
    assert digest(model.get_base_model()) == digest(build("bert"))


def test_a_merged_model_raises():
    model = trained("bert")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged.*unmerge_adapter"):
        digest(model.get_base_model())
    model.unmerge_adapter()


def test_offloaded_weights_raise():
    model = build("bert")
    model.classifier.to("meta")
    with pytest.raises(ValueError, match=r"classifier\.\w+ is offloaded"):
        digest(model)


def test_file_leaves_reinitialized_parameters_out_of_the_digest(tmp_path):
    base = headless(tmp_path / "encoder")
    model = get_peft_model(base, IntrinsicConfig(d=30, init_weights=False, task_type="SEQ_CLS", target_modules="all"))
    fields = read(compress(model))
    plain = headless(tmp_path / "encoder", seed=2)
    assert fields["base_digest"] == by_the_page(plain, without=("classifier.weight",))
    names = sorted(name for name, _ in plain.named_parameters())
    assert [names[i] for i in fields["reinitialized"]] == ["classifier.weight"]


def test_indexes_count_tied_parameters_under_each_of_their_names():
    model = trained("bert_mlm", reinitialized=["cls.predictions.transform.dense.weight"])
    names = sorted(name for name, _ in build("bert_mlm").named_parameters(remove_duplicate=False))
    assert len(names) > len(dict(build("bert_mlm").named_parameters()))
    assert [names[i] for i in read(compress(model))["reinitialized"]] == ["cls.predictions.transform.dense.weight"]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_manifest_digest_is_the_start_of_the_manifest_in_the_configuration(family, tmp_path):
    model = trained(family)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert read(compress(model))["manifest_digest"] == config["manifest"][:16]
