"""The studies: tables, plots, resuming, and models that learn nothing."""

from __future__ import annotations

import json

import pytest
from helpers.texts import command
from test_documents import tiny
from transformers import AutoModel

from peft_intrinsic.measure import study as module
from peft_intrinsic.measure.analysis import Point
from peft_intrinsic.measure.evidence import TUNING
from peft_intrinsic.measure.study import _compute_gap, _get_step
from peft_intrinsic.text import TextFit
from peft_intrinsic_cli import main


@pytest.fixture
def options(data, tmp_path):
    config = tmp_path / "more.yaml"
    config.write_text("max_steps: 120\nuse_cpu: true\ndataloader_pin_memory: false\n")
    return command(data, "unused", tmp_path / "study", "--config", str(config), "--dims", "16,512,3")[3:]


@pytest.fixture
def untrained(monkeypatch):
    """Trials have given scores instead of training: all from d = 64 on, and full fine-tuning, learn."""

    def fit(self, d, seed, learning_rate):
        learns = (d is None or d >= 64) and learning_rate > 1e-20
        return {"score": 1.0 if learns else 2 / 3, "correct": [i % 3 > 0 or learns for i in range(24)]}

    monkeypatch.setattr(TextFit, "__call__", fit)


def study(kind, models, options, folder):
    main(["study", kind, *models, *options])
    found = json.loads((folder / "study.json").read_text())
    assert found["kind"] == kind
    for name in ("png", "svg", "pdf"):
        assert (folder / f"study.{name}").stat().st_size > 5_000
    return found["rows"]


