"""Sweeps of certificates: they resume, count every row as tried, and use the current test data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.films import certify, count_errors, films, read_json, rows
from helpers.texts import write
from safetensors.torch import load_file, save_file

import peft_intrinsic.bounds.certify as certifying
import peft_intrinsic.bounds.sweep as sweeping
from peft_intrinsic_cli import main


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return films(tmp_path)


@pytest.mark.slow
def test_a_sweep_resumes_and_certifies_the_lowest_bound(folder, capsys, monkeypatch):
    sweep = ("--dims", "10,40", "--levels", "2,4", "--model", "base", "--eval", "test.jsonl", "--steps", "3")
    train, dims = sweeping.train_and_pack, []

    def fail_once(texts, d, *rest):
        dims.append(d)
        if dims == [10, 40]:
            raise OSError("killed")
        return train(texts, d, *rest)

    monkeypatch.setattr(sweeping, "train_and_pack", fail_once)
    with pytest.raises(SystemExit, match="2"):
        certify(*sweep, "-o", "out")
    certify(*sweep, "-o", "out")
    assert dims == [10, 40, 40]
    found = read_json("out/sweep.json")["rows"]
    assert [(row["d"], row["levels"]) for row in found] == [(10, 2), (10, 4), (40, 2), (40, 4)]
    best = min((row["certificate"] for row in found), key=lambda row: row["bound"])
    assert read_json("out/best.certificate.json")["certificate"] == best
    assert best["num_tried"] == 4
    assert best["errors"] == count_errors("out/best.pia", "train.jsonl")
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


def test_every_row_of_a_folder_counts_as_tried(folder, capsys):
    sweep = ("--levels", "2", "--model", "base", "--steps", "2", "-o", "out")
    certify("--dims", "40", *sweep)
    assert read_json("out/sweep.json")["num_tried"] == 1
    capsys.readouterr()
    certify("--dims", "20,10", *sweep, "--num-tried", "3")
    found = read_json("out/sweep.json")
    assert found["num_tried"] == 9
    assert [row["d"] for row in found["rows"]] == [10, 20, 40]
    assert {row["certificate"]["num_tried"] for row in found["rows"]} == {9}
    best = min((row["certificate"] for row in found["rows"]), key=lambda row: row["bound"])
    assert read_json("out/best.certificate.json")["certificate"] == best
    table = capsys.readouterr().out
    assert [table.count(f"| {d} | 2 |") for d in (10, 20, 40)] == [1, 1, 1]
    with pytest.raises(SystemExit, match="2"):
        certify("--dims", "30", *sweep)
    assert "--num-tried 1: best.certificate.json counts 9 adapters. Pass --num-tried 3." in capsys.readouterr().err
    assert read_json("out/sweep.json") == found


@pytest.mark.slow
def test_test_errors_are_those_on_the_current_test_data(folder, monkeypatch):
    write(folder, "other.jsonl", rows(30, 5))
    sweep = ("--dims", "10", "--levels", "2", "--model", "base", "--steps", "2", "-o", "out")
    certify(*sweep, "--eval", "test.jsonl")
    stored = Path("out/trials.jsonl").read_text()
    monkeypatch.setattr(sweeping, "train_and_pack", None)

    def sweep_again(*test: str) -> tuple[int | None, int | None]:
        certify(*sweep, *test)
        (row,) = read_json("out/sweep.json")["rows"]
        return row["certificate"]["test_errors"], row["certificate"]["test_n"]

    assert sweep_again("--eval", "other.jsonl") == (count_errors("out/best.pia", "other.jsonl"), 30)
    assert sweep_again() == (None, None)
    with monkeypatch.context() as patch:
        patch.setattr(certifying, "load_packed", None)
        assert sweep_again("--eval", "test.jsonl") == (count_errors("out/best.pia", "test.jsonl"), 40)
    assert Path("out/trials.jsonl").read_text() == stored
    row = json.loads(stored)  # rows of earlier versions lack the digest of the test data
    Path("out/trials.jsonl").write_text(
        json.dumps({name: row[name] for name in row if name not in ("sum", "test_data")} | {"test_errors": 39}) + "\n"
    )
    assert sweep_again("--eval", "test.jsonl") == (count_errors("out/best.pia", "test.jsonl"), 40)
