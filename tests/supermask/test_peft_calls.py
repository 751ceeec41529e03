"""PEFT's calls on masks: they work, or raise an error."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import batch, build, evaluate
from helpers.masked_models import layers, masked
from peft import PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting

from peft_intrinsic import SupermaskConfig

QUERIES = {"initial_sparsity": 0.2, "target_modules": ["query"]}


def with_nan(model) -> PeftModel:
    """The model with a NaN in the scores of its last layer."""
    with torch.no_grad():
        layers(model)[-1][1].supermask_scores["default"].weight[0, 0] = torch.nan
    return model


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_adapter_names_raise(call):
    model = masked("llama")
    model.add_adapter("b", SupermaskConfig(initial_sparsity=0.3, init="random"))
    names = ["default", "b", "__base__", "b"]
    with pytest.raises(ValueError, match=r"adapter_names=\['default', 'b', '__base__', 'b'\] is not supported by"):
        getattr(model, call)(**batch("llama"), adapter_names=names)


def test_offsets_of_activated_loras_raise():
    with pytest.raises(ValueError, match=r"alora_offsets=\[1, 1, 1, 1\] is not supported by SupermaskConfig"):
        masked()(**batch("bert"), alora_offsets=[1] * 4)


def test_copying_parameters_by_name_copies_the_mask():
    """TRL makes the reference of an adapter that is trained further in this way."""
    model = masked()
    expected = evaluate(model, "bert")
    model.add_adapter("ref", model.peft_config["default"])
    copy_by_name(model)
    model.set_adapter("ref")
    assert torch.equal(evaluate(model, "bert"), expected)


def test_copying_parameters_by_name_replaces_loading_a_saved_mask(tmp_path):
    masked(save_scores=True).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build("bert"), tmp_path, is_trainable=True).eval()
    expected = evaluate(model, "bert")
    model.add_adapter("ref", model.peft_config["default"])
    model.set_adapter("ref")
    with pytest.raises(ValueError, match="saved mask of adapter 'ref' was not loaded"):
        evaluate(model, "bert")
    copy_by_name(model)
    assert torch.equal(evaluate(model, "bert"), expected)


def copy_by_name(model) -> None:
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if ".default." in name:
            parameters[name.replace(".default.", ".ref.")].data.copy_(parameter.data)


@pytest.mark.parametrize(
    "option", [{"trainable_token_indices": {"word_embeddings": [1]}}, {"target_parameters": ["b"]}]
)
def test_options_that_are_set_after_the_configuration_was_made_raise(option):
    """Trainers of other libraries set options so."""
    config = SupermaskConfig(**QUERIES)
    config.__dict__.update(option)
    base = build("bert")
    with pytest.raises(ValueError, match=rf"{next(iter(option))}=.* is not supported by SupermaskConfig"):
        get_peft_model(base, config)
    assert not layers(base)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.merge_adapter(["other"]),
        lambda model: model.merge_and_unload(adapter_names=["other"]),
        lambda model: model.base_model.set_adapter(["default", "other"]),
        lambda model: model.set_requires_grad("other"),
        lambda model: model.base_model.sparsity("other"),
    ],
)
def test_unknown_adapters_raise(call):
    model = masked()
    with pytest.raises(ValueError, match=r"adapter='other' is not attached. Attached are \['default'\]"):
        call(model)
    assert layers(model)


def test_a_merge_that_raises_leaves_all_layers_unmerged():
    for call in ("merge_adapter", "merge_and_unload"):
        model = with_nan(masked(base=build("bert")))
        with pytest.raises(ValueError, match="NaN or infinite"):
            getattr(model, call)()
        for name, layer in layers(model):
            assert torch.equal(layer.base_layer.weight, build("bert").get_parameter(f"{layer.name}.weight")), name


def test_a_mask_that_was_not_loaded_is_neither_merged_nor_saved(tmp_path):
    model = masked(**QUERIES)
    model.save_pretrained(tmp_path / "one")
    model.add_adapter("b", SupermaskConfig.from_pretrained(tmp_path / "one"))
    for call in (lambda: model.merge_adapter(["b"]), lambda: model.save_pretrained(tmp_path, selected_adapters=["b"])):
        with pytest.raises(ValueError, match="saved mask of adapter 'b' was not loaded"):
            call()


def test_training_an_adapter_that_was_loaded_for_inference_raises(tmp_path):
    masked(**QUERIES).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build("bert"), tmp_path)
    with pytest.raises(ValueError, match=r"Adapter 'default' was loaded for inference .* is_trainable=True"):
        model.set_requires_grad("default")
    model.set_requires_grad("default", False)


def test_a_new_adapter_for_inference_has_its_initial_mask():
    expected = evaluate(get_peft_model(build("bert"), SupermaskConfig(**QUERIES)).eval(), "bert")
    assert not torch.equal(expected, evaluate(build("bert"), "bert"))
    model = get_peft_model(build("bert"), SupermaskConfig(**QUERIES, inference_mode=True)).eval()
    assert torch.equal(evaluate(model, "bert"), expected)


def test_scores_stay_in_float32():
    base = build("bert").to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"autocast_adapter_dtype=False .* in torch\.bfloat16: .* float32"):
        get_peft_model(copy.deepcopy(base), SupermaskConfig(**QUERIES), autocast_adapter_dtype=False)
    model = get_peft_model(build("bert"), SupermaskConfig(**QUERIES), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_scores_load_bitwise_onto_a_base_in_half_precision(tmp_path):
    masked(**QUERIES, save_scores=True).save_pretrained(tmp_path)
    base = build("bert").to(torch.bfloat16)
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    low = PeftModel.from_pretrained(base, tmp_path, is_trainable=True, low_cpu_mem_usage=True)
    for (_, one), (_, two) in zip(layers(plain), layers(low), strict=True):
        assert torch.equal(one.supermask_scores["default"].weight, two.supermask_scores["default"].weight)


def test_disabled_casting_of_inputs_changes_no_output():
    model = masked()
    expected = evaluate(model, "bert")
    with disable_input_dtype_casting(model):
        assert torch.equal(evaluate(model, "bert"), expected)
