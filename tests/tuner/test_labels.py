"""The number of labels is stored with an adapter: transformers makes such a head, and errors name it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIZES, batch, build, evaluate
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    pipeline,
)

from peft_intrinsic import IntrinsicConfig


@pytest.fixture
def expected(tmp_path, monkeypatch) -> torch.Tensor:
    """An encoder in `base`, which says nothing of labels, an adapter of three labels in `adapter`, and its logits."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES)).save_pretrained("base")
    base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=3)
    model = get_peft_model(base, IntrinsicConfig(d=30, task_type="SEQ_CLS", init_weights=False)).eval()
    model.save_pretrained("adapter")
    return evaluate(model, "bert")


def stored(folder: str = "adapter") -> dict[str, Any]:
    return json.loads(Path(folder, "adapter_config.json").read_text())


def two() -> Any:
    return AutoModelForSequenceClassification.from_pretrained("base")


@pytest.mark.parametrize("loader", [AutoModelForSequenceClassification, BertForSequenceClassification])
def test_transformers_load_the_head_that_the_adapter_names(loader, expected):
    model = loader.from_pretrained("adapter").eval()
    assert torch.equal(evaluate(model, "bert"), expected)
    assert model.config.id2label == {i: f"LABEL_{i}" for i in range(3)}


def test_a_pipeline_of_an_adapter_has_its_labels(expected):
    Path("vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]))
    tokenizer = BertTokenizerFast("vocab.txt")
    classify = pipeline("text-classification", model="adapter", tokenizer=tokenizer, device="cpu", top_k=None)
    base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=3)
    model = PeftModel.from_pretrained(base, "adapter").eval()
    with torch.no_grad():
        scores = model(**tokenizer("good film", return_tensors="pt")).logits.softmax(-1)[0]
    found = {row["label"]: row["score"] for row in classify(["good film"])[0]}
    assert [found[f"LABEL_{i}"] for i in range(3)] == pytest.approx(scores.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("load", "here"),
    [
        (lambda: PeftModel.from_pretrained(two(), "adapter"), 2),
        (lambda: two().load_adapter("adapter"), 2),
        (lambda: AutoPeftModelForSequenceClassification.from_pretrained("adapter"), 2),
        (lambda: AutoModelForSequenceClassification.from_pretrained("adapter", num_labels=5), 5),
        (lambda: BertForSequenceClassification.from_pretrained("adapter", num_labels=5), 5),
    ],
)
def test_another_number_of_labels_is_the_first_error(load, here, expected):
    with pytest.raises(ValueError, match=rf"^The adapter has 3 labels, this model {here}\. .* num_labels=3\.$"):
        load()


def test_a_configuration_that_is_used_again_takes_the_labels_of_the_new_model(expected):
    config = IntrinsicConfig(d=30, task_type="SEQ_CLS")
    for labels in (3, 2, 4):
        base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=labels)
        model = get_peft_model(base, config)
        assert model.peft_config["default"].num_labels == labels


def test_a_head_outside_the_adapter_may_have_other_labels(expected):
    """The offsets of the encoder do not depend on it."""
    options = {"d": 30, "target_modules": ["query"], "head": "keep", "task_type": "SEQ_CLS", "init_weights": False}
    base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=3)
    model = get_peft_model(base, IntrinsicConfig(**options)).eval()
    model.save_pretrained("encoder")
    loaded = PeftModel.from_pretrained(two(), "encoder").eval()
    with torch.no_grad():
        states = [some.get_base_model().bert(**batch("bert")).last_hidden_state for some in (model, loaded)]
    assert torch.equal(*states)


def test_adapters_without_a_number_of_labels_load(expected):
    """As they were written before it was stored, and as models without classes write them."""
    config = stored()
    assert config.pop("num_labels") == 3
    Path("adapter", "adapter_config.json").write_text(json.dumps(config))
    base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=3)
    assert torch.equal(evaluate(PeftModel.from_pretrained(base, "adapter").eval(), "bert"), expected)
    get_peft_model(build("llama"), IntrinsicConfig(d=30)).save_pretrained("words")
    assert stored("words")["num_labels"] is None


@pytest.mark.parametrize("labels", [2**40, -1, 0, "3", [3], None])
def test_a_file_cannot_request_a_head_that_fills_the_memory(labels, expected):
    Path("adapter", "adapter_config.json").write_text(json.dumps({**stored(), "num_labels": labels}))
    with pytest.raises((ValueError, TypeError), match=r"num_labels|number of labels"):
        AutoModelForSequenceClassification.from_pretrained("adapter")
