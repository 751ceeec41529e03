"""Rows of a bank by name, saved banks, and banks that cannot be made."""

from __future__ import annotations

import copy
import json
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import batch, build
from helpers.hub import serve_hub
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_intrinsic import AdapterBank, IntrinsicConfig
from peft_intrinsic.card import BANK_FILE
from peft_intrinsic.tuner.files import checksum

NAMES = ["ann", "bob", "eve"]


def named(said: bool = True, adapter: str = "default") -> AdapterBank:
    config = IntrinsicConfig(d=60, said=said, target_modules="all-linear")
    model = get_peft_model(build("bert"), config, adapter_name=adapter).eval()
    return AdapterBank(model, torch.randn(3, 60, generator=torch.Generator().manual_seed(0)) / 500, names=NAMES)


@torch.no_grad()
def logits(bank: AdapterBank, index) -> torch.Tensor:
    return bank(adapter_index=index, **batch("bert")).logits


def test_names_select_the_same_rows_as_indexes():
    bank = named()
    assert torch.equal(logits(bank, ["eve", "__base__", "ann", "eve"]), logits(bank, [2, -1, 0, 2]))
    assert bank.find(["bob", "__base__"]) == [1, -1]
    with pytest.raises(ValueError, match=r"names=\['dan'\] are not in the bank. Add them with append"):
        logits(bank, ["eve", "dan", "ann", "eve"])


def test_indexes_among_names_raise():
    """Index 0 is not the name "0"."""
    bank = AdapterBank(named().model, 2, names=["1", "0"])
    with pytest.raises(ValueError, match=r"names=\[0\] are not in the bank"):
        logits(bank, [0, "1", "1", "1"])


@pytest.mark.parametrize("names", [["ann", "ann", "bob"], ["ann", "__base__", "bob"]])
def test_names_that_are_not_unique_raise(names):
    with pytest.raises(ValueError, match=r"names=\['(ann|__base__)'\] occur twice, or name the base model"):
        AdapterBank(named().model, 3, names=names)


def test_names_that_are_no_strings_raise():
    with pytest.raises(ValueError, match=r"names=\[1, 0\] must be strings"):
        AdapterBank(named().model, 2, names=[1, 0])
    with pytest.raises(ValueError, match=r"names='ann' must be a list of names, such as \['ann'\]"):
        named().find("ann")


@pytest.mark.parametrize("vectors", [[0.0] * 60, 2.0, -1, "3"])
def test_vectors_that_are_neither_a_tensor_nor_a_number_of_rows_raise(vectors):
    with pytest.raises(ValueError, match=r"vectors=.* must be a tensor \[K, 60\] or a number of new adapters"):
        AdapterBank(named().model, vectors)


@pytest.mark.parametrize(
    "wrap", [lambda base: base, lambda base: get_peft_model(base, LoraConfig(task_type="SEQ_CLS"))]
)
def test_a_model_without_an_intrinsic_adapter_raises(wrap):
    with pytest.raises(ValueError, match=r"model is a .* without an intrinsic adapter"):
        AdapterBank(wrap(build("bert")), 3)


def test_names_for_some_rows_raise():
    with pytest.raises(ValueError, match="names has 2 names for 3 rows"):
        AdapterBank(named().model, 3, names=["ann", "bob"])
    with pytest.raises(ValueError, match="names has 3 names for 4 rows"):
        named().append(1)


def test_new_rows_start_as_the_attached_adapter():
    """At the base model, until that one is trained."""
    bank = AdapterBank(named().model, 2)
    assert torch.equal(logits(bank, [0, 1, 1, 0]), logits(bank, [-1] * 4))
    assert bank.vectors.requires_grad
    vector = bank.model.base_model.vector
    vector.intrinsic_theta["default"].weight.data += 0.01
    bank.append(1)
    assert torch.equal(bank.vectors[2], vector.concatenate("default"))
    assert not torch.equal(bank.vectors[2], bank.vectors[1])


def test_appended_rows_leave_the_others_as_they_were():
    bank = named()
    before, expected = bank.vectors.clone(), logits(bank, [0, 1, 2, 0])
    bank.append(torch.full((1, 60), 1e-3), ["dan"])
    assert bank.names == [*NAMES, "dan"]
    assert torch.equal(bank.vectors[:3], before)
    assert torch.equal(logits(bank, [0, 1, 2, 0]), expected)
    assert not torch.equal(logits(bank, ["dan"] * 4), logits(bank, [-1] * 4))
    for wrong in (torch.zeros(1, 61), torch.zeros(60)):
        with pytest.raises(ValueError, match=r"shape \[K, 60\]"):
            bank.append(wrong, ["dan2"])
    with pytest.raises(ValueError, match=r"names=\['ann'\] occur twice"):
        bank.append(1, ["ann"])
    assert bank.names == [*NAMES, "dan"]
    assert len(bank.vectors) == 4


