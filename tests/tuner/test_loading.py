"""All ways to load an adapter, and all ways in which its file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from conftest import adapter_calls, batch, build, evaluate, output, trained
from helpers.hub import serve_hub
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertTokenizerFast, pipeline

from peft_intrinsic import IntrinsicConfig

THETA = "base_model.model.intrinsic.intrinsic_theta.weight"
AUTO = {
    "bert": AutoPeftModelForSequenceClassification,
    "llama": AutoPeftModelForCausalLM,
    "gpt2": AutoPeftModelForCausalLM,
    "roberta": AutoPeftModelForTokenClassification,
    "distilbert": AutoPeftModelForQuestionAnswering,
    "t5": AutoPeftModelForSeq2SeqLM,
    "electra": AutoPeftModel,
}


def saved(name: str, folder: Path, **options) -> torch.Tensor:
    """A base model and an adapter on disk, and the adapter's output."""
    build(name).save_pretrained(folder / "base")
    base = build(name).from_pretrained(folder / "base").eval()
    model = get_peft_model(base, IntrinsicConfig(d=200, init_weights=False, **options)).eval()
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    return evaluate(model, name)


@pytest.mark.parametrize("name", AUTO)
def test_auto_classes_load_an_adapter(name, tmp_path):
    expected = saved(name, tmp_path, said=True)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    if name == "electra":
        config["auto_mapping"] = {"base_model_class": "ElectraModel", "parent_library": "transformers"}
        (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    loaded = AUTO[name].from_pretrained(tmp_path / "adapter", **({"num_labels": 3} if name == "roberta" else {})).eval()
    assert torch.equal(evaluate(loaded, name), expected)


@pytest.mark.parametrize("options", [{"low_cpu_mem_usage": True}, {"torch_device": "cpu"}, {"is_trainable": True}])
def test_options_of_from_pretrained_work(options, tmp_path):
    expected = saved("llama", tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", **options).eval()
    assert torch.equal(evaluate(loaded, "llama"), expected)
    assert loaded.get_nb_trainable_parameters()[0] == (200 if "is_trainable" in options else 0)
    loaded.load_adapter(str(tmp_path / "adapter"), "again", **{k: v for k, v in options.items() if k != "is_trainable"})
    loaded.set_adapter("again")
    assert torch.equal(evaluate(loaded, "llama"), expected)


def test_transformers_loads_an_adapter(tmp_path):
    expected = saved("llama", tmp_path)
    assert torch.equal(evaluate(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"), "llama"), expected)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.load_adapter(str(tmp_path / "adapter"), adapter_name="one")
    assert torch.equal(evaluate(model, "llama"), expected)


@pytest.mark.parametrize("options", [{}, {"target_modules": ["query"]}, {"target_modules": "all", "said": True}])
def test_transformers_freezes_a_loaded_adapter_unless_is_trainable(options, tmp_path):
    trained("bert", **options).save_pretrained(tmp_path)
    for is_trainable in (False, True):
        model = build("bert")
        model.load_adapter(str(tmp_path), is_trainable=is_trainable)
        trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert all("intrinsic_" in name for name in trainable)
        assert bool(trainable) == is_trainable


@adapter_calls
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_adapter_methods_of_transformers_work(tmp_path):
    expected = saved("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = evaluate(model, "llama")
    model.load_adapter(str(tmp_path / "adapter"), adapter_name="one")
    model.add_adapter(IntrinsicConfig(d=20, init_weights=False, target_modules="all"), adapter_name="two")
    model.set_adapter("one")
    assert torch.equal(evaluate(model, "llama"), expected)
    model.disable_adapters()
    assert torch.equal(evaluate(model, "llama"), plain)
    model.enable_adapters()
    model.set_adapter("two")
    assert not torch.allclose(evaluate(model, "llama"), expected, atol=1e-3)
    model.set_adapter("one")
    model.delete_adapter("two")
    assert torch.equal(evaluate(model, "llama"), expected)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again.load_adapter(str(tmp_path / "again"))
    assert torch.equal(evaluate(again, "llama"), expected)


def test_an_adapter_works_in_a_pipeline(tmp_path):
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"])
    )
    saved("bert", tmp_path, task_type="SEQ_CLS")
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3).eval()
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu", top_k=None)
    with torch.no_grad():
        expected = model(**tokenizer("good film", return_tensors="pt")).logits.softmax(-1)[0]
    found = {row["label"]: row["score"] for row in classify(["good film"])[0]}
    assert [found[f"LABEL_{i}"] for i in range(3)] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_offloaded_layers_infer_and_merge(where, tmp_path, monkeypatch):
    """Layers that accelerate stores on disk, or in memory away from the device that computes."""
    monkeypatch.chdir(tmp_path)  # PEFT writes the merged layers on disk below the current folder
    expected = saved("llama", tmp_path)
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if where == "disk":
        base = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", device_map=places, offload_folder=str(tmp_path / "offload")
        )
        assert base.model.layers[1].mlp.up_proj.weight.is_meta
        # PEFT's own loading sends a model that fits into memory back to memory, so θ is copied instead.
        model = get_peft_model(base, IntrinsicConfig(d=200, target_modules="all")).eval()
        numbers = load_file(tmp_path / "adapter" / "adapter_model.safetensors")[THETA]
        model.get_base_model().intrinsic.intrinsic_theta["default"].weight.data.copy_(numbers)
    else:
        base = cpu_offload(base, execution_device="cpu")
        assert base.model.layers[1].mlp.up_proj.weight.is_meta
        model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(evaluate(model, "llama"), expected, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        torch.testing.assert_close(evaluate(model, "llama"), evaluate(plain, "llama"), rtol=1e-5, atol=1e-6)
    model.merge_adapter()
    torch.testing.assert_close(evaluate(model, "llama"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_push_to_hub_uploads_a_complete_adapter(tmp_path, monkeypatch):
    """A stub server on this machine receives a complete adapter."""
    model = trained("bert", said=True, task_type="SEQ_CLS")
    expected = evaluate(model, "bert")
    with serve_hub(monkeypatch) as hub:
        model.push_to_hub("user/adapter", token="hf_x")
    files = hub.files
    for path, content in files.items():
        (tmp_path / Path(path).name).write_bytes(content)
    card = files["README.md"].decode()  # transformers writes a template over the saved one
    assert card.count("## How to get started with this adapter") == 1
    assert "- Trainable parameters: 200\n" in card
    assert "- intrinsic\n" in card.partition("# ")[0]
    assert "more information needed" not in card.lower()
    assert json.loads(files["adapter_config.json"])["requires"].startswith("peft_intrinsic>=")
    assert torch.equal(evaluate(PeftModel.from_pretrained(build("bert"), tmp_path).eval(), "bert"), expected)


def damaged(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[THETA].__setitem__(3, float("nan")), "NaN or infinite values"),
        (lambda t: t[THETA].__setitem__(3, float("inf")), "NaN or infinite values"),
        (lambda t: t.update({THETA: t[THETA].int()}), "torch.int32, not floating-point"),
        (lambda t: t.update({THETA: t[THETA].view(2, 100)}), r"the file contains \(2, 100\)"),
        (
            lambda t: t.update({THETA: t[THETA][:150].clone()}),
            r"contains \(150,\), the configuration \(d=200, said=False\)",
        ),
        (lambda t: t.update({THETA.replace("theta", "lambda"): torch.ones(4)}), "lambda.*does not have"),
        (lambda t: t.update({"x": t.pop(THETA)}), "the file contains nothing"),
    ],
)
def test_wrong_files_raise(change, message, tmp_path):
    trained("bert").save_pretrained(tmp_path)
    damaged(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(build("bert"), tmp_path)


@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[THETA].__setitem__(3, float("nan")), "NaN or infinite values"),
        (lambda t: t[THETA].add_(0.1), "not the parameters and options that were saved.*remove the checksum"),
        (lambda t: t.update({"x": t.pop(THETA)}), r"does not contain intrinsic\.intrinsic_theta\.\w+\.weight"),
    ],
)
def test_wrong_files_raise_in_transformers(change, message, name, tmp_path):
    trained("bert").save_pretrained(tmp_path)
    damaged(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        build("bert").load_adapter(str(tmp_path), name)


def test_wrong_options_raise_in_transformers(tmp_path):
    saved("bert", tmp_path)
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "seed": 5}))
    with pytest.raises(ValueError, match="not the parameters and options that were saved"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_transformers_loads_an_adapter_of_half_precision(dtype, tmp_path):
    """It converts θ to float32, of which the checksum is another one."""
    config = IntrinsicConfig(d=200, init_weights=False)
    model = get_peft_model(build("bert").to(dtype), config, autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    base = build("bert")
    base.load_adapter(str(tmp_path))
    theta = model.get_base_model().intrinsic.intrinsic_theta["default"].weight
    assert torch.equal(base.intrinsic.intrinsic_theta["default"].weight, theta.float())


def test_a_truncated_file_raises(tmp_path):
    trained("bert").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(Exception, match=r"incomplete metadata|MetadataIncompleteBuffer"):
        PeftModel.from_pretrained(build("bert"), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_of_half_precision_loads(dtype, tmp_path):
    model = trained("bert")
    model.save_pretrained(tmp_path)
    damaged(tmp_path, lambda t: t.update({THETA: t[THETA].to(dtype)}))
    with pytest.raises(ValueError, match=r"not the parameters and options that were saved.*remove the checksum"):
        PeftModel.from_pretrained(build("bert"), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "checksum": None}))
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path).eval()
    theta = loaded.get_base_model().intrinsic.intrinsic_theta["default"].weight
    assert theta.dtype == torch.float32
    assert torch.equal(theta, load_file(tmp_path / "adapter_model.safetensors")[THETA].float())
    assert output(loaded, batch("bert")).isfinite().all()
