"""Supermask adapters on disk, and files that do not fit a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import TWO_STACKS, batch, build, evaluate, train
from helpers.masked_models import LABELS, masked
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from peft_intrinsic import SupermaskConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "supermask_scores"


@pytest.mark.parametrize("options", [{}, {"mask": "bernoulli"}, {"hold_sparsity": True}])
def test_saved_masks_load_with_the_same_outputs_and_without_scores(tmp_path, options):
    model = masked(**options, task_type="SEQ_CLS", target_modules=["query", "dense"])
    expected = evaluate(model, "bert")
    model.save_pretrained(tmp_path)
    assert torch.equal(evaluate(model, "bert"), expected)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert {v.dtype for k, v in file.items() if k.endswith("supermask_mask")} == {torch.uint8}
    assert not any("scores" in key for key in file)
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path)
    assert torch.equal(evaluate(loaded.eval(), "bert"), expected)
    assert not any("supermask" in n for n, _ in loaded.named_parameters())
    config = loaded.peft_config["default"]
    assert config.final_sparsity == model.base_model.sparsity()["all"] == loaded.base_model.sparsity()["all"]
    if options.get("hold_sparsity"):
        assert config.final_sparsity == pytest.approx(0.2, abs=1e-3)
    with loaded.disable_adapter():
        assert torch.equal(evaluate(loaded, "bert"), evaluate(build("bert"), "bert"))
    assert torch.equal(evaluate(loaded, "bert"), expected)
    again = loaded.merge_and_unload()
    assert torch.equal(evaluate(again, "bert"), expected)


def test_training_continues_from_loaded_masks_and_scores(tmp_path):
    model = masked(target_modules=["query", "dense"])
    model.save_pretrained(tmp_path / "bits")
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path / "bits", is_trainable=True)
    assert torch.equal(evaluate(loaded.eval(), "bert"), evaluate(model, "bert"))
    losses = train(loaded.train(), {**batch("bert"), "labels": LABELS}, 20, 1e-2)
    assert losses[-1] < losses[0]
    whole = masked(target_modules=["query", "dense"], save_scores=True)
    whole.save_pretrained(tmp_path / "scores")
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path / "scores", is_trainable=True)
    for name, p in whole.named_parameters():
        assert torch.equal(p, dict(loaded.named_parameters())[name])
    assert torch.equal(
        evaluate(PeftModel.from_pretrained(build("bert"), tmp_path / "scores").eval(), "bert"), evaluate(whole, "bert")
    )


def test_state_dict_of_a_loaded_mask_holds_the_base_weights(tmp_path):
    masked().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build("bert"), tmp_path).eval()
    expected = evaluate(model, "bert")
    state, plain = model.state_dict(), build("bert").state_dict()
    for name, value in plain.items():
        own = [v for k, v in state.items() if k.replace(".base_layer", "").endswith(f"model.{name}")]
        assert torch.equal(own[0], value), name
    assert torch.equal(evaluate(model, "bert"), expected)


def test_a_mask_that_was_not_loaded_raises_in_the_forward_pass(tmp_path):
    """transformers loads the tensors of an adapter's file by name, without decoding masks."""
    masked().save_pretrained(tmp_path)
    model = build("bert")
    model.load_adapter(str(tmp_path))
    with pytest.raises(ValueError, match="saved mask of adapter 'default' was not loaded"):
        evaluate(model, "bert")


def test_scores_in_a_given_state_dict_determine_the_saved_mask():
    """Trainer passes a state dict that it gathered from several processes."""
    model = masked(save_scores=True)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    scores = [k for k in state if "supermask_scores" in k]
    for key in scores:
        state[key] = -torch.ones_like(state[key])
    saved = get_peft_model_state_dict(model, state_dict=state)
    key = next(k for k in saved if k.endswith("supermask_mask"))
    assert len(saved[key]) == 8  # all of them are zero
    assert torch.equal(saved[key.replace("supermask_mask", "supermask_scores.weight")], state[scores[0]])


def test_a_base_model_with_other_weights_raises(tmp_path):
    masked().save_pretrained(tmp_path)
    other = build("bert")
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.weight.add_(0.1)
    with pytest.raises(ValueError, match="was trained on other weights"):
        PeftModel.from_pretrained(other, tmp_path)
    PeftModel.from_pretrained(build("bert").to(torch.bfloat16), tmp_path)


