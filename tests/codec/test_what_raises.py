"""Adapters that cannot be packed, and base models that a packed adapter does not fit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import Custom, build, evaluate, trained
from helpers.samples import headless
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BertForSequenceClassification

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.codec import compress, load_packed, read_packed


def named(model: PeftModel, name: str = "some/bert") -> PeftModel:
    """Give the base model of an adapter a name."""
    model.peft_config["default"].base_model_name_or_path = name
    return model


def relabeled(labels: int) -> nn.Module:
    """The tiny BERT with another number of labels."""
    config = build("bert").config
    config.num_labels = labels
    return BertForSequenceClassification(config).eval()


def changed(base: nn.Module, name: str = "bert.encoder.layer.0.output.dense.weight") -> nn.Module:
    """The model with another value in one of its weights."""
    base.get_parameter(name).data[0, 0] += 1
    return base


def with_head_to_save() -> PeftModel:
    return get_peft_model(build("bert"), IntrinsicConfig(d=20, modules_to_save=["classifier"], target_modules="all"))


def merged() -> PeftModel:
    model = trained("bert")
    model.merge_adapter()
    return model


def with_second_merged() -> PeftModel:
    model = trained("bert")
    model.add_adapter("second", IntrinsicConfig(d=20, init_weights=False, target_modules="all"))
    model.merge_adapter(["second"])
    return model


def with_lora() -> PeftModel:
    return get_peft_model(build("bert"), LoraConfig(target_modules=["query"]))


def with_other_task() -> PeftModel:
    model = trained("bert")
    model.peft_config["default"].task_type = "IMAGE_CLASSIFICATION"
    return model


@pytest.mark.parametrize(
    ("make", "adapter", "message"),
    [
        (with_head_to_save, None, r"modules_to_save=\['classifier'\] is trained fully.*without this option"),
        (merged, None, r"merged.*unmerge_adapter"),
        (with_second_merged, "default", "merged"),
        (with_lora, None, r"adapter='default' is a LoraConfig; only an IntrinsicConfig"),
        (with_other_task, None, "task_type='IMAGE_CLASSIFICATION' cannot be packed"),
        (lambda: trained("bert"), "nope", r"adapter='nope' is not attached. Attached are \['default'\]"),
    ],
)
def test_adapters_that_cannot_be_packed_raise(make, adapter, message):
    with pytest.raises(ValueError, match=message):
        compress(make(), adapter=adapter)


@pytest.mark.parametrize("vectors", ["intrinsic_theta", "intrinsic_lambda"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_parameters_that_are_not_finite_raise(vectors, value):
    model = trained("bert", said=True)
    getattr(model.get_base_model().intrinsic, vectors)["default"].weight.data[1] = value
    with pytest.raises(ValueError, match="adapter='default' has NaN or infinite parameters"):
        compress(model)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        (
            "some/bert",
            lambda: changed(build("bert")),
            r"made for some/bert \(digest [0-9a-f]{16}\); this model has other",
        ),
        ("", lambda: changed(build("bert"), "classifier.weight"), "made for a base model without a name"),
        ("some/bert", lambda: build("bert").half(), r"made for some/bert .* torch\.float16.* try torch\.float32"),
    ],
)
def test_other_weights_raise_and_leave_the_model_without_an_adapter(name, make, message):
    base = make()
    with pytest.raises(ValueError, match=message) as error:
        load_packed(base, compress(named(trained("bert"), name)))
    assert ("torch.float32" in str(error.value)) == (base.dtype != torch.float32)
    assert type(base) is BertForSequenceClassification
    assert not hasattr(base, "intrinsic")


def test_other_weights_raise_for_a_second_adapter():
    model = trained("bert", d=30)
    changed(model.get_base_model(), "bert.pooler.dense.base_layer.weight")
    with pytest.raises(ValueError, match="made for some/bert"):
        load_packed(model, compress(named(trained("bert"))), "second")


@pytest.mark.parametrize(
    ("make", "name", "message"), [(merged, "second", "merged"), (lambda: trained("bert"), "default", "default")]
)
def test_models_that_cannot_take_the_adapter_raise(make, name, message):
    with pytest.raises(ValueError, match=message):
        load_packed(make(), compress(trained("bert")), name)


def test_check_base_false_loads_onto_other_weights():
    other = changed(build("bert"))
    plain = evaluate(other, "bert")
    loaded = load_packed(other, compress(trained("bert")), check_base=False)
    assert not torch.equal(evaluate(loaded, "bert"), plain)


@pytest.mark.parametrize("check", [True, False])
def test_another_number_of_labels_raises(check):
    data = compress(trained("bert", task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match=r"The adapter has 3 labels, this model 5\. Load .* with num_labels=3"):
        load_packed(relabeled(5), data, check_base=check)


@pytest.mark.parametrize("target", ["all", "norms-and-biases"])
def test_another_number_of_labels_of_a_reinitialized_head_raises(target, tmp_path):
    base = headless(tmp_path / "encoder")
    data = compress(get_peft_model(base, IntrinsicConfig(d=30, task_type="SEQ_CLS", target_modules=target)))
    other = relabeled(5).from_pretrained(tmp_path / "encoder", num_labels=5)
    for check in (True, False):
        with pytest.raises(ValueError, match=r"The adapter has \d labels, this model 5"):
            load_packed(other, data, check_base=check)


@pytest.mark.parametrize("family", ["llama", "roberta", "custom"])
def test_another_architecture_raises_even_without_check_base(family):
    with pytest.raises(ValueError, match=r"made for|parameters"):
        load_packed(build(family), compress(trained("bert")), check_base=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(3, 2), "made for encoder, which has more than the 2 parameters of this model"),
        (lambda: build("bert"), r"classifier\.weight from a fixed seed.*loaded or trained values"),
    ],
)
def test_models_without_the_reinitialized_parameters_raise(make, message, tmp_path):
    model = get_peft_model(headless(tmp_path / "encoder"), IntrinsicConfig(d=30, task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match=message):
        load_packed(make(), compress(model))


def test_a_base_in_bfloat16_has_the_same_digest():
    data = compress(trained("bert", said=True))
    model = load_packed(build("bert").to(torch.bfloat16), data)
    assert model.get_base_model().intrinsic.intrinsic_theta["default"].weight.dtype == torch.float32
    difference = evaluate(model, "bert").float() - evaluate(load_packed(build("bert"), data), "bert")
    assert difference.abs().max() < 0.1


HOSTILE = [
    {"lambda_granularity": "module"},
    {"scales": 1},
    {"scales": 5},
    {"task_type": "CAUSAL_LM"},
    {"block_size": 2**62},
    {"block_size": 2**63},
    {"target_modules": [["query"]]},
    {"layers_to_transform": "x"},
    {"exclude_modules": "("},
    {"reinitialized": [0]},
    {"reinitialized": [2**31]},
    {"exclude_modules": "a{e<1:b"},  # valid in re, invalid in regex
]


@pytest.mark.parametrize("changes", HOSTILE, ids=str)
def test_well_formed_files_that_fit_no_model_raise_and_leave_it_unchanged(changes):
    packed = read_packed(compress(trained("bert", said=True)))
    own = {name: changes[name] for name in ("block_size", "reinitialized") if name in changes}
    options = {name: value for name, value in changes.items() if name in packed.options}
    if m := changes.get("scales"):
        values = np.resize(np.unique(packed.theta), 200)
        own |= {"theta": values[m:], "scales": values[:m]}
    data = replace(packed, options={**packed.options, **options}, **own).to_bytes()
    model = trained("bert", d=30)
    before = evaluate(model, "bert")
    with pytest.raises(ValueError, match=r"\w+"):
        load_packed(model, data, "second", check_base=False)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(evaluate(model, "bert"), before)
    base = build("bert")
    with pytest.raises(ValueError, match=r"\w+"):
        load_packed(base, data, check_base=False)
    assert base.state_dict().keys() == build("bert").state_dict().keys()


def test_a_later_algorithm_version_raises_with_the_upgrade():
    data = replace(read_packed(compress(trained("bert"))), algorithm=2).to_bytes()
    with pytest.raises(ValueError, match=r"algorithm_version=2; .* Upgrade"):
        load_packed(build("bert"), data)


def test_adapters_of_models_without_a_configuration_are_packed():
    model = get_peft_model(Custom(), IntrinsicConfig(d=20, target_modules="all"))
    assert read_packed(compress(model)).classes == 0
