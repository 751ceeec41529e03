"""`head="labels"`: the rows of a new head from the labels' texts, against features from calls of the plain model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
)

from peft_intrinsic import IntrinsicConfig, init_head_from_labels
from peft_intrinsic.codec import compress, load_packed, read_packed
from peft_intrinsic.projection.randomness import normals, words

TEXTS = ["a very good film", "bad", "a film"]
KNOWN = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "a", "very"]
TASK: dict[str, Any] = {"d": 40, "task_type": "SEQ_CLS", "head": "labels"}


def make_tokenizer(special: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(KNOWN)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        pair = [("[CLS]", 2), ("[SEP]", 3)]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=pair)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def save_base(folder: Path, family: str = "bert", tokenizer: bool = True) -> Path:
    """Save a model without a task head, whose matrices are as large as trained ones, and its tokenizer."""
    model = build(family)
    for parameter in model.parameters():
        parameter.data.mul_(8 if parameter.dim() > 1 else 1)
    (model if family == "llama" else model.base_model).save_pretrained(folder)
    if tokenizer:
        make_tokenizer(special=family != "llama").save_pretrained(folder)
    return folder


def load(folder: Path, seed: int = 1, kind: Any = AutoModelForSequenceClassification, **options) -> Any:
    torch.manual_seed(seed)
    return kind.from_pretrained(folder, **{"num_labels": 3, **options}).eval()


def encode(text: str, special: bool = True) -> torch.Tensor:
    ids = [KNOWN.index(word) for word in text.split()]
    return torch.tensor([[2, *ids, 3] if special else ids])


def scaled(features: list[torch.Tensor]) -> torch.Tensor:
    """The rows for given features: less their mean, with logits of standard deviation 2 for these features."""
    stacked = torch.stack(features)
    rows = stacked - stacked.mean(0)
    return rows * 2 / (rows @ stacked.T).std(correction=0)


def from_seed(model: nn.Module, name: str) -> torch.Tensor:
    parameter = model.get_parameter(name)
    return torch.from_numpy(normals(words(0, "head", name, parameter.numel())) * 0.02).float().view(parameter.shape)


def features(model: Any, family: str, text: str) -> torch.Tensor:
    """What the head's last linear layer gets for a text, by calls of the plain model."""
    if family == "llama":
        return model.model(encode(text, special=False)).last_hidden_state[0, -1]
    if family == "bert":
        return model.bert(encode(text)).pooler_output[0]
    first = model.base_model(encode(text)).last_hidden_state[0, 0]
    names = {"roberta": "classifier.dense", "distilbert": "pre_classifier", "bart": "classification_head.dense"}
    dense = from_seed(model, f"{names[family]}.weight") @ first
    return dense.relu() if family == "distilbert" else dense.tanh()


def weight(model: Any) -> torch.Tensor:
    """The weight of the head's last linear layer, without an offset."""
    heads = [getattr(model.get_base_model(), name, None) for name in ("classifier", "score", "classification_head")]
    head = next(filter(None, heads))
    head = getattr(head, "out_proj", head)
    return getattr(head, "base_layer", head).weight


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[2, 4, 5, 3], [2, 7, 6, 3]])).logits


@pytest.fixture
def base(tmp_path) -> Path:
    return save_base(tmp_path / "base")


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "llama", "bart"])
@torch.no_grad()
def test_rows_are_the_centered_features_of_the_texts(family, tmp_path):
    folder = save_base(tmp_path / "base", family)
    plain = load(folder)
    expected = scaled([features(plain, family, text) for text in TEXTS])
    model = get_peft_model(load(folder, seed=2).train(), IntrinsicConfig(**TASK, label_texts=TEXTS))
    assert torch.allclose(weight(model), expected, rtol=1e-4, atol=1e-5)
    assert expected.abs().max() > 0.01
    assert all(module.training for module in model.modules())


