"""The commands certify and verify, on tiny models and files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from helpers.films import D, certify, count_errors, films, read_json, rows
from helpers.texts import write
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.bounds import Certificate
from peft_intrinsic.bounds.certify import count_message_bits
from peft_intrinsic.codec import read_packed
from peft_intrinsic.text.labeled import LabeledTexts
from peft_intrinsic.version import pip_install
from peft_intrinsic_cli import main


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return films(tmp_path)


def test_errors_and_bits_of_the_packed_adapter_are_certified(folder, capsys):
    certify("--adapter", "adapter", "--eval", "test.jsonl", "--levels", "4", "--num-tried", "8", "--delta", "0.1")
    packed = Path("adapter/adapter.pia").read_bytes()
    found = Certificate.from_dict(read_json()["certificate"])
    assert len(read_packed(packed).values) == 4
    assert (found.n, found.num_tried, found.delta, found.test_n) == (120, 8, 0.1, 40)
    assert found.errors == count_errors("adapter/adapter.pia", "train.jsonl")
    assert found.test_errors == count_errors("adapter/adapter.pia", "test.jsonl")
    labels = [row["label"] for row in rows(120)]
    assert found.majority == min(labels.count(0), labels.count(1))
    assert found.bits == count_message_bits(packed) == 8 * (len(packed) - 4 - len(read_packed(packed).encode_head()))
    assert found.report() in capsys.readouterr().out


def test_the_lowest_bound_of_several_levels_is_written_and_all_levels_count_as_tried(folder):
    certify("--adapter", "adapter", "--levels", "2,16", "-o", "x.pia")
    assert read_json("x.certificate.json")["certificate"]["num_tried"] == 2
    bounds = []
    for levels in ("2", "16"):
        certify("--adapter", "adapter", "--levels", levels, "--num-tried", "2", "-o", f"{levels}.pia")
        bounds.append(read_json(f"{levels}.certificate.json")["certificate"]["bound"])
    assert read_json("x.certificate.json")["certificate"]["bound"] == min(bounds)


def test_files_with_different_names_have_their_own_certificates(folder):
    for levels, name in (("2", "m.v1"), ("16", "m.v2")):
        certify("--adapter", "adapter", "--levels", levels, "-o", name)
        main(["verify", name, "--train", "train.jsonl"])
    main(["verify", "m.v1", "--train", "train.jsonl"])
    assert Path("m.v1.certificate.json").exists()


def test_the_model_card_has_one_line_with_the_claim(folder):
    for _ in range(2):
        certify("--adapter", "adapter")
        lines = Path("adapter/README.md").read_text().splitlines()
        (line,) = [line for line in lines if line.startswith("Certified: ")]
        assert Certificate.from_dict(read_json()["certificate"]).claim() in line


def test_a_packed_file_is_certified_unchanged(folder):
    main(["pack", "adapter", "-o", "x.pia", "--levels", "3", "--num-labels", "2"])
    before = Path("x.pia").read_bytes()
    certify("--adapter", "x.pia")
    assert Path("x.pia").read_bytes() == before
    assert read_json("x.certificate.json")["certificate"]["bits"] == count_message_bits(before)


@pytest.mark.parametrize("out", ["x.pia", "y.pia"])
def test_a_packed_file_cannot_be_certified_with_fewer_adapters_than_before(folder, capsys, out):
    certify("--adapter", "adapter", "--levels", "4", "--num-tried", "15", "-o", "x.pia")
    before = read_json("x.certificate.json")
    with pytest.raises(SystemExit, match="2"):
        certify("--adapter", "x.pia", "-o", out)
    error = "--num-tried 1: x.certificate.json counts 15 adapters. Pass --num-tried 15."
    assert error in capsys.readouterr().err
    assert read_json("x.certificate.json") == before
    certify("--adapter", "x.pia", "-o", out, "--num-tried", "15")
    write(folder, "train.jsonl", rows(90))  # other data pay for their own choices
    certify("--adapter", "x.pia", "-o", "x.pia")
    assert read_json("x.certificate.json")["certificate"]["num_tried"] == 1


def test_an_adapter_packed_again_cannot_be_certified_with_fewer_levels_than_before(folder, capsys):
    certify("--adapter", "adapter", "--levels", "4", "--num-tried", "3")
    with pytest.raises(SystemExit, match="2"):
        certify("--adapter", "adapter", "--levels", "4,16")
    error = "--num-tried 1: adapter.certificate.json counts 3 adapters. Pass --num-tried 2."
    assert error in capsys.readouterr().err


def test_a_damaged_certificate_is_replaced(folder):
    certify("--adapter", "adapter", "-o", "x.pia")
    Path("x.certificate.json").write_text("{")
    certify("--adapter", "x.pia")
    main(["verify", "x.pia", "--train", "train.jsonl"])


@pytest.mark.parametrize("name", ["train.jsonl", "copy.jsonl"])
def test_the_training_data_are_no_test_data(folder, capsys, name):
    write(folder, "copy.jsonl", rows(120))
    with pytest.raises(SystemExit, match="2"):
        certify("--adapter", "adapter", "--eval", name)
    assert f"--eval {name} is the training data. Pass other data, or leave it out." in capsys.readouterr().err
    assert not Path("adapter/adapter.pia").exists()


def test_verify_agrees_with_a_sound_certificate(folder, capsys):
    certify("--adapter", "adapter", "-o", "x.pia")
    main(["verify", "x.pia", "--train", "train.jsonl"])
    out = capsys.readouterr().out
    assert "Agrees" in out
    assert "not counted again" not in out
    certify("--adapter", "adapter", "-o", "x.pia", "--eval", "test.jsonl")
    changed("x.certificate.json", forged_test)
    main(["verify", "x.pia", "--train", "train.jsonl"])
    assert "test_errors=0 of test_n=40 were not counted again" in capsys.readouterr().out


def forged_test(found: dict) -> None:
    """Claim no errors on the test data, and the bound from them."""
    sound = Certificate.from_dict({**found["certificate"], "test_errors": 0})
    found["certificate"].update(sound.to_dict())


def without_errors(found: dict) -> None:
    """Claim no errors on the training data, with the sound bound."""
    sound, bound = Certificate.from_dict({**found["certificate"], "errors": 0}), found["certificate"]["bound"]
    found["certificate"].update({**sound.to_dict(), "bound": bound})


def changed(name: str, change) -> None:
    found = read_json(name)
    change(found)
    Path(name).write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("bound", lambda found: found["certificate"].update(bound=found["certificate"]["bound"] - 0.01)),
        ("bound", lambda found: found["certificate"].update(errors=0, bound=0.2)),
        ("training loss: 0 stored", without_errors),
        ("bound: nan stored", lambda found: found["certificate"].update(bound=math.nan)),
        ("bits", lambda found: found["certificate"].update(bits=1)),
        ("risk: 0.0 stored", lambda found: found["certificate"].update(risk=0.0)),
        ("nats: nan stored", lambda found: found["certificate"].update(nats=math.nan)),
        ("bounds", lambda found: found["certificate"]["bounds"].update(seeger=0.01)),
        ("test_bound: 0.1 stored, None", lambda found: found["certificate"].update(test_bound=0.1)),
        ("majority", lambda found: found["certificate"].update(majority=60)),
        ("SHA-256 of adapter:", lambda found: found["adapter"].update(sha256="")),
        ("is no certificate", lambda found: found.pop("adapter")),
    ],
)
def test_verify_names_each_false_claim(folder, capsys, what, change):
    certify("--adapter", "adapter", "-o", "x.pia")
    changed("x.certificate.json", change)
    with pytest.raises(SystemExit, match="2"):
        main(["verify", "x.pia", "--train", "train.jsonl"])
    assert what in capsys.readouterr().err


def test_verify_raises_for_other_data_and_without_a_certificate(folder, capsys):
    certify("--adapter", "adapter", "-o", "x.pia")
    with pytest.raises(SystemExit, match="2"):
        main(["verify", "x.pia", "--train", "test.jsonl"])
    assert "SHA-256 of training_data:" in capsys.readouterr().err
    Path("x.certificate.json").unlink()
    with pytest.raises(SystemExit, match="2"):
        main(["verify", "x.pia", "--train", "train.jsonl"])
    assert "there is no x.certificate.json beside x.pia. Write it with certify." in capsys.readouterr().err


def test_a_head_outside_the_d_parameters_raises(folder, capsys):
    model = AutoModelForSequenceClassification.from_pretrained("base", num_labels=2)
    config = IntrinsicConfig(d=D, task_type="SEQ_CLS", modules_to_save=["classifier"])
    get_peft_model(model, config).save_pretrained("whole")
    with pytest.raises(SystemExit, match="2"):
        certify("--adapter", "whole")
    assert "modules_to_save=['classifier'" in capsys.readouterr().err


def test_finetune_trains_the_rounded_theta(folder, monkeypatch):
    trained = []

    def train(texts, model, *options):
        vector = model.base_model.vector.intrinsic_theta["default"]
        trained.append((len(vector().unique()), *options))
        vector.weight.data.neg_()

    monkeypatch.setattr(LabeledTexts, "train", train)
    for steps in ("0", "30"):
        certify(
            "--adapter",
            "adapter",
            "--levels",
            "3",
            "--finetune",
            steps,
            "--learning-rate",
            "5e-3",
            "-o",
            f"{steps}.pia",
        )
    assert trained == [(3, 30, pytest.approx(5e-4), 0)]
    plain, tuned = (read_packed(f"{steps}.pia").theta for steps in (0, 30))
    assert plain @ tuned < 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "name either --adapter"),
        (("--adapter", "a", "--dims", "2"), "name either --adapter"),
        (("--dims", "2"), "--dims needs --model"),
        (("--dims", "2,9999999", "--model", "base", "-o", "out"), "d=9999999 exceeds the"),
        (
            ("--dims", "2", "--model", "base", "-o", "out", "--levels", "4,300"),
            "levels must be an integer from 1 to 256, got 300",
        ),
        (("--dims", "2,x"), "'2,x' is not whole numbers"),
        (("--adapter", "adapter", "--delta", "2"), "delta must be"),
        (("--adapter", "adapter", "--num-tried", "0"), "num_tried must be"),
    ],
)
def test_bad_options_raise_before_training(folder, capsys, monkeypatch, more, message):
    monkeypatch.setattr(LabeledTexts, "train", None)
    with pytest.raises(SystemExit, match="2"):
        certify(*more)
    assert message in capsys.readouterr().err


def test_a_missing_package_raises_with_the_extra_to_install(folder, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft_intrinsic.commands.certify", None)
    with pytest.raises(SystemExit, match="2"):
        certify("--adapter", "adapter")
    assert pip_install("[codec,measure]") in capsys.readouterr().err
