"""The command trajectory, from the recording to the transfer, on a tiny model."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from argparse import Namespace

import pytest
import torch
from helpers.texts import BAD, GOOD, write
from peft import PeftModel
from test_documents import tiny
from transformers import BertForSequenceClassification

from peft_intrinsic.commands.trajectory import _build_settings
from peft_intrinsic.text.labeled import LabeledTexts
from peft_intrinsic.trajectory import Subspace, fit_subspace, snapshots
from peft_intrinsic_cli import main


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": GOOD if i % 2 else BAD, "label": i % 2} for i in range(48)]
    write(tmp_path, "train.jsonl", rows)
    write(tmp_path, "eval.jsonl", rows[:20])
    write(tmp_path, "turned.jsonl", [{**row, "label": 1 - row["label"]} for row in rows])
    tiny("bert", tmp_path / "base")
    return tmp_path


def run(*words: str) -> None:
    main(["trajectory", *words])


def record(out: str, train: str = "train.jsonl", *more: str) -> None:
    training = ["--model", "base", "--train", train, "--batch-size", "8", "--learning-rate", "1e-3", "--steps", "24"]
    run("record", *training, "-o", out, *(more or ("--every", "3")))


@pytest.mark.slow
def test_record_fit_tune_outliers_and_transfer_work_together(files, capsys, monkeypatch):
    record("runs/own")
    assert "runs/own: 8 snapshots" in capsys.readouterr().out
    assert not (files / "runs/own/checkpoints").exists()
    run("fit", "runs/own", "--dim", "4", "-o", "own.safetensors")
    out = capsys.readouterr().out
    assert re.search(r"\| encoder\.layer\.1 \| 4 \| (0\.9\d+|1\.0+) \|", out.replace("bert.", "")), out
    assert "own.safetensors: up to d = 8" in out

    tuning = ["--model", "base", "--train", "train.jsonl", "--eval", "eval.jsonl", "--batch-size", "8"]
    more = ["--modules-to-save", "classifier", "--embed", "--learning-rate", "3e-3", "--steps", "60", "-d", "6"]
    run("tune", *tuning, *more, "--subspace", "own.safetensors", "-o", "adapter")
    out = capsys.readouterr().out
    found = re.search(r"adapter: d = 6\naccuracy ([\d.]+) before, ([\d.]+) tuned", out)
    assert found, out
    assert float(found[2]) == 1.0 > float(found[1])
    base = BertForSequenceClassification.from_pretrained("base", num_labels=2)
    loaded = PeftModel.from_pretrained(base, "adapter")
    assert len(loaded.get_base_model().intrinsic.intrinsic_theta["default"].weight) == 6
    assert Subspace("adapter/subspace.safetensors").digest == Subspace("own.safetensors").digest

    few = ["--steps", "30", "--learning-rate", "1e-3"]
    run("outliers", "adapter", *tuning, *few, "-o", "far")
    out = capsys.readouterr().out
    assert set(re.findall(r"\| (.+?) \| [\d.]+ \|", out)) >= {"full"}
    count = int(re.search(r"(\d+) of \d+ weights \([\d.]+%\) changed beyond 3 σ", out)[1])
    assert f"| without {count} outliers | " in out
    assert f"| without {count} at random | " in out
    assert (files / "far/outliers.md").read_text() in out
    assert (files / "far/outliers.png").exists()

    record("runs/other", "turned.jsonl")
    capsys.readouterr()
    transfer = [
        "transfer",
        "runs/own",
        "runs/other",
        "--source-task",
        "runs/own",
        *tuning,
        "--dim",
        "3",
        *few,
        "-o",
        "table",
    ]
    fitted = []

    def fitting(files, dim, **more):
        fitted.append(({str(path.parent) for path in files}, dim))
        return fit_subspace(files, dim, **more)

    monkeypatch.setattr("peft_intrinsic.commands.trajectory.fit_subspace", fitting)
    run(*transfer)
    assert fitted == [({"runs/own"}, 3), ({"runs/other"}, 3), ({"runs/own", "runs/other"}, 2), ({"runs/other"}, 1)]
    out = capsys.readouterr().out
    names = re.findall(r"\| (.+) \| [\d.]+ \|", out)
    assert names == ["subspace of runs/own", "subspace of runs/other", "unified", "zero-shot"]
    assert "built in" in out
    assert (files / "table/transfer.md").read_text() in out


@pytest.mark.slow
def test_finished_run_is_not_trained_again(files, capsys, monkeypatch):
    record("a")
    record("b", "turned.jsonl")
    words = ["transfer", "a", "b", "--model", "base", "--train", "train.jsonl", "--eval", "eval.jsonl", "--steps", "2"]
    run(*words, "-o", "table")
    first = capsys.readouterr().out.splitlines()
    monkeypatch.setattr(LabeledTexts, "train", None)
    run(*words, "-o", "table")
    with pytest.raises(SystemExit, match="2"):
        run(*words, "--dim", "1", "-o", "table")
    assert capsys.readouterr().out.splitlines()[-5:] == first[-5:]
    rows = [json.loads(line) for line in (files / "table/trials.jsonl").read_text().splitlines()]
    assert [row["run"] for row in rows] == ["subspace of a", "subspace of b", "unified"]


def test_changed_input_file_is_reported_as_another_run(files, capsys):
    record("a")
    words = ["transfer", "a", "--model", "base", "--train", "train.jsonl", "--eval", "eval.jsonl", "--steps", "2"]
    run(*words, "-o", "table")
    shutil.copytree("base", "moved/base")
    run(*words, "--model", "moved/base", "-o", "table")  # the same files under another path

    def refused(name: str) -> None:
        with pytest.raises(SystemExit, match="2"):
            run(*words, "-o", "table")
        told = capsys.readouterr().err
        assert f"({name}: " in told
        assert ", sha256 " in told

    places = {
        "eval": "eval.jsonl",
        "train": "train.jsonl",
        "model": "base/config.json",
        "recordings": snapshots("a")[0],
    }
    for name, place in places.items():
        path = files / place
        before = path.read_bytes()
        path.write_bytes(before + b"\n")
        refused(name)
        path.write_bytes(before)


def stop_at(monkeypatch, call: int) -> None:
    """Interrupt this call of the optimizer, and none after it."""
    step, count = torch.optim.AdamW.step, itertools.count(1)

    def stop(*args, **kwargs):
        if next(count) == call:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", stop)


def test_interrupted_recording_resumes(files, monkeypatch):
    stop_at(monkeypatch, 20)  # of 24; a checkpoint at 16
    with pytest.raises(SystemExit, match="130"):
        record("cut", "train.jsonl", "--every", "2")
    assert (files / "cut/checkpoints").exists()
    record("cut", "train.jsonl", "--every", "2")
    assert [int(path.stem[-8:]) for path in snapshots("cut")] == list(range(2, 25, 2))
    assert not (files / "cut/checkpoints").exists()


@pytest.mark.slow
def test_recording_killed_while_writing_a_checkpoint_resumes(files, monkeypatch):
    stop_at(monkeypatch, 20)  # checkpoints at 8 and 16, of which the last is stored
    with pytest.raises(SystemExit, match="130"):
        record("cut", "train.jsonl", "--every", "1")
    whole = files / "cut/checkpoints/checkpoint-16"
    half = shutil.copytree(whole, whole.with_name("checkpoint-24"))
    (half / "trainer_state.json").unlink()
    (half / "optimizer.pt").unlink()
    begun = snapshots("cut")[0].stat().st_mtime_ns
    record("cut", "train.jsonl", "--every", "1")
    assert len(snapshots("cut")) == 24
    assert snapshots("cut")[0].stat().st_mtime_ns == begun

    stop_at(monkeypatch, 20)
    with pytest.raises(SystemExit, match="130"):
        record("none", "train.jsonl", "--every", "1")
    (files / "none/checkpoints/checkpoint-16/trainer_state.json").unlink()  # none is left: from the start
    record("none", "train.jsonl", "--every", "1")
    assert len(snapshots("none")) == 24


def test_recording_without_checkpoint_restarts_and_finished_one_is_unchanged(files, monkeypatch, capsys):
    stop_at(monkeypatch, 5)
    with pytest.raises(SystemExit, match="130"):
        record("a")
    assert len(snapshots("a")) == 1
    record("a")
    before = [path.stat().st_mtime_ns for path in snapshots("a")]
    assert len(before) == 8
    record("a")
    assert [path.stat().st_mtime_ns for path in snapshots("a")] == before
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        record("a", "train.jsonl", "--every", "3", "--seed", "1")
    assert "seed: 0 there, 1 now" in capsys.readouterr().err
    (files / "a/settings.json").unlink()
    with pytest.raises(SystemExit, match="2"):
        record("a")
    assert "holds a recording that this command did not make" in capsys.readouterr().err
    assert len(snapshots("a")) == 8


def test_tune_with_d_zero_is_an_error(files, capsys):
    record("a")
    run("fit", "a", "--dim", "2", "-o", "s.safetensors")
    words = ["--model", "base", "--train", "train.jsonl", "--subspace", "s.safetensors", "-o", "adapter"]
    with pytest.raises(SystemExit, match="2"):
        run("tune", *words, "-d", "0")
    assert "d must be at least 1 and below 2**63, got 0" in capsys.readouterr().err
    (files / "adapter" / "notes.txt").write_text("mine")
    for overwrite in ([], ["--overwrite"]):  # no adapter is there
        with pytest.raises(SystemExit, match="2"):
            run("tune", *words, *overwrite)
        assert "--out adapter is in use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit", "base", "--dim", "2", "-o", "s"], "base is a whole checkpoint"),
        (["fit", "absent", "--dim", "2", "-o", "s"], "absent cannot be read"),
        (["tune", "--subspace", "absent", "-o", "a"], "subspace='absent' cannot be read"),
        (
            ["transfer", "a", "--source-task", "b", "-o", "a", "--eval", "eval.jsonl"],
            "--source-task b is none of the recordings",
        ),
        (["transfer", "a", "b", "-o", "a", "--eval", "eval.jsonl"], "a, b: no snapshots there"),
        (["record", "-o", "a", "--every", "0"], "every=0 is no positive integer"),
        (["record", "-o", "a", "--parameters", "none"], "parameters='none' matches none"),
        (["record", "-o", "a", "--parameters", "("], "parameters='(' is not a regular expression"),
    ],
)
def test_invalid_options_are_reported_with_their_value(files, capsys, words, message):
    more = [] if words[0] == "fit" else ["--model", "base", "--train", "train.jsonl"]
    with pytest.raises(SystemExit, match="2"):
        run(*words, *more)
    assert message in capsys.readouterr().err


def test_a_run_resumes_with_debug():
    plain, debugging = (Namespace(debug=debug, out="runs/a", run=None, seed=0) for debug in (False, True))
    assert _build_settings(debugging) == _build_settings(plain) == {"debug": False, "seed": 0}