def test_indexes_that_are_missing_or_outside_the_bank_raise():
    bank = named()
    with pytest.raises(ValueError, match=r"adapter_index is missing. Pass the row of the bank for each sample"):
        bank(**batch("bert"))
    wrong = [[0, 1, 2, 3], [-2, 0, 0, 0], torch.tensor([0.0, 1.0, 0.0, 0.0]), [True, False, True, True]]
    for index in (*wrong, [0, None, 1, 1], 0, "ann"):
        with pytest.raises(IndexError, match="−1 to 2"):
            bank(adapter_index=index, **batch("bert"))
    with pytest.raises(ValueError, match="chosen for 3 samples"):
        bank(adapter_index=[0, 1, 2], **batch("bert"))


def test_generate_uses_the_adapter_of_each_prompt():
    config = IntrinsicConfig(d=60, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(build("llama"), config).eval()
    bank = AdapterBank(model, torch.randn(2, 60, generator=torch.Generator().manual_seed(0)))
    prompts = batch("llama")["input_ids"][:2]
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found = bank.generate(prompts, adapter_index=[1, 0], **options).logits[0]
    with torch.no_grad():
        expected = bank(prompts, adapter_index=[1, 0]).logits[:, -1]
        assert not torch.allclose(expected, model(prompts).logits[:, -1], atol=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with bank.select([1, 0]):
        torch.testing.assert_close(bank.generate(prompts, **options).logits[0], found, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"adapter_index is missing. Pass the row of the bank for each prompt"):
        bank.generate(prompts)


def test_the_trained_parameters_are_those_of_the_rows(capsys):
    bank = AdapterBank(named().model, 3)
    trained, every = bank.get_nb_trainable_parameters()
    assert trained == sum(p.numel() for p in bank.parameters() if p.requires_grad) == 180
    assert every == 180 + sum(p.numel() for p in bank.model.parameters())
    bank.print_trainable_parameters()
    assert "trainable params: 180 ||" in capsys.readouterr().out
    assert bank.requires_grad_(False).get_nb_trainable_parameters()[0] == 0


@pytest.mark.parametrize("projection", ["value_bias", "value_lora", "fastfood"])
@pytest.mark.parametrize("compiled", [False, True])
def test_several_indexes_for_one_sample_raise(projection, compiled):
    """A Llama would take the second row of values for further heads."""
    config = IntrinsicConfig(d=20, projection=projection, target_modules=["v_proj"])
    bank, ids = AdapterBank(get_peft_model(build("llama"), config).eval(), 2), batch("llama")["input_ids"]
    if compiled:
        bank.model.compile(backend="eager")
    with pytest.raises(ValueError, match="chosen for 2 samples in a batch of 1"):
        bank(adapter_index=[0, 1], input_ids=ids[:1])
    if not compiled:
        assert len(bank(adapter_index=[1], input_ids=ids[:1]).logits) == 1
        with pytest.raises(ValueError, match=r"chosen for 2 samples, .* in a batch of 1"), bank.select([0, 1]):
            bank.model(input_ids=ids[:1])


def test_a_row_with_nan_is_named_and_the_others_work(tmp_path):
    bank = named()
    bank.save_pretrained(tmp_path)
    expected = logits(bank, [0, 2, 2, 0])
    bank.vectors[1, 5] = float("nan")
    assert torch.equal(logits(bank, [0, 2, 2, 0]), expected)
    with pytest.raises(ValueError, match=r"Rows 1 \('bob'\) contain NaN or infinite values. The others do not"):
        logits(bank, [0, 1, 2, 0])
    with pytest.raises(ValueError, match=r"Rows 1 \('bob'\) contain NaN.*Nothing was written"):
        bank.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="contains NaN or infinite values"):
        bank.save_adapter("bob", tmp_path / "bob")
    assert AdapterBank.from_pretrained(build("bert"), tmp_path).vectors.isfinite().all()


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("adapter", ["default", "shared"])
def test_a_saved_bank_gives_the_same_outputs(tmp_path, adapter, attached):
    bank = named(adapter=adapter)
    bank.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [BANK_FILE, "adapter_config.json"]
    loaded = AdapterBank.from_pretrained(named().model if attached else build("bert"), tmp_path).eval()
    assert loaded.names == NAMES
    assert not loaded.vectors.requires_grad
    assert torch.equal(logits(loaded, ["eve", "bob", "ann", "__base__"]), logits(bank, [2, 1, 0, -1]))


def test_a_bank_on_the_hub_gives_the_same_outputs(tmp_path, monkeypatch):
    """Pushed to a server on this machine, and loaded from there, with the token and the revision in each request."""
    bank = named()
    options = {"revision": "v1", "token": "hf_x", "cache_dir": tmp_path / "cache"}
    with serve_hub(monkeypatch) as hub:
        bank.push_to_hub("user/bank", token="hf_x")
        assert sorted(hub.files) == ["README.md", BANK_FILE, "adapter_config.json"]
        hub.requests.clear()
        loaded = AdapterBank.from_pretrained(build("bert"), "user/bank", **options).eval()
        assert {token for _, token in hub.requests} == {"Bearer hf_x"}
        asked = {path.partition("/resolve/")[2] for path, _ in hub.requests}
        assert asked == {f"v1/{BANK_FILE}", "v1/adapter_config.json"}
        hub.files[BANK_FILE] = hub.files[BANK_FILE][:-1] + b"\x7f"
        with pytest.raises(ValueError, match="not the rows, names and options that were saved"):
            AdapterBank.from_pretrained(build("bert"), "user/bank", **{**options, "cache_dir": tmp_path / "other"})
    assert loaded.names == NAMES
    assert torch.equal(logits(loaded, ["eve", "bob", "ann", "__base__"]), logits(bank, [2, 1, 0, -1]))
    card = ModelCard(hub.files["README.md"].decode())
    assert {"peft", "adapter-bank"} <= set(card.data.tags)
    assert "intrinsic" not in card.data.tags  # that of single adapters
    assert "AdapterBank.from_pretrained(base_model, " in card.text
    assert "PeftModel" not in card.text


def test_adapters_on_the_hub_are_rows_of_a_bank(tmp_path, monkeypatch):
    bank = named()
    bank.save_adapter("bob", tmp_path / "bob")
    with serve_hub(monkeypatch) as hub:
        hub.files.update({path.name: path.read_bytes() for path in (tmp_path / "bob").iterdir()})
        loaded = AdapterBank.from_pretrained(
            bank.model, ["user/bob"], revision="v1", token="hf_x", cache_dir=tmp_path / "cache"
        )
        assert {token for _, token in hub.requests} == {"Bearer hf_x"}
        asked = {path.partition("/resolve/")[2] for path, _ in hub.requests}
        assert asked == {"v1/adapter_model.safetensors", "v1/adapter_config.json"}
    assert torch.equal(loaded.vectors, bank.vectors[1:2])


def test_a_name_on_the_hub_that_is_no_bank_raises(tmp_path, monkeypatch):
    named().save_adapter("bob", tmp_path / "bob")
    with serve_hub(monkeypatch) as hub:
        with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json' at 'user/nothing'"):
            AdapterBank.from_pretrained(build("bert"), "user/nothing", cache_dir=tmp_path)
        hub.files.update({path.name: path.read_bytes() for path in (tmp_path / "bob").iterdir()})
        with pytest.raises(ValueError, match=r"user/bob contains no adapter_bank.*saved adapters as a list"):
            AdapterBank.from_pretrained(build("bert"), "user/bob", cache_dir=tmp_path)


@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("adapter", ["default", "shared"])
def test_a_row_is_saved_as_an_adapter_of_peft(tmp_path, adapter, said):
    bank = named(said, adapter)
    bank.save_adapter("bob", tmp_path)
    bank.save_adapter(2, tmp_path / "eve")
    expected = logits(bank, ["bob"] * 4)
    model = PeftModel.from_pretrained(build("bert"), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch("bert")).logits, expected, rtol=1e-4, atol=1e-5)
    again = AdapterBank.from_pretrained(model, [str(tmp_path), str(tmp_path / "eve")])
    assert torch.equal(again.vectors, bank.vectors[1:])
    for row in (3, -1):
        with pytest.raises(IndexError, match=f"row={row} must be one of 0 to 2"):
            bank.save_adapter(row, tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "\n## My notes\n")
    bank.save_adapter("bob", tmp_path)
    assert "## My notes" in card.read_text()