def test_missing_damaged_and_unknown_masks_raise(tmp_path):
    masked(target_modules=["query", "key"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = {key: value.clone() for key, value in load_file(file).items()}  # the file is written over below
    first = next(key for key in whole if key.endswith("supermask_mask"))
    damaged = whole[first].clone()
    damaged[3] = 255
    for change, message in (
        ({first: None}, "holds no mask of"),
        ({first: damaged}, "holds no mask of 576 weights"),
        ({first.replace(".key.", ".value."): whole[first].clone()}, "which is no layer of this adapter"),
    ):
        save_file({k: v for k, v in {**whole, **change}.items() if v is not None}, file)
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(build("bert"), tmp_path)


def test_a_configuration_that_was_never_saved_fits_any_base_model(tmp_path):
    config = SupermaskConfig(seed=np.int64(3), target_modules=["query"])
    get_peft_model(build("bert"), config)
    other = build("bert")
    with torch.no_grad():
        other.bert.encoder.layer[0].attention.self.query.weight.add_(0.1)
    get_peft_model(other, config).save_pretrained(tmp_path)


def counted() -> torch.nn.Module:
    """A layer whose weights do not depend on torch's generator."""
    layer = torch.nn.Linear(6, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 25).view(4, 6) / 8)
        layer.bias.zero_()
    return torch.nn.Sequential(layer)


@pytest.mark.parametrize("trainable", [True, False])
def test_scores_that_were_saved_under_their_former_names_are_read(trainable):
    """The file's scores are (i − 11.5)/64 with each row reversed, so the upper two rows of weights are zero."""
    model = PeftModel.from_pretrained(counted(), GOLDEN, is_trainable=trainable).eval()
    expected = torch.tensor([0.0, 0, 1, 1]).view(4, 1) * counted()[0].weight
    assert torch.equal(model.get_base_model()[0].weight, expected)
    if trainable:
        scores = model.get_base_model()[0].supermask_scores["default"].weight
        assert torch.equal(scores, ((torch.arange(24.0) - 11.5) / 64).view(4, 6).flip(1))


@pytest.mark.slow
@pytest.mark.parametrize("trained_compiled", [False, True])
def test_a_mask_fits_models_with_and_without_compiled_blocks(trained_compiled, tmp_path):
    def base(compiled):
        model = build("bert")
        for index, layer in enumerate(model.bert.encoder.layer if compiled else ()):
            model.bert.encoder.layer[index] = torch.compile(layer, backend="eager")
        return model

    config = SupermaskConfig(target_modules=["query", "dense"], initial_sparsity=0.3, save_scores=True)
    model = get_peft_model(base(trained_compiled), config)
    expected = evaluate(model, "bert")
    assert not torch.allclose(expected, evaluate(build("bert"), "bert"), atol=1e-3)
    model.save_pretrained(tmp_path)
    for trainable in (False, True):
        loaded = PeftModel.from_pretrained(base(not trained_compiled), tmp_path, is_trainable=trainable)
        torch.testing.assert_close(evaluate(loaded, "bert"), expected, rtol=1e-5, atol=1e-6)
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["query", "supermask_mask", "weight"])
def test_adapters_named_as_parts_of_keys_load_their_masks(name, tmp_path):
    config = {"target_modules": ["query", "dense"], "initial_sparsity": 0.3}
    model = get_peft_model(build("bert"), SupermaskConfig(**config), adapter_name=name)
    model.add_adapter("other", SupermaskConfig(**config, init="random"))
    model.save_pretrained(tmp_path)
    for adapter in (name, "other"):
        model.set_adapter(adapter)
        loaded = PeftModel.from_pretrained(build("bert"), tmp_path / adapter)
        assert torch.equal(evaluate(loaded, "bert"), evaluate(model, "bert"))


def test_an_adapter_named_as_a_fully_trained_module_raises():
    config = SupermaskConfig(target_modules=["query"], modules_to_save=["classifier"])
    model = get_peft_model(build("bert"), config)
    with pytest.raises(ValueError, match="adapter_name='classifier' is a part of the keys"):
        model.add_adapter("classifier", SupermaskConfig(target_modules=["query"]))


@pytest.mark.parametrize("noted", [True, False])
def test_newly_initialized_layers_are_trained_fully_or_excluded_but_not_masked(noted, tmp_path):
    """BART's head has another name than PEFT's defaults, and its parameters are outside numbered blocks."""
    transformers.BartModel(transformers.BartConfig(**TWO_STACKS)).save_pretrained(tmp_path / "bart")

    def load():
        model = transformers.BartForSequenceClassification.from_pretrained(tmp_path / "bart")
        if not noted:
            del model.__dict__["_intrinsic_fresh"]
        return model

    options = {"initial_sparsity": 0.2, "task_type": "SEQ_CLS"}
    head = ["classification_head.dense", "classification_head.out_proj"]
    with pytest.raises(ValueError, match=r"selects classification_head.dense, .*out_proj, whose .* modules_to_save=\["):
        get_peft_model(load(), SupermaskConfig(**options))
    excluded = get_peft_model(load(), SupermaskConfig(**options, exclude_modules=head))
    assert not any("classification_head" in name for name in excluded.base_model.sparsity())
    model = get_peft_model(load(), SupermaskConfig(**options, modules_to_save=head)).eval()
    model.save_pretrained(tmp_path / "mask")
    loaded = PeftModel.from_pretrained(load(), tmp_path / "mask").eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 2], [7, 8, 2]])}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_modules_that_peft_trains_fully_are_not_masked(tmp_path):
    """PEFT's name "classifier" of the head fits the end of DistilBERT's `pre_classifier` too."""
    config = transformers.DistilBertConfig(vocab_size=97, dim=24, n_layers=2, n_heads=4, hidden_dim=40)
    transformers.DistilBertModel(config).save_pretrained(tmp_path / "base")

    def load():
        return transformers.DistilBertForSequenceClassification.from_pretrained(tmp_path / "base")

    model = get_peft_model(load(), SupermaskConfig(initial_sparsity=0.2, task_type="SEQ_CLS")).eval()
    assert not any("classifier" in name for name in model.base_model.sparsity())
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "supermask_scores" not in name}
    assert {name.split(".")[2] for name in trained} == {"classifier", "pre_classifier"}
    model.save_pretrained(tmp_path / "mask")
    loaded = PeftModel.from_pretrained(load(), tmp_path / "mask").eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 2], [7, 8, 2]])}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