@pytest.mark.slow
def test_study_of_methods_trains_full_fine_tuning_once_and_resumes(untrained, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny("bert", tmp_path / "base")
    rows = study("methods", ["base"], options, tmp_path / "study")
    assert [row["name"] for row in rows] == ["base did", "base said"]
    full = {}
    for row in rows:
        report = json.loads((tmp_path / "study" / row["name"].replace(" ", "_") / "report.json").read_text())
        for name, answer in report["answers"].items():
            assert (answer["d"], answer["interval"]) == (row["answers"][name]["d"], row["answers"][name]["interval"])
        assert report["settings"]["method"] == row["method"]
        full[row["method"]] = [trial for trial in report["trials"] if trial["d"] is None]
    assert full["did"] == full["said"]  # trained once: the same seconds
    assert rows[0]["baseline"] == rows[1]["baseline"]
    plans = [json.loads((tmp_path / f"study/base_{method}/plan.json").read_text()) for method in full]
    seeds = sum(trial["seed"] != TUNING for trial in full["did"])
    assert [plan["baseline_seeds"] for plan in plans] == [None, seeds]  # further ones would be another target
    before = {path: path.read_text() for path in tmp_path.glob("study/*/trials.jsonl")}
    assert study("methods", ["base"], options, tmp_path / "study") == rows
    assert {path: path.read_text() for path in before} == before


@pytest.mark.slow
def test_each_method_measures_the_dims_of_the_grid_that_it_supports(untrained, options, tmp_path, monkeypatch, capsys):
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


def test_grid_is_checked_for_all_methods_before_the_first_runs(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny("bert", tmp_path / "base")
    with pytest.raises(SystemExit):
        main(["study", "methods", "base", *options, "--dims", "2,512,3"])
    message = capsys.readouterr().err
    assert "dims (--dims) of method='said' (--method) for" in message
    assert "d=2 must exceed the number of λ" in message
    assert not (tmp_path / "study").exists()


def test_models_that_are_named_alike_are_reported_before_the_first_runs(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a/b", "a_b"):
        tiny("bert", tmp_path / name)
    with pytest.raises(SystemExit):
        main(["study", "models", "a/b", "a_b", *options, "--dry-run"])
    assert "2 measurements have the folder" in capsys.readouterr().err


@pytest.mark.slow
def test_models_that_learn_nothing_are_noted_and_can_be_overwritten(untrained, options, tmp_path, monkeypatch, capsys):
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


@pytest.mark.slow
def test_study_of_gaps_has_training_scores(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny("bert", tmp_path / "base")
    few = ["--dims", "256,512,2", "--seeds", "1"]
    (row,) = study("gap", ["base"], [*options, *few], tmp_path / "study")
    assert row["x"] == row["gap"] == pytest.approx((row["train"] - row["eval"]) / max(1 - row["eval"], 1e-9))
    assert 0 <= row["train"] <= 1


@pytest.mark.slow
def test_models_whose_d90_is_above_the_grid_stay_in_the_plot_of_gaps(untrained, options, tmp_path, monkeypatch):
    drawn = []
    save = module.save_formats
    monkeypatch.setattr(module, "save_formats", lambda figure, *rest: (drawn.append(figure), save(figure, *rest)))
    monkeypatch.chdir(tmp_path)
    for name in ("base", "other"):
        tiny("bert", tmp_path / name)
    rows = study("gap", ["base", "other"], [*options, "--dims", "8,32,3"], tmp_path / "study")
    assert [row["x"] for row in rows] == [None, None]
    labels = [label.get_text() for label in drawn[-1].axes[0].get_yticklabels()]
    assert labels == ["base, DID\ngap unknown", "other, DID\ngap unknown"]


@pytest.mark.slow
def test_a_model_that_spends_its_trials_does_not_stop_the_study(untrained, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "other"):
        tiny("bert", tmp_path / name)
    known = ["--learning-rates", "1e-3,4e-3", "--full-learning-rates", "1e-5,4e-5"]  # all of the budget
    few = study("methods", ["base", "other"], [*options, *known, "--trials", "4"], tmp_path / "study")
    assert [row["name"] for row in few] == ["base did", "base said", "other did", "other said"]
    assert all("the budget of 4 trials is spent before a d from" in row["why_not"] for row in few)
    more = study("methods", ["base", "other"], [*options, *known], tmp_path / "study")
    assert ["answers" in row for row in more] == [True] * 4


def test_gap_uses_the_runs_at_d90_that_did_not_collapse():
    class result:
        d, settings, floor = 7, {"metric": "accuracy"}, 0.2  # d = 7 was not measured
        points = [Point(8, 0.6, [0.7, 0.5], 3, 1, 0.1)]  # noqa: RUF012
        trials = [  # noqa: RUF012
            {"d": None, "seed": 0, "learning_rate": 1.0, "score": 1.0, "train_score": 1.0},
            {"d": 8, "seed": 0, "learning_rate": 0.5, "score": 0.1, "train_score": 0.1},  # another learning rate
            {"d": 8, "seed": TUNING, "learning_rate": 0.1, "score": 0.1, "train_score": 0.1},  # a tuning seed
            {"d": 8, "seed": 0, "learning_rate": 0.1, "score": None, "train_score": 0.9},  # diverged
            {"d": 8, "seed": 3, "learning_rate": 0.1, "score": 0.2, "train_score": 0.3},  # collapsed
            {"d": 8, "seed": 1, "learning_rate": 0.1, "score": 0.7, "train_score": 0.8},
            {"d": 8, "seed": 2, "learning_rate": 0.1, "score": 0.5, "train_score": 0.8},
            {"d": 9, "seed": 0, "learning_rate": 0.1, "score": 0.0, "train_score": 0.0},
        ]

    assert _compute_gap(result)["gap"] == pytest.approx((0.8 - 0.6) / (1 - 0.6))
    result.settings = {"metric": "loss"}
    assert _compute_gap(result)["gap"] == pytest.approx(0.2)


def test_step_is_the_last_number_of_a_checkpoint_s_name():
    assert [_get_step(name, 7) for name in ("runs/checkpoint-200", "step_20000/", "1000-steps", "final")] == [
        200,
        20000,
        1000,
        7,
    ]
