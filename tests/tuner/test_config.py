"""Options of the configuration, and errors that name the option, its value and what to do."""

from __future__ import annotations

import dataclasses
import json
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from conftest import build, evaluate
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.utils import save_and_load
from torch import nn

import peft_intrinsic
from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.projection import PROJECTIONS


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"d": 0}, ValueError, "d must be at least 1 .* got 0"),
        ({"d": -3}, ValueError, "d must be at least 1 .* got -3"),
        ({"d": 2.5}, TypeError, "d must be an int, got 2.5 of type float"),
        ({"d": "200"}, TypeError, "d must be an int, got '200' of type str"),
        ({"d": True}, TypeError, "d must be an int, got True"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"block_size": 48}, ValueError, "block_size must be a power of two, got 48. Try 32 or 64"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1"),
        ({"scale": "none"}, ValueError, r"scale must be one of \('fan_in', 'isometric'\), got 'none'"),
        ({"projection": "sparse"}, ValueError, "projection must be one of .* got 'sparse'"),
        ({"lambda_granularity": "head"}, ValueError, "lambda_granularity must be one of"),
        ({"head": "train"}, ValueError, "head must be one of"),
        ({"target_modules": ".*", "layers_to_transform": [0]}, ValueError, "layers_to_transform=.* as a list"),
        (
            {"target_parameters": ["query.weight"], "layers_to_transform": [0]},
            ValueError,
            "layers_to_transform=.0. selects among target_modules, not among target_parameters",
        ),
        ({"block_size": 16, "projection": "dense"}, ValueError, "block_size=16 has no effect on projection='dense'"),
        ({"layers_pattern": "layer"}, ValueError, "layers_pattern='layer' needs layers_to_transform"),
        ({"rank": 8}, TypeError, "rank"),
        ({"task_type": "SEQ_CLASS"}, ValueError, "Invalid task type"),
    ],
)
def test_invalid_options_raise_and_are_named(options, error, message):
    with pytest.raises(error, match=message):
        IntrinsicConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d": 4, "said": True}, r"d=4 must exceed the number of λ, which is 4 .*'layer'"),
        ({"d": 4, "said": True, "lambda_granularity": "tensor"}, "which is 24 .*'tensor'"),
        ({"target_modules": ["nothing"]}, "nothing.* not found"),
        ({"target_modules": ["attention"]}, "attention.* matched no module with parameters of its own"),
        (
            {"d": 20, "target_modules": ["quary"], "task_type": "SEQ_CLS"},
            "quary.* matched no module",
        ),  # but the head is
        ({"d": 13_000, "projection": "dense"}, "projection='dense' would store"),
        ({"d": 1_000_000}, r"d=1000000 exceeds the \d+ weights selected by target_modules=\'all\'. Use d ≤ \d+"),
        ({"block_size": 2**26}, r"block_size=67108864 needs .* random numbers for \d+ adapted weights"),
    ],
)
def test_a_failed_attachment_leaves_the_model_unchanged(options, message):
    model = build("bert")
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, IntrinsicConfig(**options))
    assert [name for name, _ in model.named_modules()] == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_failed_second_adapter_leaves_the_first_unchanged():
    model = get_peft_model(build("vit"), IntrinsicConfig(d=20, init_weights=False)).eval()
    expected = evaluate(model, "vit")
    with pytest.raises(ValueError, match="d=3 must exceed"):
        model.add_adapter("second", IntrinsicConfig(d=3, said=True))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(evaluate(model, "vit"), expected)


def test_a_model_with_an_attribute_of_the_same_name_raises():
    model = nn.Sequential(nn.Linear(3, 3))
    model.intrinsic = nn.Identity()
    with pytest.raises(ValueError, match="attribute 'intrinsic'"):
        get_peft_model(model, IntrinsicConfig(d=2))


def test_a_failed_attachment_leaves_the_configuration_unchanged():
    config = IntrinsicConfig(d=2, said=True, target_modules=["query"])
    before = config.to_dict()
    with pytest.raises(ValueError, match="d=2 must exceed"):
        get_peft_model(build("bert"), config)
    assert {**config.to_dict(), "base_model_name_or_path": None} == {**before, "base_model_name_or_path": None}