def test_lists_without_adapters_and_models_without_the_projection_raise(tmp_path):
    bank = named()
    bank.save_pretrained(tmp_path)
    for model, paths, message in (
        (bank.model, [], "must name one at least"),
        (build("bert"), [str(tmp_path)], "got a BertForSequenceClassification"),
        (bank.model, [str(tmp_path)], "is a saved bank, not an adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            AdapterBank.from_pretrained(model, paths)
    with pytest.raises(ValueError, match="names='ab' must be a list of names"):
        AdapterBank(bank.model, 2, names="ab")
    assert AdapterBank(bank.model, np.int64(2), names=np.array(["a", "b"])).find(["b"]) == [1]


def test_a_save_that_fails_leaves_the_old_files(tmp_path, monkeypatch):
    bank = named()
    bank.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    bank.vectors.mul_(2)
    monkeypatch.setattr(IntrinsicConfig, "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk is full")))
    with pytest.raises(OSError, match="disk is full"):
        bank.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def rewrite(folder: Path, vectors: torch.Tensor | None = None, **metadata: str) -> None:
    with safe_open(folder / BANK_FILE, "pt") as file:
        rows, written = file.get_tensor("rows"), file.metadata()
    save_file({"rows": rows if vectors is None else vectors}, folder / BANK_FILE, {**written, **metadata})


