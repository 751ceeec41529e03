"""The studies, on tiny models: tables, plots, going on, and models that cannot be measured."""

from __future__ import annotations

import json

import pytest
from helpers.texts import command
from test_documents import tiny
from transformers import AutoModel

from peft_intrinsic.measure.analysis import Point
from peft_intrinsic.measure.evidence import TUNING
from peft_intrinsic.measure.study import _compute_gap, _get_step
from peft_intrinsic_cli import main


@pytest.fixture
def options(data, tmp_path):
    config = tmp_path / "more.yaml"
    config.write_text("max_steps: 120\nuse_cpu: true\ndataloader_pin_memory: false\n")
    return command(data, "unused", tmp_path / "study", "--config", str(config), "--dims", "16,512,3")[3:]


def study(kind, models, options, folder):
    main(["study", kind, *models, *options])
    found = json.loads((folder / "study.json").read_text())
    assert found["kind"] == kind
    for name in ("png", "svg", "pdf"):
        assert (folder / f"study.{name}").stat().st_size > 5_000
    return found["rows"]


def test_methods(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny("bert", tmp_path / "base")
    rows = study("methods", ["base"], options, tmp_path / "study")
    assert [row["name"] for row in rows] == ["base did", "base said"]
    full = {}
    for row in rows:
        report = json.loads((tmp_path / "study" / row["name"].replace(" ", "_") / "report.json").read_text())
        for of, answer in report["answers"].items():
            assert (answer["d"], answer["interval"]) == (row["answers"][of]["d"], row["answers"][of]["interval"])
        assert report["settings"]["method"] == row["method"]
        full[row["method"]] = [trial for trial in report["trials"] if trial["d"] is None]
    assert full["did"] == full["said"]  # trained once: the same seconds
    assert rows[0]["baseline"] == rows[1]["baseline"]
    before = {path: path.read_text() for path in tmp_path.glob("study/*/trials.jsonl")}
    assert study("methods", ["base"], options, tmp_path / "study") == rows
    assert {path: path.read_text() for path in before} == before


def test_methods_of_peft_on_the_same_axis(options, tmp_path, monkeypatch, capsys):
    """Of one grid each has the d that it can have."""
    monkeypatch.chdir(tmp_path)
    tiny("bert", tmp_path / "base")
    (tmp_path / "few.yaml").write_text("max_steps: 4\nuse_cpu: true\ndataloader_pin_memory: false\n")
    few = ["--config", "few.yaml", "--dims", "16,4096,5", "--trials", "9", "--relative-to", "gain", "--patience", "1"]
    main(["study", "methods", "base", *options, *few, "--method", "lora,unilora", "--dry-run"])
    planned = capsys.readouterr().out
    assert "base by lora" in planned
    assert "grid: 5 dimensions from 16 to 4096" in planned.partition("base by unilora")[2]
    assert "from 16 to 4096" not in planned.partition("base by unilora")[0]
    assert not (tmp_path / "study").exists()
    rows = study(
        "methods", ["base"], [*options, "--dims", "18,514,3", "--method", "unilora,tinylora"], tmp_path / "study"
    )
    for row, dims in zip(rows, ({18, 96, 514}, {16, 96, 512}), strict=True):
        report = json.loads((tmp_path / "study" / row["name"].replace(" ", "_") / "report.json").read_text())
        assert {trial["d"] for trial in report["trials"]} == {None, *dims}
        assert (row["baseline"], row["ends"]) == (rows[0]["baseline"], [min(dims), max(dims)])
    with pytest.raises(SystemExit):
        main(["study", "gap", "base", *options, "--method", "lora,unilora"])
    assert "--method lora,unilora: study gap has one" in capsys.readouterr().err


def test_a_grid_that_said_cannot_have_is_refused_before_did_begins(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny("bert", tmp_path / "base")
    with pytest.raises(SystemExit):
        main(["study", "methods", "base", *options, "--dims", "2,512,3"])
    told = capsys.readouterr().err
    assert "dims (--dims) of method='said' (--method) for" in told
    assert "d=2 must exceed the number of λ" in told
    assert not (tmp_path / "study").exists()


def test_models_that_cannot_be_measured_are_noted(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny("bert", tmp_path / "small")
    tiny("electra", tmp_path / "other")
    never = [*options, "--full-learning-rates", "1e-30"]
    both = study("methods", ["small"], [*never, "--out", "methods"], tmp_path / "methods")
    assert [row["why_not"] for row in both] == [both[0]["why_not"]] * 2
    assert not (tmp_path / "methods" / "small_said").exists()
    rows = study("models", ["small"], never, tmp_path / "study")
    assert "no better than the majority class" in rows[0]["why_not"]
    assert "small did" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        study("models", ["small"], [*options, "--epochs", "2"], tmp_path / "study")
    assert "arguments: " in capsys.readouterr().err
    rows = study("models", ["small", "other"], [*options, "--overwrite"], tmp_path / "study")
    assert [row["x"] for row in rows] == [row["parameters"] for row in rows]
    model = AutoModel.from_pretrained("other")
    assert rows[1]["parameters"] == sum(p.numel() for p in model.parameters())
    table = (tmp_path / "study" / "study.md").read_text()
    assert f"| {rows[1]['parameters']:,} | {rows[1]['baseline']:.4f} |" in table


def test_gap_against_d90(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny("bert", tmp_path / "base")
    (row,) = study("gap", ["base"], options, tmp_path / "study")
    assert row["x"] == row["gap"] == pytest.approx((row["train"] - row["eval"]) / max(1 - row["eval"], 1e-9))
    assert 0 <= row["train"] <= 1


def test_gap_by_hand():
    class result:
        d, settings, least = 7, {"metric": "accuracy"}, 0.2  # d = 7 was not measured itself
        points = [Point(8, 0.6, [0.7, 0.5], 3, 1, 0.1)]  # noqa: RUF012
        trials = [  # noqa: RUF012
            {"d": None, "seed": 0, "learning_rate": 1.0, "score": 1.0, "train_score": 1.0},
            {"d": 8, "seed": 0, "learning_rate": 0.5, "score": 0.1, "train_score": 0.1},  # another rate
            {"d": 8, "seed": TUNING, "learning_rate": 0.1, "score": 0.1, "train_score": 0.1},  # it chose the rate
            {"d": 8, "seed": 0, "learning_rate": 0.1, "score": None, "train_score": 0.9},  # diverged
            {"d": 8, "seed": 3, "learning_rate": 0.1, "score": 0.2, "train_score": 0.3},  # collapsed
            {"d": 8, "seed": 1, "learning_rate": 0.1, "score": 0.7, "train_score": 0.8},
            {"d": 8, "seed": 2, "learning_rate": 0.1, "score": 0.5, "train_score": 0.8},
            {"d": 9, "seed": 0, "learning_rate": 0.1, "score": 0.0, "train_score": 0.0},
        ]

    assert _compute_gap(result)["gap"] == pytest.approx((0.8 - 0.6) / (1 - 0.6))
    result.settings = {"metric": "loss"}
    assert _compute_gap(result)["gap"] == pytest.approx(0.2)


def test_a_checkpoint_s_step():
    assert [_get_step(name, 7) for name in ("runs/checkpoint-200", "step_20000/", "1000-steps", "final")] == [
        200,
        20000,
        1000,
        7,
    ]
