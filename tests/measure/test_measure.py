"""The measurement as users call it: options, errors, reports, and resuming after a crash."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from helpers.steps import DIMS, step
from tqdm.auto import tqdm

from peft_intrinsic.measure import NothingToMeasure, analyze, grid, measure_intrinsic_dimension, write_report
from peft_intrinsic.measure.report import format_markdown, summarize
from peft_intrinsic.trials import store as store_module
from peft_intrinsic.trials.store import Store


def test_step_function_is_located_exactly_in_few_trials():
    result = measure_intrinsic_dimension(step, DIMS)
    assert result.d == next(d for d in DIMS if d >= 100)
    assert result.interval == (result.d, result.d)
    assert (result.baseline.scores, result.target) == ([0.8, 0.8, 0.8], pytest.approx(0.72))
    assert len(result.trials) <= 3 * len(DIMS) * 0.7


@pytest.mark.parametrize("center", ["median", "mean"])
def test_plot_draws_collapsed_runs_as_open_marks(center, tmp_path, monkeypatch):
    figures: list = []
    monkeypatch.setattr("peft_intrinsic.measure.report.save_formats", lambda figure, *place: figures.append(figure))
    write_report(measure_intrinsic_dimension(step, DIMS, majority=0.4, sweep=True, center=center), tmp_path)
    marks = [line for line in figures[0].axes[0].lines if line.get_marker() == "o"]
    assert len(marks) == 3 * len(DIMS)
    assert {mark.get_fillstyle() for mark in marks if mark.get_xdata() < 100} == {"none"}
    assert {mark.get_fillstyle() for mark in marks if mark.get_xdata() >= 100} == {"full"}


def test_d_beyond_and_below_the_grid_is_reported_as_such():
    never = measure_intrinsic_dimension(lambda d, seed: 0.8 if d is None else 0.4, DIMS)
    assert (never.d, never.interval) == (None, (None, None))
    assert "d90 > 1000, 90 % interval [> 1000, > 1000]" in summarize(never)
    always = measure_intrinsic_dimension(lambda d, seed: 0.8, DIMS)
    assert always.d == DIMS[0]
    assert "d90 ≤ 10, 90 % interval [≤ 10, ≤ 10]" in summarize(always)


def test_learning_rates_are_chosen_for_both_on_the_same_terms():
    tried = []

    def fit(d, seed, rate):
        tried.append((d, seed, rate))
        best = 1e-3 if d is None else 0.1
        return step(d, seed) - 0.1 * abs(math.log(rate / best, 4))

    result = measure_intrinsic_dimension(fit, DIMS, learning_rates=([1e-4, 1e-3], [0.1, 0.5]))
    assert (result.baseline.learning_rate, {point.learning_rate for point in result.points}) == (1e-3, {0.1})
    assert len(tried) == len(set(tried))
    assert result.d == next(d for d in DIMS if d >= 100)
    assert result.edges[0] is None  # the better of two is always an end
    assert "| best learning rate at the edge of those tried | full fine-tuning, d = 10" in format_markdown(result)
    assert not measure_intrinsic_dimension(fit, DIMS, learning_rates=("auto", "auto")).edges


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": [5]}, "dims must be ascending"),
        ({"dims": [5, 4]}, "dims must be ascending"),
        ({"dims": [0, 4]}, "dims must be ascending"),
        ({"target": 1.5}, "target must lie in"),
        ({"relative_to": "loss"}, "relative_to must be 'score' or 'gain', got 'loss'"),
        ({"relative_to": "gain", "majority": 0.8}, "no better than the majority class"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"learning_rates": ([1], [1, 2])}, "as many for full fine-tuning as for the subspace"),
        ({"learning_rates": ("auto", [1, 2])}, "or be 'auto' for both"),
        ({"learning_rates": "fast"}, "learning_rates='fast' must be 'auto', or a pair"),
        ({"learning_rates": ([1, 1], [1, 2])}, "must be one or more, each once"),
        ({"learning_rates": ([], [])}, "must be one or more, each once"),
        ({"baseline": []}, r"baseline must be finite scores, one or more, got \[\]"),
        ({"baseline": math.nan}, r"baseline must be finite scores, one or more, got \[nan\]"),
        ({"seeds": 2.5}, "seeds must be a whole number, got 2.5"),
        ({"learning_rates": ([math.nan], [1])}, r"\(--full-learning-rates, --learning-rates\) must be above 0"),
        ({"baseline_seeds": 0}, "baseline_seeds must be at least 1, got 0"),
        ({"minutes": math.nan}, "minutes must be at least 0, got nan"),
        ({"center": "mode"}, "center must be 'median' or 'mean', got 'mode'"),
        ({"majority": 0.8}, "no better than the majority class"),
        ({"trials": 2}, "trials must be at least 4, got 2: fewer do not measure a single d with seeds=3"),
        ({"baseline": -1.0}, "a fraction of a negative score is no target"),
    ],
)
def test_invalid_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        measure_intrinsic_dimension(step, **{"dims": DIMS, **options})


@pytest.mark.filterwarnings("ignore:.*belongs to a run with other settings")
def test_rows_of_other_settings_are_set_aside(tmp_path):
    fits = {5: lambda d, seed: step(None if d is None else 3 * d, seed), 6: step}
    for width, fit in fits.items():
        measure_intrinsic_dimension(fit, DIMS, out=tmp_path / str(width), settings={"width": width})
    first, second = (tmp_path / str(width) / "trials.jsonl" for width in (5, 6))
    row = json.loads(first.read_text().splitlines()[-1])
    complete = {"width": 5, **{name: row[name] for name in ("d", "seed", "learning_rate")}}
    assert row["key"] == hashlib.sha256(json.dumps(complete, sort_keys=True).encode()).hexdigest()[:16]
    again, rows = [], second.read_text().splitlines()
    with second.open("a") as file:
        file.write(first.read_text())
    with pytest.warns(UserWarning, match=f"line {len(rows) + 1}, belongs to a run with other settings: set aside"):
        assert analyze(second.parent).d == measure_intrinsic_dimension(step, DIMS).d
    second.write_text(first.read_text())
    measure_intrinsic_dimension(
        lambda d, seed: again.append(d) or step(d, seed), DIMS, out=second.parent, settings={"width": 6}
    )
    assert len(again) == len(rows)


def test_folder_is_locked_while_a_process_uses_it(tmp_path):
    code = f"""
    import sys, time
    sys.path.insert(0, {str(Path(store_module.__file__).parent)!r})  # without the package, which imports torch
    import store
    with store.Store({str(tmp_path)!r}, {{}}):
        print("open", flush=True)
        time.sleep(60)
    """
    other = subprocess.Popen([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline().strip() == b"open"
        with pytest.raises(RuntimeError, match="in use by another run"):
            Store(tmp_path, {})
    finally:
        other.kill()
        other.communicate()
    Store(tmp_path, {}).close()  # the lock ends with its process


def test_unwritable_folder_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        measure_intrinsic_dimension(step, DIMS, out=tmp_path / "file")


def run(folder: Path) -> None:
    tqdm.set_lock(threading.RLock())  # the default is shared with processes that are killed while they hold it

    def fit(d, seed):
        time.sleep(0.004)
        return 0.8 if d is None else 0.8 / (1 + 300 / d) + random.Random(f"{d} {seed}").gauss(0, 0.01)

    write_report(measure_intrinsic_dimension(fit, grid(10, 100_000, 40), out=folder), folder)


@pytest.mark.slow
def test_killed_run_resumes_with_the_same_report_and_no_trial_twice(tmp_path):
    """It is killed twenty times by SIGKILL."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole)
    rng = random.Random(0)
    kills = 0
    fork = multiprocessing.get_context("fork")  # imports nothing again
    while not (killed / "report.json").exists() or kills < 20:
        process = fork.Process(target=run, args=(killed,))
        process.start()
        lines = count(killed)
        started = time.monotonic()
        # It finishes between none and a few trials before it is killed.
        while process.is_alive() and count(killed) < lines + rng.randrange(4) and time.monotonic() - started < 30:
            time.sleep(rng.random() * 0.004)
        if process.is_alive() and kills < 22:
            process.kill()
            kills += 1
        process.join()
    assert (killed / "report.md").read_text() == (whole / "report.md").read_text()
    own, other = (json.loads((folder / "report.json").read_text()) for folder in (killed, whole))
    for row in (*own["trials"], *other["trials"]):
        del row["seconds"], row["process"]
    assert own == other
    finished = [json.loads(line)["key"] for line in (killed / "trials.jsonl").read_text().splitlines()]
    assert len(finished) == len(set(finished)) == count(whole)


