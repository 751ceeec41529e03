"""Sweeps of certificates: they go on, count all that was tried, and score on the test data of today."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.films import certify, errors, films, rows, told
from helpers.texts import write
from safetensors.torch import load_file, save_file

import peft_intrinsic.bounds.certify as certifying
import peft_intrinsic.bounds.sweep as sweeping
from peft_intrinsic_command import main


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return films(tmp_path)


def test_a_sweep_goes_on_and_certifies_the_best(folder, capsys, monkeypatch):
    sweep = ("--dims", "10,40", "--levels", "2,4", "--model", "base", "--eval", "test.jsonl", "--steps", "3")
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
    assert best["num_tried"] == 4
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


def test_all_that_a_folder_holds_counts_as_tried(folder, capsys):
    sweep = ("--levels", "2", "--model", "base", "--steps", "2", "-o", "out")
    certify("--dims", "40", *sweep)
    assert told("out/sweep.json")["num_tried"] == 1
    capsys.readouterr()
    certify("--dims", "20,10", *sweep, "--num-tried", "3")
    found = told("out/sweep.json")
    assert found["num_tried"] == 9
    assert [row["d"] for row in found["rows"]] == [10, 20, 40]
    assert {row["certificate"]["num_tried"] for row in found["rows"]} == {9}
    best = min((row["certificate"] for row in found["rows"]), key=lambda row: row["bound"])
    assert told("out/best.certificate.json")["certificate"] == best
    table = capsys.readouterr().out
    assert [table.count(f"| {d} | 2 |") for d in (10, 20, 40)] == [1, 1, 1]


def test_test_errors_are_of_the_present_test_data(folder, monkeypatch):
    write(folder, "other.jsonl", rows(30, 5))
    sweep = ("--dims", "10", "--levels", "2", "--model", "base", "--steps", "2", "-o", "out")
    certify(*sweep, "--eval", "test.jsonl")
    stored = Path("out/trials.jsonl").read_text()
    monkeypatch.setattr(sweeping, "trained", None)

    def counted(*test: str) -> tuple[int | None, int | None]:
        certify(*sweep, *test)
        (row,) = told("out/sweep.json")["rows"]
        return row["certificate"]["test_errors"], row["certificate"]["test_n"]

    assert counted("--eval", "other.jsonl") == (errors("out/best.pia", "other.jsonl"), 30)
    assert counted() == (None, None)
    with monkeypatch.context() as patch:
        patch.setattr(certifying, "load_packed", None)
        assert counted("--eval", "test.jsonl") == (errors("out/best.pia", "test.jsonl"), 40)
    assert Path("out/trials.jsonl").read_text() == stored
    row = json.loads(stored)  # rows of earlier versions do not say of which data
    Path("out/trials.jsonl").write_text(
        json.dumps({name: row[name] for name in row if name not in ("sum", "test_data")} | {"test_errors": 39}) + "\n"
    )
    assert counted("--eval", "test.jsonl") == (errors("out/best.pia", "test.jsonl"), 40)