def test_replace_copies_the_options():
    config = IntrinsicConfig(d=20, task_type="SEQ_CLS")
    other = dataclasses.replace(config, seed=1)
    assert get_peft_model(build("bert"), other).get_nb_trainable_parameters()[0] == 20
    assert other.to_dict()["modules_to_save"] is None


def test_every_projection_is_a_value_of_the_option():
    literal, _ = get_args(get_type_hints(IntrinsicConfig)["projection"])
    assert get_args(literal) == tuple(PROJECTIONS)


def test_fields_that_an_attachment_sets_are_not_options_but_saved_and_loaded(tmp_path):
    internal = {field.name for field in dataclasses.fields(IntrinsicConfig) if field.kw_only}
    requirements = {"algorithm_version", "requires", "num_labels"}
    assert internal == {*requirements, "manifest", "checksum", "subspace_digest", "label_sketch", "value_sketch"}
    with pytest.raises(TypeError, match="manifest"):
        IntrinsicConfig(manifest="a")
    model = get_peft_model(build("bert"), IntrinsicConfig(d=20, task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert loaded.checksum is not None
    for name in internal - {"checksum"}:
        assert getattr(loaded, name) == getattr(model.peft_config["default"], name), name


def test_a_file_with_an_option_of_a_later_version_keeps_its_manifest(tmp_path):
    model = get_peft_model(build("bert"), IntrinsicConfig(d=20))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "later": 1}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['later'\]"):
        loaded = PeftConfig.from_pretrained(tmp_path)
    assert loaded.manifest == model.peft_config["default"].manifest


def test_a_file_of_former_names_survives_an_option_of_a_later_version():
    stored = {"peft_type": "INTRINSIC", "d": 20, "target_modules": "vectors", "redrawn": [], "later": 1}
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['later'\]"):
        config = PeftConfig.from_peft_type(**stored)
    assert (config.target_modules, config.reinitialized) == ("norms-and-biases", [])


@pytest.mark.parametrize(
    ("option", "value"),
    [("target_modules", {"key"}), ("modules_to_save", ["pooler"]), ("block_size", 16), ("reinitialized", [])],
)
def test_an_option_that_is_set_after_the_first_use_takes_effect(option, value):
    """The adapter and its configuration are those of a new configuration with that value."""
    config = IntrinsicConfig(d=20, target_modules=["query"])
    get_peft_model(build("bert"), config)
    setattr(config, option, value)
    again = get_peft_model(build("bert"), config)
    new = get_peft_model(build("bert"), IntrinsicConfig(**{"d": 20, "target_modules": ["query"], option: value}))
    assert again.peft_config["default"].to_dict() == new.peft_config["default"].to_dict()
    trained = [{name for name, p in model.named_parameters() if p.requires_grad} for model in (again, new)]
    assert trained[0] == trained[1]


def test_replace_keeps_the_checks_of_a_saved_adapter(tmp_path):
    get_peft_model(build("bert"), IntrinsicConfig(d=20)).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    replaced = dataclasses.replace(config, inference_mode=False)
    assert (replaced.manifest, replaced.checksum) == (config.manifest, config.checksum) != (None, None)
    replaced.seed = 1
    with pytest.raises(ValueError, match="checksum"):
        PeftModel.from_pretrained(build("bert"), tmp_path, config=replaced)


@pytest.mark.parametrize("names", [None, "query", ["query", "key", "query"]])
def test_names_of_modules_are_stored_as_in_lora(names):
    for option in ("target_modules", "exclude_modules"):
        assert getattr(IntrinsicConfig(**{option: names}), option) == getattr(LoraConfig(**{option: names}), option)


def test_numpy_integers_can_be_saved(tmp_path):
    config = IntrinsicConfig(d=np.int64(20), seed=np.int32(3), block_size=np.uint8(16))
    get_peft_model(build("bert"), config).save_pretrained(tmp_path)
    assert (PeftConfig.from_pretrained(tmp_path).d, PeftConfig.from_pretrained(tmp_path).seed) == (20, 3)


def adapted_names(options: dict) -> set[str]:
    """Names of the parameters that get an offset."""
    model = get_peft_model(build("bert"), IntrinsicConfig(**{"d": 30, **options}))
    names = {}
    for layer in model.base_model.tuner_layers():
        for offset in layer.offsets.get("default", {}).values():
            names[offset.name] = True
    return set(names)


def test_options_select_parameters_as_documented():
    everything = adapted_names({"target_modules": "all"})
    vectors = {name for name, p in build("bert").named_parameters() if p.dim() < 2}
    assert adapted_names({}) == adapted_names({"target_modules": "norms-and-biases"}) == vectors
    assert adapted_names({"task_type": "SEQ_CLS"}) == vectors | {"classifier.weight"}
    assert adapted_names({"d": 3_000}) == everything  # more than the vectors have weights
    held = {"d": 500, "exclude_modules": r".*(LayerNorm|attention|pooler).*"}  # more than the vectors that are left
    assert any("embeddings" in name and "LayerNorm" not in name for name in adapted_names(held))
    assert everything == {name for name, _ in build("bert").named_parameters()}
    task = {"target_modules": "all-linear", "task_type": "SEQ_CLS"}  # PEFT leaves the head of such a model out
    assert adapted_names(task) - adapted_names({**task, "head": "keep"}) == {"classifier.weight", "classifier.bias"}
    assert adapted_names({"target_modules": ["query"]}) == {
        f"bert.encoder.layer.{i}.attention.self.query.{name}" for i in (0, 1) for name in ("weight", "bias")
    }
    assert adapted_names({"target_modules": r".*\.1\..*LayerNorm"}) == {
        name for name in everything if ".1." in name and "LayerNorm" in name
    }
    assert adapted_names({"exclude_modules": r".*embeddings.*"}) == {n for n in vectors if "embeddings" not in n}
    block = {n for n in everything if "layer.1." in n}
    head = {"classifier.weight", "classifier.bias"}
    assert adapted_names({"layers_to_transform": [1]}) == block & vectors
    every = {"target_modules": "all", "layers_to_transform": 1}
    assert adapted_names({**every, "layers_pattern": "layer", "task_type": "SEQ_CLS"}) == block | head
    one = {"target_parameters": ["query.weight"], "exclude_modules": ["layer.0.attention.self.query"]}
    assert adapted_names(one) == {"bert.encoder.layer.1.attention.self.query.weight"}
    assert adapted_names({"target_parameters": ["query.weight"]}) == {
        f"bert.encoder.layer.{i}.attention.self.query.weight" for i in (0, 1)
    }


def test_modules_to_save_trains_and_stores_the_head(tmp_path):
    options = {"d": 20, "task_type": "SEQ_CLS", "modules_to_save": ["classifier"], "init_weights": False}
    model = get_peft_model(build("bert"), IntrinsicConfig(**options)).eval()
    assert model.get_nb_trainable_parameters()[0] == 20 + 24 * 3 + 3
    model.get_base_model().classifier.modules_to_save["default"].weight.data.fill_(0.25)
    expected = evaluate(model, "bert")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(build("bert"), tmp_path).eval()
    assert torch.equal(evaluate(loaded, "bert"), expected)


@pytest.mark.parametrize(("granularity", "count"), [("layer", 4), ("module", 19), ("tensor", 24)])
def test_lambda_granularity_sets_the_number_of_scales(granularity, count):
    config = IntrinsicConfig(d=100, said=True, lambda_granularity=granularity)
    model = get_peft_model(build("bert"), config)
    holder = model.get_base_model().intrinsic
    assert len(holder.intrinsic_lambda["default"].weight) == count
    assert len(holder.intrinsic_theta["default"].weight) == 100 - count
    assert torch.equal(evaluate(model.eval(), "bert"), evaluate(build("bert"), "bert"))


def test_registration_is_idempotent():
    peft_intrinsic.register()
    assert PeftType("INTRINSIC") is PeftType.INTRINSIC
    assert "INTRINSIC" in [member.value for member in PeftType]
    before = vars(save_and_load).copy()
    peft_intrinsic.register()
    assert vars(save_and_load) == before
