"""Packing and loading: outputs, files, other bases' heads, and every option of the configuration."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from conftest import build, evaluate, trained
from helpers.samples import headless
from peft import PeftModel, get_peft_model
from torch import nn

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.codec import compress, load_packed, read_packed
from peft_intrinsic.codec.packed import OPTIONS
from peft_intrinsic.codec.quantize import quantize

BESIDE = {"d", "seed", "block_size", "reinitialized", "manifest", "algorithm_version", "num_labels"}
"""Options with a field of their own in a packed adapter."""

FOLLOWING = {
    "peft_type": "always INTRINSIC",
    "peft_version": "of who writes",
    "requires": "of who writes",
    "auto_mapping": "the class of the model that is loaded onto",
    "base_model_name_or_path": "packed as a name, not obeyed: the base model comes with the call",
    "revision": "the digest of the base model says more",
    "inference_mode": "true after loading",
    "init_weights": "only matters for training",
    "ensemble": "likewise",
    "subspace": "of a projection that is not packed",
    "embed_subspace": "likewise",
    "subspace_digest": "likewise",
    "modules_to_save": "raises: it has no place in a packed adapter",
    "trainable_token_indices": "likewise",
    "checksum": "of the usual file; a packed one has its own",
}
"""Options that are not packed, and why."""


def numbers(model: PeftModel, name: str = "default") -> tuple[nn.Parameter, nn.Parameter | None]:
    """θ and λ."""
    root = model.get_base_model().intrinsic
    scales = root.intrinsic_lambda[name].weight if name in root.intrinsic_lambda else None
    return root.intrinsic_theta[name].weight, scales


def same_as_rounded(model: PeftModel, family: str, levels: int) -> torch.Tensor:
    """Output of the model, θ set to its rounded values and λ to half precision."""
    theta, scales = numbers(model)
    theta.data = torch.from_numpy(quantize(theta.detach().numpy(), levels))
    if scales is not None:
        scales.data = torch.from_numpy(quantize(scales.detach().numpy(), 256))
    return evaluate(model, family)


@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("family", ["bert", "bert_mlm", "gpt2", "llama", "t5", "vit", "custom"])
@pytest.mark.parametrize("levels", [1, 2, 5])
def test_few_levels_give_exactly_the_outputs_of_the_rounded_theta(family, said, levels):
    model = trained(family, said=said)
    data = compress(model, levels)
    assert torch.equal(evaluate(load_packed(build(family), data), family), same_as_rounded(model, family, levels))


@pytest.mark.parametrize(("d", "tolerance"), [(200, 1e-3), (3000, 1e-2)])
@pytest.mark.parametrize("said", [False, True])
def test_256_levels_keep_the_outputs(d, tolerance, said):
    """With d = 200 each number has its own level, and half precision alone is lost."""
    model = trained("bert", d=d, said=said)
    expected, plain = evaluate(model, "bert"), evaluate(build("bert"), "bert")
    found = evaluate(load_packed(build("bert"), compress(model, 256)), "bert")
    assert (found - expected).norm() <= tolerance * (expected - plain).norm()


def test_eight_levels_are_the_default():
    model = trained("bert")
    assert compress(model) == compress(model, 8) != compress(model, 7)


def test_size_is_little_more_than_the_entropy():
    model = trained("bert", target_modules="norms-and-biases")
    packed = read_packed(compress(model, 4))
    symbols = np.unique(packed.theta, return_counts=True)[1] / 200
    entropy = -(symbols * np.log2(symbols)).sum()
    assert len(packed.encode_body()) <= 4 + 2 * 4 + 200 * entropy / 8 + 3 + 3
    assert len(packed.encode_head()) <= 32


@pytest.mark.parametrize("form", ["bytes", "bytearray", "memoryview", "str", "path"])
def test_sources_are_bytes_and_files(form, tmp_path):
    model = trained("bert")
    data = compress(model)
    path = tmp_path / "adapter.pia"
    path.write_bytes(data)
    forms = {
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "str": str(path),
        "path": path,
    }
    loaded = load_packed(build("bert"), forms[form])
    assert compress(loaded) == data


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("bert", {"said": True, "lambda_granularity": "module", "seed": 2**62}),
        ("bert", {"target_modules": ["query", "dense"], "exclude_modules": ".*pooler.*", "task_type": "SEQ_CLS"}),
        ("bert", {"target_modules": r".*\.(query|key)", "scale": "isometric", "block_size": 16}),
        ("bert", {"target_modules": "all-linear", "projection": "dense", "head": "keep"}),
        ("bert", {"target_parameters": ["query.weight"]}),
        ("llama", {"add_bias": True, "projection": "global", "task_type": "CAUSAL_LM"}),
        ("gpt2", {"layers_to_transform": [0], "layers_pattern": "h", "target_modules": ["c_attn"], "d": 100}),
        ("t5", {"target_modules": None, "task_type": "SEQ_2_SEQ_LM"}),
    ],
)
def test_loaded_configuration_is_the_one_that_was_packed(family, options):
    config = trained(family, **options).peft_config["default"]
    loaded = load_packed(build(family), compress(trained(family, **options))).peft_config["default"]
    for name in (*OPTIONS, *BESIDE - {"manifest"}):
        assert getattr(loaded, name) == getattr(config, name), name
    assert loaded.manifest[:16] == config.manifest[:16]


def test_every_option_is_packed_or_known_to_follow():
    """A new option of IntrinsicConfig belongs into the packed format, or above with the reason why not."""
    known = [*OPTIONS, *BESIDE, *FOLLOWING]
    assert len(known) == len(set(known))
    assert {field.name for field in fields(IntrinsicConfig)} == set(known)


@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("limit", [{"levels": 3}, {"levels": 256}, {"max_bytes": 120}, {"max_error": 0.2}])
def test_packing_again_gives_the_same_bytes(said, limit):
    data = compress(trained("bert", said=said), **limit)
    assert compress(load_packed(build("bert"), data), 256) == data


def test_name_of_the_base_model_is_kept(tmp_path):
    for folder in (tmp_path / "encoder", tmp_path / "elsewhere" / "encoder"):
        model = get_peft_model(headless(folder), IntrinsicConfig(d=30, task_type="SEQ_CLS"))
        assert read_packed(compress(model)).base == "encoder"
    model.peft_config["default"].base_model_name_or_path = "größe/" + "é" * 200
    assert read_packed(compress(model)).base == "größe/" + "é" * 123


def test_loading_beside_another_adapter_leaves_that_one_alone():
    first, second = trained("bert", said=True), trained("bert", d=50, seed=3)
    expected, data = evaluate(second, "bert"), compress(second, 256)
    before = evaluate(first, "bert")
    both = load_packed(first, data, "second")
    assert both is first
    assert torch.equal(evaluate(both, "bert"), before)
    both.set_adapter("second")
    torch.testing.assert_close(evaluate(both, "bert"), expected, rtol=0, atol=1e-3)
    assert torch.equal(evaluate(both, "bert"), evaluate(load_packed(build("bert"), data), "bert"))
    both.set_adapter("default")
    assert torch.equal(evaluate(both, "bert"), before)
    assert compress(both, 256, adapter="second") == data


def test_a_refused_second_adapter_leaves_the_model_as_it_was():
    model = trained("bert")
    before = evaluate(model, "bert")
    data = compress(trained("llama"))
    for check in (True, False):
        with pytest.raises(ValueError, match="made for"):
            load_packed(model, data, "second", check_base=check)
    assert list(model.peft_config) == list(model.get_base_model().intrinsic.intrinsic_theta) == ["default"]
    assert torch.equal(evaluate(model, "bert"), before)


@pytest.mark.parametrize("said", [False, True])
def test_loaded_adapter_is_frozen_and_in_evaluation_mode(said):
    model = load_packed(build("bert").train(), compress(trained("bert", said=said)))
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    both = load_packed(trained("bert", d=30), compress(trained("bert", said=said)), "second")
    assert [name for name, p in both.named_parameters() if p.requires_grad] == [
        "base_model.model.intrinsic.intrinsic_theta.default.weight"
    ]


@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_loaded_adapter_can_be_saved_as_usual(family, said, tmp_path):
    packed = load_packed(build(family), compress(trained(family, said=said), 4))
    packed.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(family), tmp_path).eval()
    assert torch.equal(evaluate(loaded, family), evaluate(packed, family))
    assert compress(loaded, 4) == compress(packed, 4)


def test_loaded_adapter_can_be_trained_on():
    model = load_packed(build("bert"), compress(trained("bert")))
    model.set_adapter("default")
    assert model.get_nb_trainable_parameters()[0] == 200


def test_loaded_adapter_can_be_merged():
    model = load_packed(build("bert"), compress(trained("bert")))
    expected = evaluate(model, "bert")
    torch.testing.assert_close(evaluate(model.merge_and_unload(), "bert"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_fresh_head_is_reproduced(family, tmp_path):
    """Each load of a checkpoint without a head draws another head; the packed adapter must not depend on which."""
    first, second = (headless(tmp_path / "encoder", family, seed) for seed in (1, 2))
    assert not torch.equal(*(dict(model.named_parameters())[FRESH[family][-1]] for model in (first, second)))
    config = IntrinsicConfig(d=50, init_weights=False, task_type="SEQ_CLS", target_modules="all")
    model = get_peft_model(first, config).eval()
    assert sorted(model.peft_config["default"].reinitialized) == FRESH[family]
    data = compress(model, 5)
    loaded = load_packed(second, data)
    assert torch.equal(evaluate(loaded, family), same_as_rounded(model, family, 5))
    assert compress(loaded, 5) == data


FRESH = {
    "bert": ["classifier.weight"],
    "roberta": ["classifier.dense.weight", "classifier.out_proj.weight"],
    "distilbert": ["classifier.weight", "pre_classifier.weight"],
}
