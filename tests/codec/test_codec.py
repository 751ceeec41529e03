"""Packing and loading: outputs, sources, new heads, and every option of the configuration."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from conftest import build, evaluate, trained
from helpers.samples import headless
from peft import PeftModel, get_peft_model

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.codec import compress, load_packed, read_packed
from peft_intrinsic.codec.packed import OPTIONS
from peft_intrinsic.codec.quantize import quantize

OWN_FIELDS = {"d", "seed", "block_size", "reinitialized", "manifest", "algorithm_version", "num_labels"}
"""Options with a field of their own in a packed adapter."""

NOT_STORED = {
    "peft_type": "always INTRINSIC",
    "peft_version": "version of the writer",
    "requires": "version of the writer",
    "auto_mapping": "class of the base model",
    "base_model_name_or_path": "stored as a name; the caller passes the base model",
    "revision": "replaced by the digest of the base model",
    "inference_mode": "true after loading",
    "init_weights": "only matters for training",
    "ensemble": "likewise",
    "subspace": "of a projection that is not packed",
    "embed_subspace": "likewise",
    "subspace_digest": "likewise",
    "modules_to_save": "raises: a packed adapter cannot hold it",
    "trainable_token_indices": "likewise",
    "checksum": "of the usual file; a packed file has its own",
    "serving": "resolved to other options, not saved either",
}
"""Options that are not stored, and why."""


NEW_HEADS = {
    "bert": ["classifier.weight"],
    "roberta": ["classifier.dense.weight", "classifier.out_proj.weight"],
    "distilbert": ["classifier.weight", "pre_classifier.weight"],
}
"""Parameters that are not in the checkpoint of an encoder."""


def evaluate_quantized(model: PeftModel, family: str, levels: int) -> torch.Tensor:
    """Output of the model, with θ at its quantized values and λ in half precision."""
    root = model.get_base_model().intrinsic
    for vectors, count in ((root.intrinsic_theta, levels), (root.intrinsic_lambda, 256)):
        for vector in vectors.values():
            vector.weight.data = torch.from_numpy(quantize(vector.weight.detach().numpy(), count))
    return evaluate(model, family)


@pytest.mark.slow
@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("family", ["bert", "bert_mlm", "gpt2", "llama", "t5", "vit", "custom"])
@pytest.mark.parametrize("levels", [1, 2, 5])
def test_a_packed_adapter_has_exactly_the_outputs_of_the_quantized_theta(family, said, levels):
    model = trained(family, said=said)
    data = compress(model, levels)
    assert torch.equal(evaluate(load_packed(build(family), data), family), evaluate_quantized(model, family, levels))


@pytest.mark.parametrize(("d", "tolerance"), [(200, 1e-3), (3000, 1e-2)])
@pytest.mark.parametrize("said", [False, True])
def test_256_levels_preserve_the_outputs(d, tolerance, said):
    """With d = 200 each parameter has its own level, and the only error is that of half precision."""
    model = trained("bert", d=d, said=said)
    expected, plain = evaluate(model, "bert"), evaluate(build("bert"), "bert")
    result = evaluate(load_packed(build("bert"), compress(model, 256)), "bert")
    assert (result - expected).norm() <= tolerance * (expected - plain).norm()


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


def test_load_packed_takes_bytes_and_files(tmp_path):
    data = compress(trained("bert"))
    path = tmp_path / "adapter.pia"
    path.write_bytes(data)
    for source in (data, bytearray(data), memoryview(data), str(path), path):
        assert compress(load_packed(build("bert"), source)) == data


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
    for name in (*OPTIONS, *OWN_FIELDS - {"manifest"}):
        assert getattr(loaded, name) == getattr(config, name), name
    assert loaded.manifest[:16] == config.manifest[:16]


def test_every_option_is_stored_or_listed_with_a_reason():
    """A new option of IntrinsicConfig must be stored, or listed in NOT_STORED."""
    known = [*OPTIONS, *OWN_FIELDS, *NOT_STORED]
    assert len(known) == len(set(known))
    assert {field.name for field in fields(IntrinsicConfig)} == set(known)


@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("limit", [{"levels": 3}, {"levels": 256}, {"max_bytes": 120}, {"max_error": 0.2}])
def test_packing_again_gives_the_same_bytes(said, limit):
    data = compress(trained("bert", said=said), **limit)
    assert compress(load_packed(build("bert"), data), 256) == data


def test_the_name_of_the_base_model_is_stored_without_its_folder(tmp_path):
    for folder in (tmp_path / "encoder", tmp_path / "elsewhere" / "encoder"):
        model = get_peft_model(headless(folder), IntrinsicConfig(d=30, task_type="SEQ_CLS"))
        assert read_packed(compress(model)).base == "encoder"
    model.peft_config["default"].base_model_name_or_path = "größe/" + "é" * 200
    assert read_packed(compress(model)).base == "größe/" + "é" * 123


def test_loading_a_second_adapter_does_not_change_the_first():
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


def test_a_second_adapter_that_raises_leaves_the_model_unchanged():
    model = trained("bert")
    before = evaluate(model, "bert")
    data = compress(trained("llama"))
    for check in (True, False):
        with pytest.raises(ValueError, match=r"(made|trained) for"):
            load_packed(model, data, "second", check_base=check)
    assert list(model.peft_config) == list(model.get_base_model().intrinsic.intrinsic_theta) == ["default"]
    assert torch.equal(evaluate(model, "bert"), before)


@pytest.mark.parametrize("said", [False, True])
def test_a_loaded_adapter_is_frozen_and_in_evaluation_mode(said):
    model = load_packed(build("bert").train(), compress(trained("bert", said=said)))
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    both = load_packed(trained("bert", d=30), compress(trained("bert", said=said)), "second")
    assert [name for name, p in both.named_parameters() if p.requires_grad] == [
        "base_model.model.intrinsic.intrinsic_theta.default.weight"
    ]


@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_loaded_adapter_can_be_saved_as_usual(family, said, tmp_path):
    packed = load_packed(build(family), compress(trained(family, said=said), 4))
    packed.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(family), tmp_path).eval()
    assert torch.equal(evaluate(loaded, family), evaluate(packed, family))
    assert compress(loaded, 4) == compress(packed, 4)


def test_a_loaded_adapter_can_be_trained_and_merged():
    model = load_packed(build("bert"), compress(trained("bert")))
    model.set_adapter("default")
    assert model.get_nb_trainable_parameters()[0] == 200
    expected = evaluate(model, "bert")
    torch.testing.assert_close(evaluate(model.merge_and_unload(), "bert"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_a_new_head_is_reinitialized_as_it_was_trained(family, tmp_path):
    """Each load of a checkpoint without a head initializes another one, which must have no effect."""
    first, second = (headless(tmp_path / "encoder", family, seed) for seed in (1, 2))
    assert not torch.equal(*(dict(model.named_parameters())[NEW_HEADS[family][-1]] for model in (first, second)))
    config = IntrinsicConfig(d=50, init_weights=False, task_type="SEQ_CLS", target_modules="all")
    model = get_peft_model(first, config).eval()
    assert sorted(model.peft_config["default"].reinitialized) == NEW_HEADS[family]
    data = compress(model, 5)
    loaded = load_packed(second, data)
    assert torch.equal(evaluate(loaded, family), evaluate_quantized(model, family, 5))
    assert compress(loaded, 5) == data
