"""The command train, on CSV files and tiny models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.texts import BAD, GOOD, write
from test_documents import tiny
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from peft_intrinsic.card import HEADING
from peft_intrinsic_cli import main

ROWS = [{"text": GOOD if i % 3 else BAD, "label": "yes" if i % 3 else "no"} for i in range(48)]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "train.csv", ROWS)
    write(tmp_path, "eval.csv", ROWS[:24])
    tiny("bert", tmp_path / "base")
    return tmp_path


def train(*more: str) -> None:
    options = [] if "--eval" in more else ["--train", "train.csv", "--eval", "eval.csv"]
    main(["train", "--model", "base", "--out", "adapter", "--batch-size", "8", "--epochs", "1", *options, *more])


def scores() -> dict:
    return json.loads(Path("adapter/scores.json").read_text())


@pytest.mark.slow
def test_training_reports_scores_beside_baselines_and_saves_an_adapter_that_has_them(folder, capsys):
    train("--epochs", "20", "--learning-rate", "3e-4", "--target-modules", "all")
    out = capsys.readouterr().out
    found = scores()
    assert found["majority"] == pytest.approx(2 / 3)
    assert found["logistic_regression"] == found["after"] == 1 > found["before"]
    assert (found["labels"], found["examples"]) == (["no", "yes"], {"train": 48, "eval": 24})
    rows = [f"majority +{2 / 3:.4f}", r"logistic regression \(25 weights\) +1\.0000"]
    rows += [f"before +{found['before']:.4f}", r"after \(d = 200\) +1\.0000"]
    assert re.search(r"accuracy on 24 held-out examples\n  " + "\n  ".join(rows), out), out
    size = sum(Path("adapter", name).stat().st_size for name in ("adapter_model.safetensors", "adapter_config.json"))
    assert f"adapter: d = 200, weights and configuration {size} bytes" in out
    card = Path("adapter/README.md").read_text()
    assert HEADING in card
    (code,) = re.findall(r"```python\n(.*?)```", card[card.index(HEADING) :].partition("`KeyError")[0], re.DOTALL)
    loaded: dict[str, Any] = {}
    exec(code.replace("path or name of this adapter", "adapter"), loaded)
    model, tokenizer = loaded["model"].eval(), AutoTokenizer.from_pretrained("base")
    predicted = model(**tokenizer([GOOD, BAD], return_tensors="pt")).logits.argmax(-1)
    names = model.merge_and_unload().config.id2label
    assert [names[i] for i in predicted.tolist()] == ["yes", "no"]


def test_a_folder_in_use_is_overwritten_on_request_only(folder, capsys):
    Path("adapter").mkdir()
    Path("adapter/README.md").write_text("mine")
    for options in ([], ["--overwrite"]):  # no adapter is there
        with pytest.raises(SystemExit, match="2"):
            train(*options)
        assert "--out adapter is in use" in capsys.readouterr().err
    assert [path.read_text() for path in Path("adapter").iterdir()] == ["mine"]
    Path("adapter/adapter_config.json").write_text("{}")
    Path("adapter/adapter.certificate.json").write_text("of a former adapter")
    Path("adapter/notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        train()
    train("--overwrite", "--d", "20")
    assert json.loads(Path("adapter/adapter_config.json").read_text())["d"] == 20
    assert not Path("adapter/adapter.certificate.json").exists()
    assert Path("adapter/notes.txt").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--d", "100000000"], "d=100000000"),
        (["--learning-rate", "1e38"], "NaN or infinite"),
        (["--learning-rate", "-1"], "--learning-rate -1 is no learning rate"),
        (["--seed", "5000000000"], "--seed 5000000000"),
        (["--batch-size", "0"], "--batch-size"),
        (["--out", "adapter/README.md"], "is a file"),
    ],
)
def test_a_failed_run_leaves_the_adapter_that_was_there(options, message, folder, capsys):
    train("--epochs", "0.1")
    before = {path: path.read_bytes() for path in Path("adapter").iterdir()}
    with pytest.raises(SystemExit, match="2"):
        train("--overwrite", *options)
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("adapter").iterdir()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-length", "4000"], "max_length (--max-length) = 4000: base has 512 positions. Use fewer."),
        (["--text", "text,text"], "text=['text', 'text'] (--text) names one column twice. Name one column, or two"),
        (
            ["--target-modules", "quary"],
            "--target-modules quary matches no module with parameters of its own. Name some of",
        ),
        (["--target-modules", "query,quary,all"], "--target-modules all,quary matches no module with parameters"),
        (["--target-modules", "dropout"], "--target-modules dropout matches no module with parameters of its own."),
    ],
)
def test_options_that_do_not_fit_model_or_data_are_reported_before_training(options, message, folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        train(*options)
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"peft-intrinsic: {message}")
    assert not Path("adapter/adapter_config.json").exists()


@pytest.mark.parametrize("command", [["train"], ["measure", "--dims", "8,512,3"]])
def test_a_base_model_whose_head_has_other_labels_is_reported(command, folder, capsys):
    AutoModelForSequenceClassification.from_pretrained("base", num_labels=3).save_pretrained("three")
    AutoTokenizer.from_pretrained("base").save_pretrained("three")
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--model", "three", "--train", "train.csv", "--eval", "eval.csv", "--out", "out"])
    message = "peft-intrinsic: --model three: its head has 3 labels, the data or the adapter 2. Pass a base model with"
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)


@pytest.mark.slow
def test_a_collapse_is_reported_with_what_to_try(folder, capsys):
    train("--epochs", "10", "--learning-rate", "1000")
    out = capsys.readouterr().out
    assert re.search(r"Training collapsed: .* Its accuracy is [\d.]+, that of the majority class 0\.6667\.", out), out
    assert "Try a lower learning rate (250 instead of 1000)" in out


@pytest.mark.slow
def test_a_language_model_is_compared_with_itself_before_training(folder, capsys):
    tiny("llama", folder / "base")
    write(folder, "corpus.jsonl", [{"text": GOOD}, {"text": BAD}] * 60)
    files = ["--train", "corpus.jsonl", "--eval", "corpus.jsonl", "--task-type", "CAUSAL_LM", "--max-length", "8"]
    train(*files, "--epochs", "8", "--learning-rate", "1e-3")
    found = scores()
    assert found["after"] < 0.9 * found["before"]
    assert not {"majority", "logistic_regression"} & set(found)
    assert "Training collapsed" not in capsys.readouterr().out
    train(*files, "--overwrite", "--learning-rate", "1e-12")
    assert re.search(r"Training collapsed: .* Its loss is [\d.]+, that of the untrained model", capsys.readouterr().out)


def test_a_regression_has_no_logistic_regression(folder, capsys):
    rows = [{"text": GOOD if i % 2 else BAD, "label": i % 2 + 0.01 * i} for i in range(24)]
    write(folder, "numbers.csv", rows)
    train("--train", "numbers.csv", "--eval", "numbers.csv", "--metric", "spearman")
    assert set(scores()) >= {"majority", "before", "after"}
    assert "logistic_regression" not in scores()


def test_a_decoder_has_no_logistic_regression(folder, capsys):
    tiny("llama", folder / "base")
    train("--epochs", "0.1")
    assert "logistic_regression" not in scores()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "stored"), [("query", ["query"]), ("query,value", ["query", "value"]), ("all", "all")]
)
def test_target_modules_are_names_or_a_keyword(given, stored, folder):
    train("--target-modules", given, "--epochs", "0.1", "--said", "--seed", "3", "--d", "100")
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    modules = config["target_modules"]
    assert (modules if isinstance(modules, str) else sorted(modules)) == stored
    assert (config["said"], config["seed"], config["d"]) == (True, 3, 100)
