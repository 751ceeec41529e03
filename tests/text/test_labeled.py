"""Data of an adapter that is packed, certified or trained by the command line: its classes, and the length of texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.texts import BAD, GOOD, write
from test_documents import tiny
from transformers import AutoModelForSequenceClassification

from peft_intrinsic.text.labeled import LabeledTexts
from peft_intrinsic.text.options import TextOptions
from peft_intrinsic.text.tasks import load_task
from peft_intrinsic.text.training import TokenTraining
from peft_intrinsic_cli import main

LATE = "a very " * 6
"""Twelve words before the one that decides."""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny("bert", tmp_path / "base")
    return tmp_path


def rows(labels: list) -> list[dict]:
    return [{"text": GOOD if i % 2 else BAD, "label": labels[i % len(labels)]} for i in range(12)]


def texts(folder: Path, given: list, **more) -> LabeledTexts:
    return LabeledTexts("base", write(folder, "a.jsonl", rows(given)), None, ["text"], "label", **more)


@pytest.mark.parametrize(
    ("labels", "more", "classes"),
    [
        ([0, 2], {"labels": 3}, ["0", "1", "2"]),
        ([0, 1], {"labels": 3}, ["0", "1", "2"]),
        ([1, 2], {"labels": 3, "names": ["1", "2", "3"]}, ["1", "2", "3"]),
        (["pos", "neg"], {"labels": 3, "names": ["pos", "neu", "neg"]}, ["pos", "neu", "neg"]),
        (["pos", "neg"], {"labels": 2, "names": ["pos", "neg"]}, ["pos", "neg"]),
    ],
)
def test_data_that_lack_classes_keep_their_indexes(labels, more, classes, folder):
    loaded = texts(folder, labels, **more)
    assert [str(each) for each in loaded.task.classes] == classes
    assert list(loaded.base.config.id2label.values()) == classes
    expected = [classes.index(str(row["label"])) for row in rows(labels)]
    assert list(loaded.data["train"]["labels"]) == expected == loaded.task.encode_labels("train").tolist()


@pytest.mark.parametrize("labels", [[1, 2], ["neg", "pos"]])
def test_data_whose_classes_are_not_known_to_be_those_of_the_model_raise(labels, folder):
    with pytest.raises(ValueError, match=r"The model has 3 labels, .* 2: "):
        texts(folder, labels, labels=3)
    with pytest.raises(ValueError, match=r"trained with the labels a, b, but .* has "):
        texts(folder, labels, labels=2, names=["a", "b"])


def test_a_trained_head_keeps_the_order_of_its_labels(folder):
    names = {0: "pos", 1: "neg"}
    AutoModelForSequenceClassification.from_pretrained("base", id2label=names).save_pretrained("headed")
    files = {
        "train": write(folder, "a.jsonl", rows(["neg", "pos"])),
        "eval": write(folder, "b.jsonl", rows(["neg", "pos"])),
    }
    assert load_task(TextOptions("base", **files)).classes == ["neg", "pos"]
    task = load_task(TextOptions("headed", **files))
    assert (task.classes, task.head_options()["id2label"]) == (["pos", "neg"], names)


def test_classes_without_a_label_in_the_data_are_those_of_parquet(folder):
    """A label means the class of that index among its names, also where a file has only some of them."""
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "neu", "pos"])})
    Dataset.from_list(rows([0, 2]), features=features).to_parquet("a.parquet")
    loaded = LabeledTexts("base", "a.parquet", None, ["text"], "label", labels=3)
    assert [loaded.task.name_class(each) for each in loaded.task.classes] == ["neg", "neu", "pos"]
    assert set(loaded.data["train"]["labels"]) == {0, 2}


@pytest.mark.slow
def test_texts_are_read_as_far_as_in_training(folder, capsys):
    """The word that decides comes late: with fewer tokens all texts are the same."""
    some = [{"text": LATE + ("good " if i % 2 else "bad ") * 8, "label": i % 2} for i in range(48)]
    write(folder, "train.jsonl", some)
    shared = ["--train", "train.jsonl", "--batch-size", "8"]
    more = ["--model", "base", "--eval", "train.jsonl", "--out", "adapter", "--d", "300", "--target-modules", "all"]
    main(["train", *shared, *more, "--lr", "1e-3", "--epochs", "20", "--max-length", "24"])
    after = json.loads(Path("adapter/scores.json").read_text())["after"]
    assert after > 0.9
    main(["pack", "adapter", "-o", "x.pia", "--levels", "64", "--eval", "train.jsonl"])
    assert f"accuracy {after:.4f} before" in capsys.readouterr().out
    main(["certify", "--adapter", "adapter", "--levels", "64", *shared, "-o", "x.pia"])
    assert "first 24 tokens" in capsys.readouterr().out
    found = json.loads(Path("x.certificate.json").read_text())
    assert (found["max_length"], found["certificate"]["errors"]) == (24, round((1 - after) * 48))
    main(["verify", "x.pia", *shared])
    assert "Agrees with the certificate" in capsys.readouterr().out
    main(["certify", "--adapter", "adapter", "--levels", "64", *shared, "-o", "y.pia", "--max-length", "8"])
    assert json.loads(Path("y.certificate.json").read_text())["certificate"]["errors"] == 24


def test_words_that_would_not_be_scored_are_an_error(folder):
    words = [{"words": ["a"] * count, "tags": ["x", "y"] * (count // 2)} for count in (4, 10)]
    path = write(folder, "a.jsonl", words)
    options = TextOptions(
        "base", train=path, eval=path, columns=("words",), label="tags", task_type="TOKEN_CLS", max_length=8
    )
    with pytest.raises(ValueError, match="= 8 cuts off 2 of 14 words of the train data"):
        TokenTraining(options, load_task(options))
