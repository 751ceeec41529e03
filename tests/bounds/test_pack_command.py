"""The commands pack and unpack, and the options that they and certify check before loading a model."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.films import D, certify, count_errors, films
from helpers.texts import write
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.codec import load_packed, read_packed
from peft_intrinsic_cli import main


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return films(tmp_path)


def test_pack_reports_accuracy_and_unpack_writes_an_equal_adapter(folder, capsys):
    more = ["--eval", "test.jsonl", "--text-form", "--qr", "x.png"]
    main(["pack", "adapter", "-o", "x.pia", "--max-bytes", "90", *more])
    out = capsys.readouterr().out
    after = 1 - count_errors("x.pia", "test.jsonl") / 40
    assert f"{after:.4f} packed" in out
    assert re.search(r"^x\.pia: \d+ bytes, d = 30, θ rounded to \d+ values, for base\n", out)
    assert Path("x.pia").stat().st_size <= 90
    assert Path("x.png").stat().st_size > 200
    main(["unpack", "x.pia", "-o", "again", "--model", "base"])
    base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=2)
    other = AutoModelForSequenceClassification.from_pretrained("base", num_labels=2)
    one, two = load_packed(base, "x.pia"), PeftModel.from_pretrained(other, "again")
    ids = torch.tensor([[2, 3, 4]])
    assert torch.equal(one(input_ids=ids).logits, two(input_ids=ids).logits)
    with pytest.raises(SystemExit, match="2"):
        main(["unpack", "x.pia", "-o", "again", "--model", "base"])
    assert "holds files already" in capsys.readouterr().err


def test_pack_and_certify_create_the_folders_of_their_files(folder):
    main(["pack", "adapter", "-o", "a/b/x.pia", "--num-labels", "2", "--qr", "c/x.svg"])
    assert Path("a/b/x.pia").is_file()
    assert Path("c/x.svg").is_file()
    certify("--adapter", "a/b/x.pia", "-o", "d/x.pia")
    assert Path("d/x.certificate.json").is_file()


def test_pack_accepts_a_head_with_more_labels_than_the_data_have(folder, capsys):
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=3)
    config = IntrinsicConfig(d=D, task_type="SEQ_CLS", init_weights=False)
    get_peft_model(base, config).save_pretrained("three")
    main(["pack", "three", "-o", "x.pia", "--eval", "test.jsonl", "--num-labels", "3"])
    assert f"{1 - count_errors('x.pia', 'test.jsonl', 3) / 40:.4f} packed" in capsys.readouterr().out
    write(folder, "four.jsonl", [{"text": "a film", "label": label} for label in range(4)])
    with pytest.raises(SystemExit, match="2"):
        main(["pack", "three", "-o", "x.pia", "--eval", "four.jsonl"])
    assert "The model has 3 labels, four.jsonl 4:" in capsys.readouterr().err
    write(folder, "two.jsonl", [{"text": "a film", "label": label} for label in "bc"])
    with pytest.raises(SystemExit, match="2"):
        main(["pack", "three", "-o", "x.pia", "--eval", "two.jsonl"])
    assert "The model has 3 labels, two.jsonl 2: b, c. Correct the data: class i of" in capsys.readouterr().err


def test_a_text_that_is_too_long_for_the_model_raises(folder, capsys):
    config = AutoConfig.from_pretrained("base", max_position_embeddings=16)
    AutoModel.from_config(config).save_pretrained("short")
    AutoTokenizer.from_pretrained("base").save_pretrained("short")
    write(folder, "long.jsonl", [{"text": "film " * 30, "label": i % 2} for i in range(4)])
    with pytest.raises(SystemExit, match="2"):
        main(["pack", "adapter", "-o", "x.pia", "--model", "short", "--eval", "long.jsonl"])
    assert "short has 16 positions, and a text of the data" in capsys.readouterr().err


@pytest.fixture
def three(folder) -> Path:
    """A folder with an adapter of three labels, which the base model's configuration does not state."""
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=3)
    config = IntrinsicConfig(d=D, task_type="SEQ_CLS", init_weights=False)
    get_peft_model(base, config).save_pretrained("three")
    return folder