@torch.no_grad()
def test_a_token_classifier_gets_the_mean_over_the_tokens_of_a_text(tmp_path):
    folder = save_base(tmp_path / "base")
    plain = load(folder, kind=AutoModelForTokenClassification)
    expected = scaled([plain.bert(encode(text)).last_hidden_state[0, 1:-1].mean(0) for text in TEXTS])
    config = IntrinsicConfig(**{**TASK, "task_type": "TOKEN_CLS"}, label_texts=TEXTS)
    model = get_peft_model(load(folder, seed=2, kind=AutoModelForTokenClassification), config)
    assert torch.allclose(weight(model), expected, rtol=1e-4, atol=1e-5)


def test_names_of_labels_are_the_default_texts(base):
    named = load(base, id2label={0: "very_good", 1: "bad", 2: "film"})
    model = get_peft_model(named, IntrinsicConfig(**TASK))
    other = get_peft_model(load(base), IntrinsicConfig(**TASK, label_texts=["very good", "bad", "film"]))
    assert torch.equal(weight(model), weight(other))
    assert model.peft_config["default"].label_texts == ["very good", "bad", "film"]


def test_a_configuration_that_is_used_again_takes_the_names_of_the_new_model(base):
    config = IntrinsicConfig(**TASK)
    for names in (["good", "bad", "film"], ["a", "very", "good"]):
        model = get_peft_model(load(base, id2label=dict(enumerate(names))), config)
        assert model.peft_config["default"].label_texts == names


def test_rows_do_not_depend_on_an_attached_adapter(base):
    """The first adapter has a head of its own, so the base model's head is still new."""
    expected = weight(get_peft_model(load(base), IntrinsicConfig(**TASK, label_texts=TEXTS)))
    own = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"], "init_weights": False}
    model = get_peft_model(load(base), IntrinsicConfig(d=40, **own))
    with torch.no_grad():
        before = logits(model)
        model.add_adapter("second", IntrinsicConfig(**TASK, label_texts=TEXTS))
        assert torch.equal(logits(model), before)
    original = model.get_base_model().classifier.original_module
    assert torch.equal(getattr(original, "base_layer", original).weight, expected)
    other = get_peft_model(load(base), IntrinsicConfig(d=40, **own))
    other.merge_adapter()
    with pytest.raises(ValueError, match=r"Call unmerge_adapter\(\) first"):
        other.add_adapter("second", IntrinsicConfig(**TASK, label_texts=TEXTS))


def test_a_saved_adapter_gives_the_same_outputs_on_a_newly_loaded_base(base, tmp_path):
    config = IntrinsicConfig(**TASK, label_texts=TEXTS, init_weights=False)
    model = get_peft_model(load(base), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    for loaded in (
        PeftModel.from_pretrained(load(base, seed=2), tmp_path / "adapter"),
        PeftModel.from_pretrained(load(base, seed=3), tmp_path / "adapter", low_cpu_mem_usage=True),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter"),
    ):
        assert torch.equal(logits(loaded.eval()), expected)
    saved = load(base)
    saved.classifier.weight.data.copy_(weight(model))
    saved.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits(PeftModel.from_pretrained(load(tmp_path / "whole"), tmp_path / "adapter")), expected)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_unload_restores_the_head(family, tmp_path):
    plain = load(save_base(tmp_path / "base", family))
    expected = logits(plain)
    assert torch.equal(logits(get_peft_model(plain, IntrinsicConfig(**TASK, label_texts=TEXTS)).unload()), expected)


def test_random_states_do_not_change(base):
    plain = load(base)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    get_peft_model(plain, IntrinsicConfig(**TASK, label_texts=TEXTS))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("change", [{"label_texts": TEXTS[::-1]}, {"head": "subspace", "label_texts": None}])
def test_a_second_adapter_shares_the_rows_or_raises(change, base, tmp_path):
    options = {**TASK, "label_texts": TEXTS}
    model = get_peft_model(load(base), IntrinsicConfig(**options))
    expected = weight(model).clone()
    model.add_adapter("second", IntrinsicConfig(**options, seed=1))
    get_peft_model(load(base), IntrinsicConfig(**{**options, **change})).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"does not go with adapter 'default', which has head='labels'"):
        model.add_adapter("third", IntrinsicConfig(**{**options, **change}))
    with pytest.raises(ValueError, match=r"does not go with adapter 'default', which has head='labels'"):
        model.load_adapter(tmp_path / "other", "third")
    assert torch.equal(weight(model), expected)
    assert list(model.peft_config) == ["default", "second"]


