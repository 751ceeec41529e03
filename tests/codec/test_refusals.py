"""What cannot be packed, and base models that a packed adapter was not made for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import Custom, build, evaluate, trained
from helpers.samples import headless
from peft import LoraConfig, get_peft_model
from transformers import BertForSequenceClassification

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.codec import compress, load_packed, quantization_aware, read_packed


def named(model, name: str = "some/bert"):
    """The adapter, as of a base model that has this name."""
    model.peft_config["default"].base_model_name_or_path = name
    return model


def relabelled(labels: int) -> torch.nn.Module:
    """The tiny BERT with another number of labels."""
    config = build("bert").config
    config.num_labels = labels
    return BertForSequenceClassification(config).eval()


def test_modules_saved_in_full_are_refused():
    model = get_peft_model(build("bert"), IntrinsicConfig(d=20, modules_to_save=["classifier"], target_modules="all"))
    with pytest.raises(ValueError, match=r"modules_to_save=\['classifier'\] is trained fully.*without this option"):
        compress(model)


def test_merged_adapters_are_refused():
    model = trained("bert")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged.*unmerge_adapter"):
        compress(model)


def test_another_merged_adapter_is_refused():
    model = trained("bert")
    model.add_adapter("second", IntrinsicConfig(d=20, init_weights=False, target_modules="all"))
    model.merge_adapter(["second"])
    with pytest.raises(ValueError, match="merged"):
        compress(model, adapter="default")


def test_loading_onto_a_merged_model_is_refused():
    model = trained("bert")
    data = compress(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        load_packed(model, data, "second")


def test_lora_adapters_are_refused():
    with pytest.raises(ValueError, match=r"adapter='default' is a LoraConfig; only an IntrinsicConfig"):
        compress(get_peft_model(build("bert"), LoraConfig(target_modules=["query"])))


@pytest.mark.parametrize("vectors", ["intrinsic_theta", "intrinsic_lambda"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(vectors, value):
    model = trained("bert", said=True)
    getattr(model.get_base_model().intrinsic, vectors)["default"].weight.data[1] = value
    with pytest.raises(ValueError, match="adapter='default' has NaN or infinite parameters"):
        compress(model)


def test_tasks_that_the_format_does_not_know_are_refused():
    model = trained("bert")
    model.peft_config["default"].task_type = "IMAGE_CLASSIFICATION"
    with pytest.raises(ValueError, match="task_type='IMAGE_CLASSIFICATION' cannot be packed"):
        compress(model)


def test_an_unknown_adapter_is_refused():
    model = trained("bert")
    with pytest.raises(ValueError, match=r"adapter='nope' is not attached. Attached are \['default'\]"):
        compress(model, adapter="nope")
    with pytest.raises(ValueError, match="adapter='nope'"), quantization_aware(model, 4, adapter="nope"):
        pass


def test_other_weights_are_refused_with_the_name_of_the_base():
    data = compress(named(trained("bert")))
    other = build("bert")
    other.bert.encoder.layer[0].output.dense.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=r"made for some/bert \(digest [0-9a-f]{16}\); this model has other weights"):
        load_packed(other, data)
    assert type(other) is BertForSequenceClassification
    assert not hasattr(other, "intrinsic")


def test_other_weights_are_refused_beside_another_adapter():
    data = compress(named(trained("bert")))
    other = trained("bert", d=30)
    other.get_base_model().bert.pooler.dense.base_layer.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="made for some/bert"):
        load_packed(other, data, "second")


def test_a_base_in_half_precision_is_told_what_may_differ():
    data = compress(named(trained("bert")))
    with pytest.raises(ValueError, match=r"made for some/bert .* torch\.float16"):
        load_packed(build("bert").half(), data)
    other = build("bert")
    other.classifier.weight.data.add_(1)
    with pytest.raises(ValueError, match="made for some/bert") as error:
        load_packed(other, data)
    assert "torch.float32" not in str(error.value)


def test_a_base_without_a_name_is_called_so():
    other = build("bert")
    other.classifier.weight.data.add_(1)
    with pytest.raises(ValueError, match="made for a base model without a name"):
        load_packed(other, compress(named(trained("bert"), "")))


def test_check_base_false_takes_other_weights():
    data = compress(trained("bert"))
    other = build("bert")
    other.bert.encoder.layer[0].output.dense.weight.data[0, 0] += 1
    plain = evaluate(other, "bert")
    assert not torch.equal(evaluate(load_packed(other, data, check_base=False), "bert"), plain)


@pytest.mark.parametrize("check", [True, False])
def test_another_number_of_labels_is_refused(check):
    data = compress(trained("bert", task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match=r"The adapter has 3 labels, this model 5\. Load .* with num_labels=3"):
        load_packed(relabelled(5), data, check_base=check)


@pytest.mark.parametrize("target", ["all", "norms-and-biases"])
def test_another_number_of_labels_of_a_fresh_head_is_refused(target, tmp_path):
    base = headless(tmp_path / "encoder")
    model = get_peft_model(base, IntrinsicConfig(d=30, task_type="SEQ_CLS", target_modules=target))
    data = compress(model)
    other = relabelled(5).from_pretrained(tmp_path / "encoder", num_labels=5)
    for check in (True, False):
        with pytest.raises(ValueError, match=r"The adapter has \d labels, this model 5"):
            load_packed(other, data, check_base=check)


@pytest.mark.parametrize("family", ["llama", "roberta", "custom"])
def test_another_architecture_is_refused_even_unchecked(family):
    with pytest.raises(ValueError, match=r"made for|parameters"):
        load_packed(build(family), compress(trained("bert")), check_base=False)


def test_a_base_with_fewer_parameters_than_were_reinitialized_is_refused(tmp_path):
    model = get_peft_model(headless(tmp_path / "encoder"), IntrinsicConfig(d=30, task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="made for encoder, which has more than the 2 parameters of this model"):
        load_packed(torch.nn.Linear(3, 2), compress(model))


def test_a_head_of_its_own_is_refused_where_the_adapter_started_from_a_fresh_one(tmp_path):
    model = get_peft_model(headless(tmp_path / "encoder"), IntrinsicConfig(d=30, task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match=r"classifier\.weight from a fixed seed.*loaded or trained values"):
        load_packed(build("bert"), compress(model))


def test_a_base_in_bfloat16_is_the_same_base():
    data = compress(trained("bert", said=True))
    model = load_packed(build("bert").to(torch.bfloat16), data)
    assert model.get_base_model().intrinsic.intrinsic_theta["default"].weight.dtype == torch.float32
    difference = evaluate(model, "bert").float() - evaluate(load_packed(build("bert"), data), "bert")
    assert difference.abs().max() < 0.1


def test_a_name_that_is_taken_is_refused():
    model = trained("bert")
    with pytest.raises(ValueError, match="default"):
        load_packed(model, compress(model))


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
    {"exclude_modules": "a{e<1:b"},  # an expression for re, but not for regex
]


@pytest.mark.parametrize("changes", HOSTILE, ids=str)
def test_well_formed_files_that_fit_no_model_are_refused_and_leave_it_alone(changes):
    packed = read_packed(compress(trained("bert", said=True)))
    own = {name: changes[name] for name in ("block_size", "reinitialized") if name in changes}
    options = {name: value for name, value in changes.items() if name in packed.options}
    if m := changes.get("scales"):
        numbers = np.resize(np.unique(packed.theta), 200)
        own |= {"theta": numbers[m:], "scales": numbers[:m]}
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


def test_a_later_algorithm_asks_for_an_upgrade():
    data = replace(read_packed(compress(trained("bert"))), algorithm=2).to_bytes()
    with pytest.raises(ValueError, match=r"algorithm_version=2; .* Upgrade"):
        load_packed(build("bert"), data)


def test_models_without_a_configuration_can_be_packed():
    model = get_peft_model(Custom(), IntrinsicConfig(d=20, target_modules="all"))
    assert read_packed(compress(model)).classes == 0