def test_commands_take_the_number_of_labels_from_the_adapter(three, capsys):
    main(["pack", "three", "-o", "x.pia"])
    assert read_packed("x.pia").classes == 3
    main(["pack", "three", "-o", "y.pia", "--eval", "test.jsonl"])
    assert f"{1 - count_errors('y.pia', 'test.jsonl', 3) / 40:.4f} packed" in capsys.readouterr().out
    main(["unpack", "x.pia", "-o", "again"])
    assert json.loads(Path("again/adapter_config.json").read_text())["num_labels"] == 3
    main(["distance", "base", "three"])
    assert "classifier.weight" in capsys.readouterr().out
    certify("--adapter", "three", "-o", "z.pia")
    main(["verify", "z.pia", "--train", "train.jsonl"])
    assert "Agrees with the certificate" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["pack", "three", "-o", "x.pia"], ["distance", "base", "three"]])
def test_another_number_of_labels_is_reported_with_both_counts(three, capsys, words):
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--num-labels", "2"])
    message = "peft-intrinsic: --num-labels 2: the adapter has 3 labels. Leave the option out.\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["pack", "three", "-o", "x.pia", "--model", "two"], "--model"),
        (["pack", "three", "-o", "x.pia", "--model", "two", "--eval", "test.jsonl"], "--model"),
        (["distance", "two", "three"], "BASE"),
    ],
)
def test_a_base_model_whose_head_has_other_labels_is_reported(three, capsys, words, option):
    AutoModelForSequenceClassification.from_pretrained("base", num_labels=2).save_pretrained("two")
    AutoTokenizer.from_pretrained("base").save_pretrained("two")
    with pytest.raises(SystemExit, match="2"):
        main(words)
    message = f"peft-intrinsic: {option} two: its head has 2 labels, the data or the adapter 3. Pass a base model"
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["unpack", "x.pia", "-o", "again"], ["verify", "x.pia", "--train", "train.jsonl"]])
def test_missing_base_model_is_reported_with_the_option_for_it(folder, capsys, monkeypatch, words):
    certify("--adapter", "adapter", "-o", "x.pia")
    Path("base").rename("moved")
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert re.search(r"names 'base' as its base model, which is neither .*Name it: --model", capsys.readouterr().err)
    main([*words, "--model", "moved"])


CERTIFY = ["certify", "--train", "train.jsonl", "--adapter"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pack", "adapter", "-o", "adapter"], "--out adapter is a folder"),
        (["pack", "adapter", "-o", "x.pia", "--qr", "adapter"], "--qr adapter is a folder"),
        (["pack", "adapter", "-o", "x.pia", "--qr", "x.jpg"], "path (--qr) = 'x.jpg' must end in .png"),
        ([*CERTIFY, "adapter", "-o", "adapter"], "--out adapter is a folder"),
        ([*CERTIFY, "x.pia", "--levels", "4"], "--levels 4: x.pia is packed already"),
        ([*CERTIFY, "x.pia", "--finetune", "5"], "--finetune 5: x.pia is packed already"),
        (["pack", "lora", "-o", "x.pia"], "lora holds an adapter of type LORA"),
        ([*CERTIFY, "lora"], "lora holds an adapter of type LORA"),
        (["pack", "no/such/folder", "-o", "x.pia"], "no/such/folder is no adapter's folder"),
        ([*CERTIFY, "no/such/folder"], "no/such/folder is no adapter's folder"),
        ([*CERTIFY, "./base"], "./base is no adapter's folder"),
        ([*CERTIFY, "broken"], "broken is no adapter's folder"),
    ],
)
def test_invalid_options_are_reported_before_a_model_is_loaded(folder, capsys, monkeypatch, words, message):
    main(["pack", "adapter", "-o", "x.pia", "--num-labels", "2"])
    base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=2)
    get_peft_model(base, LoraConfig(target_modules=["query"])).save_pretrained("lora")
    Path("broken").mkdir()
    Path("broken/adapter_config.json").write_text("{")
    monkeypatch.setattr("peft_intrinsic.commands.inputs.load_base", None)
    monkeypatch.setattr("peft_intrinsic.commands.inputs.LabeledTexts", None)
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert message in capsys.readouterr().err
    assert not Path("no").exists()


def test_packed_adapter_with_too_many_labels_is_not_unpacked(folder, capsys, monkeypatch):
    main(["pack", "adapter", "-o", "x.pia", "--num-labels", "2"])
    Path("x.pia").write_bytes(replace(read_packed("x.pia"), classes=2**32).to_bytes())
    monkeypatch.setattr("peft_intrinsic.commands.inputs.load_base", None)
    with pytest.raises(SystemExit, match="2"):
        main(["unpack", "x.pia", "-o", "again"])
    assert re.search(r"x\.pia has 4294967296 labels\. At most 100000", capsys.readouterr().err)