def test_another_base_raises_and_a_rounded_one_warns(base, tmp_path):
    get_peft_model(load(base), IntrinsicConfig(**TASK, label_texts=TEXTS)).save_pretrained(tmp_path / "adapter")
    other = load(base)
    other.bert.embeddings.word_embeddings.weight.data.roll(1)
    other.bert.pooler.dense.weight.data.copy_(other.bert.pooler.dense.weight.flip(0))
    expected = logits(other)
    with pytest.raises(ValueError, match=r"labels' texts of this base model differ .* it has other weights"):
        PeftModel.from_pretrained(other, tmp_path / "adapter")
    assert torch.equal(logits(other), expected)
    with pytest.warns(UserWarning, match=r"labels' texts of this base model differ .* another dtype"):
        PeftModel.from_pretrained(load(base, dtype=torch.float16), tmp_path / "adapter")


def test_another_tokenizer_raises(base, tmp_path):
    get_peft_model(load(base), IntrinsicConfig(**TASK, label_texts=TEXTS)).save_pretrained(tmp_path / "adapter")
    make_tokenizer(special=False).save_pretrained(base)
    with pytest.raises(ValueError, match=r"labels' texts of this base model differ .* it has other weights"):
        PeftModel.from_pretrained(load(base), tmp_path / "adapter")


def test_changed_texts_in_a_file_raise(base, tmp_path):
    get_peft_model(load(base), IntrinsicConfig(**TASK, label_texts=TEXTS)).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "label_texts": TEXTS[::-1]}))
    with pytest.raises(ValueError, match=r"labels' texts of this base model differ .* it has other weights"):
        PeftModel.from_pretrained(load(base), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("options", "texts", "message"),
    [
        ({}, None, r"id2label=\['LABEL_0', 'LABEL_1', 'LABEL_2'\] has no names"),
        ({}, TEXTS[:2], r"label_texts has 2 texts, and the model num_labels=3"),
        ({}, ["bad", "good", "bad"], "'bad' and 'bad' have the same tokens"),
        ({}, ["bad", "one", "two"], "'one' and 'two' have the same tokens"),
        ({}, ["bad", "good", "a." * 300], "has 602 tokens, and the model 512 positions"),
        ({"num_labels": 1}, ["bad"], r"needs at least two labels, and the model has num_labels=1"),
    ],
)
def test_texts_that_do_not_fit_raise_and_change_nothing(options, texts, message, base):
    plain = load(base, **options)
    expected = logits(plain)
    config = IntrinsicConfig(**TASK, label_texts=texts)
    with pytest.raises(ValueError, match=message):
        get_peft_model(plain, config)
    assert torch.equal(logits(plain), expected)
    assert not any("intrinsic" in name for name, _ in plain.named_modules())
    assert config.label_texts == texts


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"label_texts": TEXTS, "head": "keep"}, ValueError, "needs head='labels', got head='keep'"),
        ({"label_texts": ["bad", " "]}, ValueError, "must have from 1 to 1000 characters"),
        ({"label_texts": "bad"}, TypeError, "must be None or a list of strings"),
        ({"label_sketch": [1.0], "peft_type": "INTRINSIC"}, TypeError, "a list of 8 floats"),
    ],
)
def test_invalid_options_raise(options, error, message):
    with pytest.raises(error, match=message):
        IntrinsicConfig(**{**TASK, **options})


def test_a_head_from_the_checkpoint_raises(base, tmp_path):
    load(base).save_pretrained(tmp_path / "whole")
    make_tokenizer().save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="needs a linear head for num_labels=3 that is missing from the check"):
        get_peft_model(load(tmp_path / "whole"), IntrinsicConfig(**TASK, label_texts=TEXTS))


