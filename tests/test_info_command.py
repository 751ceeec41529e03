"""The command info, on adapters of every kind that it describes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.films import D, certify, films
from peft import LoraConfig, PeftModel, get_peft_model
from test_documents import tiny
from transformers import AutoModelForSequenceClassification

from peft_intrinsic import IntrinsicConfig, SupermaskConfig
from peft_intrinsic.codec import read_packed
from peft_intrinsic_cli import main


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return films(tmp_path)


@pytest.fixture
def other(folder) -> str:
    """The base model with other weights."""
    model = AutoModelForSequenceClassification.from_pretrained("base", num_labels=2)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.mul_(2)
    model.bert.save_pretrained("other")
    return "other"


@pytest.fixture
def wide(folder) -> str:
    """A base model of another architecture."""
    return tiny("distilbert", folder / "wide")


def save_adapter(config, name: str) -> None:
    base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=2)
    get_peft_model(base, config).save_pretrained(name)


def info(capsys, *words: str, status: int = 0) -> dict[str, str]:
    """What the command prints, by row."""
    capsys.readouterr()
    if status:
        with pytest.raises(SystemExit) as ended:
            main(["info", *words])
        assert ended.value.code == status
    else:
        main(["info", *words])
    lines = capsys.readouterr().out.splitlines()
    return {line[:14].strip(): line[14:] for line in lines}


def test_info_describes_an_adapter_and_finds_its_base_model(folder, capsys):
    rows = info(capsys, "adapter")
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    size = sum(Path("adapter", name).stat().st_size for name in ("adapter_model.safetensors", "adapter_config.json"))
    assert rows["adapter"] == f"adapter, {size} bytes"
    assert (rows["method"], rows["d"], rows["seed"], rows["task"]) == ("DID", str(D), "0", "SEQ_CLS")
    assert rows["projection"] == "fastfood, block_size=64, scale=fan_in, algorithm_version=1"
    assert rows["targets"] == "target_modules='norms-and-biases', head='subspace'"
    assert (rows["labels"], rows["certificate"], rows["base digest"]) == ("2", "none", "not stored")
    assert rows["base model"] == str(folder / "base")
    assert rows["manifest"] == config["manifest"].split(":")[0]
    assert rows["fits"] == f"yes: names and shapes agree with {folder / 'base'}"


def test_info_describes_a_packed_adapter_and_its_certificate(folder, capsys):
    certify("--adapter", "adapter", "-o", "x.pia")
    packed = read_packed("x.pia")
    rows = info(capsys, "x.pia")
    assert rows["adapter"] == f"x.pia, {Path('x.pia').stat().st_size} bytes, packed"
    assert (rows["d"], rows["labels"], rows["base model"]) == (str(D), "2", "base")
    assert (rows["base digest"], rows["manifest"]) == (packed.base_digest.hex(), packed.manifest_digest.hex())
    assert rows["targets"] == info(capsys, "adapter")["targets"]
    assert re.fullmatch(
        r"error on new examples at most [\d.]+ %, with confidence 95 % \(x\.certificate\.json\)", rows["certificate"]
    )
    assert rows["fits"] == "yes: names, shapes and weights agree with base"
    main(["pack", "adapter", "-o", "x.pia", "--levels", "2"])
    assert ", but of another adapter (" in info(capsys, "x.pia")["certificate"]
    shutil.copy("x.certificate.json", "adapter/adapter.certificate.json")
    assert "confidence 95 % (adapter.certificate.json)" in info(capsys, "adapter")["certificate"]
    card = Path("adapter/README.md")
    certify("--adapter", "adapter")
    assert "Certified: " in card.read_text()
    base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=2)
    model = PeftModel.from_pretrained(base, "adapter")
    with torch.no_grad():
        model.base_model.vector.intrinsic_theta["default"].weight.add_(1e-3)
    model.save_pretrained("adapter")
    assert ", but of another adapter (" in info(capsys, "adapter")["certificate"]
    assert "Certified: " not in card.read_text()


def test_info_says_that_other_weights_do_not_fit_a_packed_adapter(folder, other, capsys):
    main(["pack", "adapter", "-o", "x.pia"])
    rows = info(capsys, "x.pia", "--model", other, status=1)
    assert re.match(r"no: .* base \(digest \w{16}\)", rows["fits"]), rows["fits"]
    assert info(capsys, "adapter", "--model", other)["fits"] == "yes: names and shapes agree with other"


def test_info_says_why_another_architecture_does_not_fit(folder, wide, capsys):
    main(["pack", "adapter", "-o", "x.pia"])
    assert info(capsys, "adapter", "--model", "wide", status=1)["fits"].startswith("no: ")
    assert info(capsys, "x.pia", "--model", "wide", status=1)["fits"].startswith("no: ")


def test_info_says_that_another_number_of_labels_does_not_fit(folder, capsys):
    AutoModelForSequenceClassification.from_pretrained("base", num_labels=3).save_pretrained("three")
    rows = info(capsys, "adapter", "--model", "three", status=1)
    assert rows["fits"].startswith("no: three cannot be loaded as AutoModelForSequenceClassification with 2 labels. ")
    assert "its head has 3 labels" in rows["fits"]


COMMANDS = {
    "info": ["adapter"],
    "distance": ["base", "adapter"],
    "pack": ["adapter", "-o", "x.pia"],
    "certify": ["--adapter", "adapter", "--train", "train.jsonl"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("end", [None, 5, -1])
def test_missing_and_damaged_weights_are_reported(command, end, folder, capsys):
    weights = Path("adapter/adapter_model.safetensors")
    before = weights.read_bytes()
    weights.unlink()
    if end is not None:
        weights.write_bytes(before[:end])
    with pytest.raises(SystemExit, match="2"):
        main([command, *COMMANDS[command]])
    message = f"peft-intrinsic: {weights} cannot be read: "
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)


def test_reports_of_transformers_on_new_heads_and_deprecated_names_are_silent(folder):
    """In a process of its own: the verbosity of transformers is read when it is imported."""
    call = [sys.executable, "-c", "from peft_intrinsic_cli import main; main()", "info", "adapter"]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert "fits          yes" in done.stdout
    assert not re.findall(r"LOAD REPORT|\[transformers\]|is_gradient_checkpointing", done.stderr)


def test_info_does_not_compare_where_the_base_model_is_not_on_this_machine(folder, capsys):
    main(["pack", "adapter", "-o", "x.pia"])
    Path("base").rename("moved")
    assert info(capsys, "x.pia")["fits"] == "not compared: base is not on this machine. Pass --model."
    assert info(capsys, "x.pia", "--model", "moved")["fits"].startswith("yes: ")
    with pytest.raises(SystemExit, match="2"):
        main(["info", "x.pia", "--model", "moved--base"])
    assert "peft-intrinsic: " in capsys.readouterr().err


def test_info_does_not_compare_an_adapter_that_names_no_base_model(folder, capsys):
    path = Path("adapter/adapter_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    assert info(capsys, "adapter")["fits"] == "not compared: the adapter does not name its base model. Pass --model."
    assert info(capsys, "adapter", "--model", "base")["fits"].startswith("yes: ")


def test_info_describes_a_supermask_and_compares_its_weights(folder, other, capsys):
    save_adapter(SupermaskConfig(target_modules=["query"], initial_sparsity=0.25, task_type="SEQ_CLS"), "mask")
    misfit = info(capsys, "mask", status=1)["fits"]  # its base model has 3 labels by default
    assert misfit.endswith(" If its head has another number of labels, pass --num-labels.")
    misfit = info(capsys, "mask", "--num-labels", "4", status=1)["fits"]
    assert misfit.endswith(" If its head has another number of labels, correct --num-labels 4.")
    rows = info(capsys, "mask", "--num-labels", "2")
    assert rows["method"] == "supermask, mask='threshold'"
    assert rows["density"] == "75.00% of the masked weights"
    assert rows["targets"] == "target_modules=['query'], modules_to_save=['classifier', 'score']"
    assert "d" not in rows
    assert rows["fits"] == "yes: names, shapes and weights agree with base"
    with torch.no_grad():
        model = AutoModelForSequenceClassification.from_pretrained("base", num_labels=2)
        model.bert.encoder.layer[0].attention.self.query.weight.mul_(2)
        model.bert.save_pretrained("other")
    assert "trained on other weights" in info(capsys, "mask", "--num-labels", "2", "--model", other, status=1)["fits"]


def test_info_describes_said_and_every_target_option(folder, capsys):
    config = IntrinsicConfig(
        d=40, said=True, seed=7, target_modules=["query", "value"], layers_to_transform=[0], task_type="SEQ_CLS"
    )
    save_adapter(config, "said")
    rows = info(capsys, "said")
    assert (rows["method"], rows["seed"]) == ("SAID, one λ per layer", "7")
    assert rows["targets"] == "target_modules=['query', 'value'], layers_to_transform=[0], head='subspace'"


def test_info_takes_a_name_on_the_hub(folder, capsys, monkeypatch):
    names = {"user/classifier": "adapter"}
    monkeypatch.setattr("peft_intrinsic.commands.inputs.snapshot_download", lambda name, **_: names[name])
    assert info(capsys, "user/classifier")["d"] == str(D)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora", "lora holds an adapter of type LORA. Name an adapter of IntrinsicConfig or SupermaskConfig."),
        ("base", "base is no adapter's folder, or cannot be read: "),
        ("train.jsonl", "This is no packed adapter"),
        ("no/such/adapter", "'no/such/adapter' is neither a file or folder nor a name that the Hub gives: "),
    ],
)
def test_info_rejects_what_is_not_an_adapter_of_this_package(name, message, folder, capsys):
    save_adapter(LoraConfig(target_modules=["query"]), "lora")
    with pytest.raises(SystemExit, match="2"):
        main(["info", name])
    assert message in capsys.readouterr().err
