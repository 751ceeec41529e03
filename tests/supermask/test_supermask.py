"""Supermask adapters: outputs, gradients, training, merging and several adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import batch, build, evaluate, output, train
from datasets import Dataset
from helpers.masked_models import CLOSE, LABELS, layers, masked
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import Trainer, TrainingArguments

from peft_intrinsic import IntrinsicConfig, SupermaskConfig

FAMILIES = ["bert", "gpt2", "llama", "t5", "whisper"]


def zeroed(family: str, model, adapter: str = "default"):
    """The base model times the mask, computed independently."""
    base = build(family)
    parameters = dict(base.named_parameters())
    with torch.no_grad():
        for name, scores in model.named_parameters():
            if name.endswith(f"supermask_scores.{adapter}.weight"):
                own = name.removeprefix("base_model.model.").removesuffix(f".supermask_scores.{adapter}.weight")
                parameters[f"{own}.weight"].mul_((scores > 0).float())
    return base


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_below_the_threshold_are_zero(family):
    model = masked(family)
    assert not torch.allclose(evaluate(model, family), evaluate(build(family), family), **CLOSE)
    expected = evaluate(zeroed(family, model), family)
    assert torch.allclose(evaluate(model, family), expected, **CLOSE)
    if family == "llama":  # no dropout
        assert torch.allclose(output(model.train(), batch(family)), expected, **CLOSE)
    merged = model.eval().merge_and_unload()
    assert torch.allclose(evaluate(merged, family), expected, **CLOSE)


def test_gradient_of_the_scores_is_that_of_the_weight_times_the_base_weight():
    """dL/ds = dL/dW ∘ W0, with dL/dW of the masked model by autograd."""
    model = masked("llama")
    inputs = {**batch("llama"), "labels": batch("llama")["input_ids"]}
    model.train()(**inputs).loss.backward()
    plain = zeroed("llama", model).train()
    plain(**inputs).loss.backward()
    base = dict(build("llama").named_parameters())
    seen = 0
    for name, scores in model.named_parameters():
        if "supermask_scores" in name:
            own = name.removeprefix("base_model.model.").removesuffix(".supermask_scores.default.weight") + ".weight"
            expected = plain.get_parameter(own).grad * base[own]
            assert torch.allclose(scores.grad, expected, rtol=1e-4, atol=1e-8), own
            seen += 1
    assert seen == 14


@pytest.mark.parametrize("mask", ["threshold", "bernoulli"])
def test_training_lowers_the_loss_and_leaves_the_base_weights_unchanged(mask):
    model = get_peft_model(build("bert"), SupermaskConfig(mask=mask, initial_sparsity=0.1, task_type="SEQ_CLS"))
    before = copy.deepcopy({n: p for n, p in model.named_parameters() if not p.requires_grad})
    trainable = {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"supermask_scores", "modules_to_save"}  # the head is trained fully
    losses = train(model, {**batch("bert"), "labels": LABELS}, 30, 1e-2)
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_merge_then_unmerge_restores_the_base_weights_bitwise():
    model = masked(base=build("bert").to(torch.bfloat16))
    weights = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    before = evaluate(model, "bert")
    model.merge_adapter()
    share = model.base_model.sparsity()["all"]
    zeros = sum(int((p == 0).sum()) for n, p in model.named_parameters() if n in weights and p.dim() > 1)
    total = sum(p.numel() for n, p in weights.items() if p.dim() > 1)
    assert zeros / total == pytest.approx(share, abs=1e-3)
    assert torch.equal(evaluate(model, "bert"), before)
    model.unmerge_adapter()
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in weights.items())


def test_several_adapters_switch_multiply_and_unload_bitwise(tmp_path):
    model = masked()
    one = evaluate(model, "bert")
    model.add_adapter("b", SupermaskConfig(initial_sparsity=0.3, init="random"))
    model.set_adapter("b")
    two = evaluate(model, "bert")
    assert not torch.allclose(one, two, **CLOSE)
    model.base_model.set_adapter(["default", "b"])
    both = evaluate(model, "bert")
    model.save_pretrained(tmp_path, selected_adapters=["default", "b"])
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path).eval()
    loaded.load_adapter(tmp_path / "b", "b")
    for names, expected in ((["default"], one), (["b"], two), (["default", "b"], both), (["default"], one)):
        loaded.base_model.set_adapter(names)
        assert torch.equal(evaluate(loaded, "bert"), expected), names
    loaded.base_model.set_adapter(["b"])
    evaluate(loaded, "bert")
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        loaded.delete_adapter("b")
    assert loaded.active_adapters == ["default"]
    assert torch.equal(evaluate(loaded, "bert"), one)
    plain = loaded.unload()
    assert torch.equal(evaluate(plain, "bert"), evaluate(build("bert"), "bert"))
    assert {n: p.shape for n, p in plain.named_parameters()} == {
        n: p.shape for n, p in build("bert").named_parameters()
    }


@pytest.mark.parametrize("targets", ["all-linear", ["query", "dense"]])
def test_layers_to_transform_and_exclude_modules_choose_layers(targets):
    model = get_peft_model(
        build("bert"),
        SupermaskConfig(target_modules=targets, layers_to_transform=[1], exclude_modules=["output.dense"]),
    )
    names = list(model.base_model.sparsity())[:-1]
    assert names
    assert all("layer.1." in name and "output.dense" not in name for name in names)


def test_a_second_adapter_starts_from_the_base_weights(tmp_path):
    """The zeros that the first adapter wrote into the weights have no effect."""
    masked().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build("bert"), tmp_path).eval()
    evaluate(model, "bert")
    config = SupermaskConfig(initial_sparsity=0.1)
    model.add_adapter("b", copy.copy(config))
    alone = get_peft_model(build("bert"), config)
    for (_, a), (_, b) in zip(layers(model), layers(alone), strict=True):
        assert torch.equal(a.supermask_scores["b"].weight, b.supermask_scores["default"].weight)


def test_merging_does_not_change_the_delta_weight(tmp_path):
    masked().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build("bert"), tmp_path).eval()
    before = {name: layer.get_delta_weight("default") for name, layer in layers(model)}
    model.merge_adapter()
    expected = evaluate(model, "bert")
    for name, layer in layers(model):
        assert torch.equal(layer.get_delta_weight("default"), before[name])
        assert before[name].abs().sum() > 0
    assert torch.equal(evaluate(model, "bert"), expected)


def test_a_resumed_trainer_ends_with_the_scores_of_an_uninterrupted_one(tmp_path):
    rows = Dataset.from_list([{"input_ids": [3 + i % 7, 4, 5], "labels": i % 3} for i in range(24)])
    settings = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "save_steps": 3,
        "lr_scheduler_type": "constant",
    }

    def run(folder, steps: int, resume: bool = False):
        model = get_peft_model(build("bert"), SupermaskConfig(task_type="SEQ_CLS", save_scores=True))
        arguments = TrainingArguments(str(tmp_path / folder), max_steps=6, **settings)
        trainer = Trainer(model, arguments, train_dataset=rows)
        if steps < 6:
            trainer.args.max_steps = steps
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run("whole", 6)
    run("cut", 3)
    resumed = run("cut", 6, resume=True)
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5), name


@pytest.mark.parametrize(
    ("family", "target", "message"),
    [
        ("bert", "word_embeddings", "target_modules selects .*word_embeddings, a Embedding; masks need linear layers"),
        ("gpt2", "lm_head", r"selects lm_head, whose weight another module shares .* exclude_modules=\['lm_head'\]"),
    ],
)
def test_modules_that_cannot_be_masked_raise(family, target, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(build(family), SupermaskConfig(target_modules=[target]))


def test_scores_that_are_not_finite_raise_in_evaluation_and_saving(tmp_path):
    model = masked()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "supermask_scores" in n)[0, 0] = torch.nan
    for call in (lambda: evaluate(model, "bert"), lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match=r"scores of .* are NaN or infinite"):
            call()


def test_the_weight_attribute_is_the_masked_weight():
    model = masked()
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    expected = layer.base_layer.weight * (layer.supermask_scores["default"].weight > 0)
    assert torch.equal(layer.weight, expected)
    assert torch.equal(layer.base_layer.weight + layer.get_delta_weight("default"), expected)


def test_peft_attaches_supermask_intrinsic_and_lora_by_their_configurations():
    for config in (SupermaskConfig(), IntrinsicConfig(d=20), LoraConfig(target_modules=["query"])):
        assert get_peft_model(build("bert"), config).peft_config["default"].peft_type == config.peft_type


def test_outputs_have_the_dtype_of_the_base_model():
    assert evaluate(masked(base=build("bert").to(torch.bfloat16)), "bert").dtype == torch.bfloat16


@pytest.mark.slow
def test_a_compiled_model_has_the_same_outputs():
    model = masked()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.allclose(evaluate(compiled, "bert"), evaluate(model, "bert"), **CLOSE)
    torch.compiler.reset()


def test_a_mask_with_3_percent_zeros_takes_less_than_a_fifth_of_a_bit_for_each_weight():
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(1536, 384, bias=False))
    model = get_peft_model(layer, SupermaskConfig(target_modules=["0"]))
    assert model.base_model.sparsity()["all"] == pytest.approx(0.03, abs=1e-4)
    state = get_peft_model_state_dict(model)
    assert sum(v.numel() for v in state.values()) * 8 < 0.2 * 1536 * 384