def test_a_model_without_classes_raises():
    with pytest.raises(ValueError, match="needs a linear head for num_labels=2"):
        get_peft_model(build("gpt2"), IntrinsicConfig(d=40, head="labels", label_texts=TEXTS[:2]))


def test_a_base_on_the_meta_device_raises(base):
    with pytest.raises(ValueError, match="on the meta device"):
        get_peft_model(load(base, device_map="meta"), IntrinsicConfig(**TASK, label_texts=TEXTS))


def test_without_a_tokenizer_the_error_names_the_function_that_takes_one(tmp_path):
    folder = save_base(tmp_path / "base", tokenizer=False)
    config = IntrinsicConfig(**TASK, label_texts=TEXTS, init_weights=False)
    with pytest.raises(ValueError, match=r"Call peft_intrinsic\.init_head_from_labels\(model, tokenizer"):
        get_peft_model(load(folder), config)
    plain = load(folder)
    init_head_from_labels(plain, make_tokenizer(), TEXTS)
    model = get_peft_model(plain, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = load(folder, seed=2)
    init_head_from_labels(again, make_tokenizer(), TEXTS)
    assert torch.equal(logits(PeftModel.from_pretrained(again, tmp_path / "adapter").eval()), logits(model))


def test_an_adapter_after_init_head_from_labels_has_its_texts_or_raises(base):
    def initialized() -> Any:
        plain = load(base)
        init_head_from_labels(plain, make_tokenizer(), TEXTS)
        return plain

    rows = initialized().classifier.weight
    model = get_peft_model(initialized(), IntrinsicConfig(**TASK))
    assert model.peft_config["default"].label_texts == TEXTS
    assert torch.equal(weight(model), rows)
    with pytest.raises(ValueError, match=r"are not the texts of init_head_from_labels"):
        get_peft_model(initialized(), IntrinsicConfig(**TASK, label_texts=TEXTS[::-1]))
    with pytest.raises(ValueError, match=r"head='subspace' would replace the head that init_head_from_labels made"):
        get_peft_model(initialized(), IntrinsicConfig(**{**TASK, "head": "subspace"}))
    twice = initialized()
    init_head_from_labels(twice, make_tokenizer(), TEXTS[::-1])
    assert torch.allclose(twice.classifier.weight, rows.flip(0))
    with pytest.raises(ValueError, match="has an adapter"):
        init_head_from_labels(model, make_tokenizer(), TEXTS)


def test_a_lora_starts_from_the_rows_and_saves_the_head(base, tmp_path):
    plain = load(base)
    init_head_from_labels(plain, make_tokenizer(), TEXTS)
    rows = plain.classifier.weight.clone()
    model = get_peft_model(plain, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    trained = plain.classifier.modules_to_save["default"].weight
    assert torch.equal(trained, rows)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(input_ids=encode("bad film"), labels=torch.tensor([0])).loss.backward()
    optimizer.step()
    assert not torch.equal(trained, rows)
    model.save_pretrained(tmp_path / "lora")
    loaded = PeftModel.from_pretrained(load(base, seed=2), tmp_path / "lora")
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))


def test_a_packed_adapter_starts_another_base_from_the_texts(base):
    model = get_peft_model(load(base), IntrinsicConfig(**TASK, label_texts=TEXTS, init_weights=False)).eval()
    data = compress(model, 40)
    loaded = load_packed(load(base, seed=2), data)
    assert loaded.peft_config["default"].label_texts == TEXTS
    rounded = model.get_base_model().intrinsic.intrinsic_theta["default"].weight
    rounded.data.copy_(torch.from_numpy(read_packed(data).theta))
    assert torch.equal(logits(loaded), logits(model))
    damaged = replace(read_packed(data), options={**read_packed(data).options, "label_sketch": [1.0] * 8}).to_bytes()
    with pytest.raises(ValueError, match=r"labels' texts of this base model differ .* it has other weights"):
        load_packed(load(base), damaged)
