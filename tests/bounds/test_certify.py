"""Certificates as users make and check them: by the command, on tiny models and files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_documents import tiny
from texts import write
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import peft_intrinsic.bounds.sweep as sweeping
from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.bounds import Certificate
from peft_intrinsic.bounds.certify import message_bits
from peft_intrinsic.bounds.texts import PackedTexts
from peft_intrinsic.codec import load_packed, read_packed
from peft_intrinsic_command import main

D = 30


def rows(count: int, shift: int = 0) -> list[dict]:
    """Films, every third of them bad; a few of them wrongly labelled."""
    words = ["good", "bad", "good"]
    found = [(i, words[i % 3]) for i in range(count)]
    return [
        {"text": f"a {'very ' * (i % 4)}{word} film", "label": int((word == "good") != (i % 11 == shift))}
        for i, word in found
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A base model, an adapter of it in a folder of its own, and labelled texts; the present directory."""
    monkeypatch.chdir(tmp_path)
    base = tiny("bert", tmp_path / "base")
    write(tmp_path, "train.jsonl", rows(120))
    write(tmp_path, "test.jsonl", rows(40, 3))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model = get_peft_model(model, IntrinsicConfig(d=D, task_type="SEQ_CLS", init_weights=False))
    model.save_pretrained("adapter")
    return tmp_path


def certify(*more: str) -> None:
    main(["certify", "--train", "train.jsonl", *more])


def told(name: str = "adapter/adapter.certificate.json") -> dict:
    return json.loads(Path(name).read_text())


def errors(path: str, name: str) -> int:
    """Wrong answers of a packed adapter, one example at a time."""
    base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=2)
    model, tokenizer = load_packed(base, path), AutoTokenizer.from_pretrained("base")
    with torch.no_grad():
        return sum(
            int(model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax() != row["label"])
            for row in map(json.loads, Path(name).read_text().splitlines())
        )


def test_the_packed_adapter_itself_is_certified(folder, capsys):
    certify("--adapter", "adapter", "--test", "test.jsonl", "--levels", "4", "--tried", "8", "--delta", "0.1")
    packed = Path("adapter/adapter.pia").read_bytes()
    found = Certificate.from_dict(told()["certificate"])
    assert len(read_packed(packed).values) == 4
    assert (found.n, found.tried, found.delta, found.test_n) == (120, 8, 0.1, 40)
    assert found.errors == errors("adapter/adapter.pia", "train.jsonl")
    assert found.test_errors == errors("adapter/adapter.pia", "test.jsonl")
    labels = [row["label"] for row in rows(120)]
    assert found.majority == min(labels.count(0), labels.count(1))
    assert found.bits == message_bits(packed) == 8 * (len(packed) - 4 - len(read_packed(packed).head()))
    assert found.report() in capsys.readouterr().out


def test_the_cheapest_of_several_numbers_of_levels_is_kept_and_all_are_counted(folder):
    certify("--adapter", "adapter", "--levels", "2,16", "-o", "x.pia")
    assert told("x.certificate.json")["certificate"]["tried"] == 2
    bounds = []
    for levels in ("2", "16"):
        certify("--adapter", "adapter", "--levels", levels, "--tried", "2", "-o", f"{levels}.pia")
        bounds.append(told(f"{levels}.certificate.json")["certificate"]["bound"])
    assert told("x.certificate.json")["certificate"]["bound"] == min(bounds)


def test_a_line_in_the_model_card(folder):
    for _ in range(2):
        certify("--adapter", "adapter")
        lines = Path("adapter/README.md").read_text().splitlines()
        (line,) = [line for line in lines if line.startswith("Certified: ")]
        assert Certificate.from_dict(told()["certificate"]).claim() in line


def test_a_file_is_certified_as_it_is(folder):
    main(["pack", "adapter", "-o", "x.pia", "--levels", "3", "--labels", "2"])
    before = Path("x.pia").read_bytes()
    certify("--adapter", "x.pia")
    assert Path("x.pia").read_bytes() == before
    assert told("x.certificate.json")["certificate"]["bits"] == message_bits(before)


def test_verify_agrees(folder, capsys):
    certify("--adapter", "adapter", "-o", "x.pia")
    main(["verify", "x.pia", "--train", "train.jsonl"])
    assert "Agrees" in capsys.readouterr().out


def changed(name: str, change) -> None:
    found = told(name)
    change(found)
    Path(name).write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("bound", lambda found: found["certificate"].update(bound=found["certificate"]["bound"] - 0.01)),
        ("bound", lambda found: found["certificate"].update(errors=0, bound=0.2)),
        ("bits", lambda found: found["certificate"].update(bits=1)),
        ("majority", lambda found: found["certificate"].update(majority=60)),
        ("adapter: SHA-256", lambda found: found["adapter"].update(sha256="")),
        ("is no certificate", lambda found: found.pop("adapter")),
    ],
)
def test_verify_says_where_it_does_not_agree(folder, capsys, what, change):
    certify("--adapter", "adapter", "-o", "x.pia")
    changed("x.certificate.json", change)
    with pytest.raises(SystemExit, match="2"):
        main(["verify", "x.pia", "--train", "train.jsonl"])
    assert what in capsys.readouterr().err