HOSTILE = ["", "[1, 2, 3]", "[[], [], []]", '{"ann": 0, "bob": 1, "eve": 2}', "[" * 100_000]


def rename(folder: Path, names: str) -> None:
    """Write other names, with the checksum that belongs to them."""
    rows = load_file(folder / BANK_FILE)["rows"]
    rewrite(folder, names=names, checksum=str(checksum(IntrinsicConfig.from_pretrained(folder), {names: rows})))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: rewrite(folder, torch.zeros(3, 61)), "not one matrix 'rows' of 60 columns"),
        (lambda folder: rewrite(folder, torch.zeros(3, 60)), "not the rows, names and options that were saved"),
        (lambda folder: rewrite(folder, names=json.dumps(["bob", "ann", "eve"])), "not the rows, names and options"),
        (lambda folder: (folder / BANK_FILE).unlink(), "contains no adapter_bank.*saved adapters as a list"),
        (lambda folder: LoraConfig().save_pretrained(folder), "has a LoraConfig, not an IntrinsicConfig"),
        *((partial(rename, names=text), "names of the rows are not a list of strings") for text in HOSTILE),
    ],
)
def test_files_of_a_bank_that_are_damaged_raise(tmp_path, damage, message):
    named().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        AdapterBank.from_pretrained(build("bert"), tmp_path)


def test_a_bank_of_another_projection_raises(tmp_path):
    named().save_pretrained(tmp_path)
    model = get_peft_model(build("bert"), IntrinsicConfig(d=60, said=True, target_modules="all-linear", seed=3))
    with pytest.raises(ValueError, match=r"cannot join the bank: it differs.*seed \(3 and 0\)"):
        AdapterBank.from_pretrained(model, tmp_path)


@pytest.mark.parametrize("saved", ["bank", "adapter"])
def test_value_biases_of_another_base_model_raise(tmp_path, saved):
    """Other weights have other directions, which no option shows."""
    bank = AdapterBank(get_peft_model(build("llama"), IntrinsicConfig(d=20)), 2)
    bank.save_pretrained(tmp_path / "bank")
    bank.save_adapter(0, tmp_path / "adapter")
    paths = {"bank": str(tmp_path / "bank"), "adapter": [str(tmp_path / "adapter")]}[saved]
    assert AdapterBank.from_pretrained(bank.model, paths).vectors.shape[1] == 20
    other = build("llama")
    for layer in other.model.layers:
        torch.nn.init.normal_(layer.self_attn.o_proj.weight)
    model = get_peft_model(other, IntrinsicConfig(d=20))
    with pytest.raises(ValueError, match=rf"{saved}: the directions of value biases of this base model differ"):
        AdapterBank.from_pretrained(model, paths)


def test_copies_of_a_bank_have_their_own_rows_and_model():
    bank = named()
    expected = logits(bank, [2, 1, 0, -1])
    for other in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
        assert torch.equal(logits(other, ["eve", "bob", "ann", "__base__"]), expected)
        other.vectors.zero_()
        other.train()
        assert other.model.training
    assert torch.equal(logits(bank, [2, 1, 0, -1]), expected)
    assert not bank.model.training


def test_to_converts_the_rows_and_the_model():
    bank = named().to(torch.float64)
    assert {p.dtype for p in [*bank.parameters(), *bank.model.parameters()]} == {torch.float64}
    assert bank.config is bank.model.config