def count(folder: Path) -> int:
    path = folder / "trials.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_report_has_every_trial_and_answer(tmp_path):
    fit = lambda d, seed: 0.3 if (d, seed) == (1000, 1) else step(d, seed)  # noqa: E731
    result = measure_intrinsic_dimension(fit, DIMS, majority=0.35, out=tmp_path, sweep=True)
    write_report(result, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["answers"]["score"]["d"] == report["answers"]["gain"]["d"] == result.d
    assert report["answers"]["gain"]["target"] == pytest.approx(0.35 + 0.9 * 0.45)
    first = report["trials"][0]
    assert (first["d"], first["seed"], first["learning_rate"], first["score"]) == (None, 0, None, 0.8)
    assert first["process"].endswith(f" {os.getpid()}")
    assert first["versions"]["torch"] == report["versions"]["torch"] == importlib.metadata.version("torch")
    assert len(report["trials"]) == count(tmp_path)
    figures = {name: (tmp_path / f"curve.{name}").read_bytes() for name in ("png", "svg", "pdf")}
    assert all(len(figure) > 5_000 for figure in figures.values())
    write_report(result, tmp_path)
    assert figures == {name: (tmp_path / f"curve.{name}").read_bytes() for name in figures}
    rows = (tmp_path / "curve.csv").read_text().splitlines()
    assert rows[0] == "d,seed,learning_rate,score,seconds,process"
    assert rows[1].startswith("full,0,,0.8,")
    assert len(rows) == 1 + count(tmp_path)
    text = format_markdown(result)
    assert f"d90 = {result.d}, 90 % interval [{result.d}, {result.d}]" in text
    assert "| majority class | 0.3500 |" in text
    assert f"| collapsed: full fine-tuning, subspace | 0, 1 of {3 * len(DIMS)} |" in text
    assert f"| {result.d} | 0.8000 | fixed by the fit | 0.8000, 0.8000, 0.8000 |  |" in text
    assert "| 1000 | 0.8000 | fixed by the fit | 0.8000, 0.8000 | 1 |" in text
    assert analyze(tmp_path, center="mean").points[-1].scores == [0.8, 0.3, 0.8]


def test_gain_is_relative_to_the_untrained_model_without_a_majority():
    """A negative loss is −3 before training and −1 after it; 90 % of the gain is −1.2."""
    asked = []

    def fit(d, seed):
        asked.append(d)
        return -1.0 if d is None else -3.0 if d == 0 else -1.1 if d >= 100 else -1.3

    result = measure_intrinsic_dimension(fit, DIMS, relative_to="gain")
    assert (result.untrained, result.target) == (-3.0, pytest.approx(-1.2))
    assert result.d == next(d for d in DIMS if d >= 100)
    assert asked.count(0) == 1
    assert "| before training | -3.0000 |" in format_markdown(result)
    with pytest.raises(NothingToMeasure, match=r"no better than the untrained model \(-1.0000\)"):
        measure_intrinsic_dimension(lambda d, seed: -1.0, DIMS, relative_to="gain")


def test_values_that_a_fit_returns_beside_the_score_are_stored(tmp_path):
    result = measure_intrinsic_dimension(lambda d, seed: {"score": step(d, seed), "loss": 0.25}, DIMS, out=tmp_path)
    assert result.d == measure_intrinsic_dimension(step, DIMS).d
    assert {row["loss"] for row in result.trials} == {0.25}


def test_untrained_model_is_scored_with_a_learning_rate():
    result = measure_intrinsic_dimension(
        lambda d, seed, rate: -1.0 if d is None else -3.0 if d < 100 else -1.1,
        DIMS,
        relative_to="gain",
        baseline=-1.0,
        learning_rates=([1e-4], [0.1]),
    )
    assert (result.untrained, result.points[0].learning_rate) == (-3.0, 0.1)
    assert all(row["d"] is not None for row in result.trials)


def test_summary_warns_of_a_low_target_and_of_one_seed():
    low = measure_intrinsic_dimension(lambda d, seed: 0.7, DIMS, majority=0.684)
    assert "the target, 0.6300, is no better than the majority class" in summarize(low)
    assert "interval unknown with one seed" in summarize(measure_intrinsic_dimension(step, DIMS, seeds=1))


def test_overwrite_removes_all_files_of_the_old_run(tmp_path):
    write_report(measure_intrinsic_dimension(step, DIMS, out=tmp_path), tmp_path)
    with pytest.raises(NothingToMeasure):
        measure_intrinsic_dimension(step, DIMS, majority=0.9, out=tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} <= {"trials.jsonl", "settings.json", "plan.json", ".lock"}


def test_full_disk_leaves_no_part_of_a_row(tmp_path, monkeypatch):
    write = os.write
    with Store(tmp_path, {}) as store:
        store.add({"d": 1}, {"score": 0.5})
        monkeypatch.setattr(os, "write", lambda file, line: write(file, line[:9]))
        with pytest.raises(OSError, match="no room for the row"):
            store.add({"d": 2}, {"score": 0.6})
        monkeypatch.undo()
        store.add({"d": 3}, {"score": 0.7})
    with Store(tmp_path, {}) as store:
        assert [row["d"] for row in store.rows.values()] == [1, 3]