def test_verify_needs_the_same_data_and_a_certificate(folder, capsys):
    certify("--adapter", "adapter", "-o", "x.pia")
    with pytest.raises(SystemExit, match="2"):
        main(["verify", "x.pia", "--train", "test.jsonl"])
    assert "training data: SHA-256" in capsys.readouterr().err
    Path("x.certificate.json").unlink()
    with pytest.raises(SystemExit, match="2"):
        main(["verify", "x.pia", "--train", "train.jsonl"])
    assert "is no certificate" in capsys.readouterr().err


def test_a_head_outside_the_numbers_is_refused(folder, capsys):
    model = AutoModelForSequenceClassification.from_pretrained("base", num_labels=2)
    config = IntrinsicConfig(d=D, task_type="SEQ_CLS", modules_to_save=["classifier"])
    get_peft_model(model, config).save_pretrained("whole")
    with pytest.raises(SystemExit, match="2"):
        certify("--adapter", "whole")
    assert "modules_to_save=['classifier'" in capsys.readouterr().err


def test_a_sweep_goes_on_and_certifies_the_best(folder, capsys, monkeypatch):
    sweep = ("--dims", "10,40", "--levels", "2,4", "--model", "base", "--test", "test.jsonl", "--steps", "3")
    train, asked = sweeping.trained, []

    def dies(texts, d, *rest):
        asked.append(d)
        if asked == [10, 40]:
            raise OSError("killed")
        return train(texts, d, *rest)

    monkeypatch.setattr(sweeping, "trained", dies)
    with pytest.raises(SystemExit, match="2"):
        certify(*sweep, "-o", "out")
    certify(*sweep, "-o", "out")
    assert asked == [10, 40, 40]
    found = told("out/sweep.json")["rows"]
    assert [(row["d"], row["levels"]) for row in found] == [(10, 2), (10, 4), (40, 2), (40, 4)]
    best = min((row["certificate"] for row in found), key=lambda row: row["bound"])
    assert told("out/best.certificate.json")["certificate"] == best
    assert best["tried"] == 4
    assert best["errors"] == errors("out/best.pia", "train.jsonl")
    assert all(row["certificate"]["bits"] == min(row["table_bits"], row["prior_bits"]) for row in found)
    assert Path("out/certificates.png").stat().st_size > 10_000
    main(["verify", "out/best.pia", "--train", "train.jsonl", "--model", "base"])
    assert capsys.readouterr().out.count("| 40 |") == 2

    shutil.copytree("base", "other")
    weights = load_file("base/model.safetensors")
    next(value for value in weights.values() if value.dim() == 2).add_(1)
    save_file(weights, "other/model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match="2"):
        certify(*sweep, "--model", "other", "-o", "out")
    assert "base_model" in capsys.readouterr().err


def test_fine_tuning_is_of_the_rounded_numbers(folder, monkeypatch):
    trained = []

    def train(texts, model, *options):
        vector = model.base_model.vector.intrinsic_theta["default"]
        trained.append((len(vector().unique()), *options))
        vector.weight.data.neg_()

    monkeypatch.setattr(PackedTexts, "train", train)
    for steps in ("0", "30"):
        certify("--adapter", "adapter", "--levels", "3", "--finetune", steps, "--lr", "5e-3", "-o", f"{steps}.pia")
    assert trained == [(3, 30, pytest.approx(5e-4), 0)]
    plain, tuned = (read_packed(f"{steps}.pia").theta for steps in (0, 30))
    assert plain @ tuned < 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "name either --adapter"),
        (("--adapter", "a", "--dims", "2"), "name either --adapter"),
        (("--dims", "2"), "--dims needs --model"),
        (("--dims", "2", "--model", "base", "-o", "out", "--tried", "3"), "--tried 3"),
        (("--dims", "2,9999999", "--model", "base", "-o", "out"), "d=9999999 is more than"),
        (
            ("--dims", "2", "--model", "base", "-o", "out", "--levels", "4,300"),
            "levels must be a whole number from 1 to 256, got 300",
        ),
        (("--dims", "2,x"), "'2,x' is not whole numbers"),
        (("--adapter", "adapter", "--delta", "2"), "delta must be"),
        (("--adapter", "adapter", "--tried", "0"), "tried must be"),
    ],
)
def test_refused_before_anything_is_trained(folder, capsys, monkeypatch, more, message):
    monkeypatch.setattr(PackedTexts, "train", None)
    with pytest.raises(SystemExit, match="2"):
        certify(*more)
    assert message in capsys.readouterr().err


def test_packing_reports_accuracy_and_unpacking_gives_a_folder_back(folder, capsys):
    more = ["--eval", "test.jsonl", "--text-form", "--qr", "x.png"]
    main(["pack", "adapter", "-o", "x.pia", "--max-bytes", "90", *more])
    out = capsys.readouterr().out
    after = 1 - errors("x.pia", "test.jsonl") / 40
    assert f"{after:.4f} packed" in out
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


def test_a_missing_package_is_named_with_its_extra(folder, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft_intrinsic.bounds.command", None)
    with pytest.raises(SystemExit, match="2"):
        certify("--adapter", "adapter")
    assert "pip install 'peft_intrinsic[codec,measure]'" in capsys.readouterr().err
