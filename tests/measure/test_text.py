"""The command, on files and a tiny model; and what its trials share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build
from test_documents import tiny
from torch import nn

from peft_intrinsic.cli import main
from peft_intrinsic.measure.text import METRICS, TextFit, files

GOOD, BAD = "a very good film", "a very bad film"


def write(folder: Path, name: str, rows: list[dict]) -> str:
    path = folder / name
    if name.endswith("csv"):
        lines = [",".join(rows[0]), *(",".join(str(v) for v in row.values()) for row in rows)]
        path.write_text("\n".join(lines))
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture
def data(tmp_path) -> dict[str, str]:
    rows = [{"text": GOOD if i % 3 else BAD, "label": "yes" if i % 3 else "no"} for i in range(48)]
    return {"train": write(tmp_path, "train.jsonl", rows), "eval": write(tmp_path, "eval.csv", rows[:24])}


def command(data: dict[str, str], base: str, out: Path, *more: str) -> list[str]:
    fixed = ["--dims", "8,512,6", "--seeds", "2", "--full-rates", "0.01", "--rates", "0.1", "--batch", "8"]
    return [
        "measure",
        "--model",
        base,
        "--train",
        data["train"],
        "--eval",
        data["eval"],
        "--out",
        str(out),
        *fixed,
        *more,
    ]


def test_the_command_measures_and_goes_on(data, tmp_path, capsys):
    base = tiny("bert", tmp_path / "base")
    out = tmp_path / "run"
    (tmp_path / "more.yaml").write_text("max_steps: 120\nuse_cpu: true\ndataloader_pin_memory: false\n")
    options = ["--said", "--config", str(tmp_path / "more.yaml")]
    main(command(data, base, out, *options))
    told = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert told.startswith(f"d90 = {report['d']}, 90 % interval [")
    assert report["majority"] == pytest.approx(2 / 3)
    assert report["learning_rates"] == [0.01, 0.1]
    assert all(score == pytest.approx(1) for score in report["baseline"])
    assert report["d"] in [18, 42, 97, 222, 512]  # 8 numbers, less the scales, do not learn it
    assert (out / "curve.png").exists()
    before = (out / "trials.jsonl").read_text()
    main(command(data, base, out, *options))
    assert (out / "trials.jsonl").read_text() == before
    with pytest.raises(SystemExit) as ended:
        main(command(data, base, out, "--config", str(tmp_path / "more.yaml")))
    assert ended.value.code == 2
    assert "said: True there, False now" in capsys.readouterr().err


def test_trials_share_the_base_and_leave_it_as_it_was(data, tmp_path):
    """In any order, and twice, a trial gives the same score; the base has no trace of it."""
    task = files(data["train"], data["eval"], ["text"], "label", "accuracy")
    quick = {"max_steps": 6, "use_cpu": True, "dataloader_pin_memory": False, "per_device_train_batch_size": 8}
    fit = TextFit(tiny("bert", tmp_path / "base"), task, arguments=quick)
    before = {name: p.clone() for name, p in fit.base.named_parameters()}
    first = [fit(20, 0, 0.1), fit(300, 1, 0.1), fit(None, 0, 1e-3)]
    again = [fit(None, 0, 1e-3), fit(300, 1, 0.1), fit(20, 0, 0.1)]
    assert first == again[::-1]
    assert all(torch.equal(p, before[name]) for name, p in fit.base.named_parameters())
    assert list(before) == [name for name, _ in fit.base.named_parameters()]
    assert not any(module._forward_pre_hooks for module in fit.base.modules())


def test_pairs_and_numbers(tmp_path):
    """A regression on two sentences, by Spearman's correlation."""
    rows = [{"a": GOOD, "b": GOOD if i % 2 else BAD, "score": 5.0 * (i % 2) + 0.01 * i} for i in range(24)]
    path = write(tmp_path, "pairs.jsonl", rows)
    task = files(path, path, ["a", "b"], "score", "spearman")
    assert task.majority() is None
    quick = {"max_steps": 40, "use_cpu": True, "dataloader_pin_memory": False, "per_device_train_batch_size": 8}
    fit = TextFit(tiny("bert", tmp_path / "base"), task, arguments=quick, patience=None)
    assert isinstance(fit.base.classifier, nn.Linear)
    assert fit.base.classifier.out_features == 1
    assert fit(None, 0, 1e-2) > 0.7


def test_early_stopping(data, tmp_path):
    task = files(data["train"], data["eval"], ["text"], "label", "accuracy")
    quick = {"num_train_epochs": 50, "use_cpu": True, "dataloader_pin_memory": False, "per_device_train_batch_size": 8}
    fit = TextFit(tiny("bert", tmp_path / "base"), task, patience=10, arguments=quick)
    epochs = []
    scored = fit.scored
    fit.scored = lambda prediction: epochs.append(1) or scored(prediction)
    assert fit(None, 0, 1e-2) == pytest.approx(1)
    assert 11 < len(epochs) < 50  # the best epoch's weights, ten epochs after it


def test_metrics_by_hand():
    labels, answers = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    assert METRICS["accuracy"](labels, answers) == 0.75
    assert METRICS["f1"](labels, answers) == pytest.approx(0.8)
    assert METRICS["matthews"](labels, answers) == pytest.approx(2 / np.sqrt(12))
    assert METRICS["spearman"](np.array([1, 2, 3]), np.array([10, 20, 15])) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--text": "sentence"}, "has no column 'sentence'. It has text, label"),
        ({"--label": "class"}, "has no column 'class'"),
        ({"--metric": "bleu"}, "metric='bleu' is unknown"),
        ({"--train": "train.txt"}, "train.txt: the ending must be one of"),
        ({"--task": "glue/mrpc"}, "either --task, or both"),
        ({"--config": "absent.yaml"}, "absent.yaml"),
    ],
)
def test_bad_input(change, message, data, tmp_path, capsys):
    arguments = command(data, "no-model", tmp_path / "run")
    for option, value in change.items():
        if option in arguments:
            arguments[arguments.index(option) + 1] = value
        else:
            arguments += [option, value]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_labels_that_do_not_fit(tmp_path):
    train = write(tmp_path, "train.jsonl", [{"text": GOOD, "label": 0}, {"text": BAD, "label": 1}])
    held_out = write(tmp_path, "eval.jsonl", [{"text": GOOD, "label": 2}])
    with pytest.raises(ValueError, match=r"labels that .* lacks: \[2\]"):
        files(train, held_out, ["text"], "label", "accuracy")
    one = write(tmp_path, "one.jsonl", [{"text": GOOD, "label": 0}])
    with pytest.raises(ValueError, match="every row has the same label, 0"):
        files(one, one, ["text"], "label", "accuracy")


def test_a_task_that_is_not_in_glue(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["measure", "--model", "x", "--task", "glue/none", "--out", str(tmp_path)])
    assert "task='glue/none' is unknown. Known are glue/cola" in capsys.readouterr().err


def test_the_fresh_head_is_the_same_for_full_training(data, tmp_path):
    base = tiny("bert", tmp_path / "base")
    task = files(data["train"], data["eval"], ["text"], "label", "accuracy")
    one, two = TextFit(base, task), TextFit(base, task)
    assert torch.equal(one.base.classifier.weight, two.base.classifier.weight)
    assert not torch.equal(one.base.classifier.weight, build("bert").classifier.weight[:2])
