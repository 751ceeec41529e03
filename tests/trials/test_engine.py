"""Trials in parallel through Ray, and each in a launched process."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from helpers.texts import command, write
from test_documents import tiny

from peft_intrinsic.measure import RayEngine, grid, measure_intrinsic_dimension
from peft_intrinsic.text.launch import LaunchedFit, _is_running
from peft_intrinsic.text.options import TextOptions
from peft_intrinsic.trials.engine import _Worker
from peft_intrinsic_cli import main

ray = pytest.importorskip("ray")

DIMS = grid(10, 1000, 20)


@pytest.fixture(scope="module")
def engine():
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    yield RayEngine()
    ray.shutdown()


@pytest.fixture
def curve():
    # Workers cannot import this module, in which Ray would look for a function.
    return lambda d, seed: 0.8 if d is None else 0.8 / (1 + 60 / d) + 0.001 * seed


@pytest.mark.slow
def test_trials_run_in_parallel_in_workers_that_load_the_fit_once(engine, tmp_path):
    class Fit:
        loads = 0

        def __setstate__(self, state):
            Fit.loads += 1

        def __getstate__(self):
            return {"any": 1}

        def __call__(self, d, seed):
            (tmp_path / str(os.getpid())).touch()
            end = time.time() + 120
            while len(list(tmp_path.iterdir())) < 2 and time.time() < end:  # alone it would wait in vain
                time.sleep(0.1)
            return {"score": 0.5, "process": os.getpid(), "loads": Fit.loads}

    rows = [result for _, result, _ in engine.run(Fit(), [(d, 0, None) for d in range(6)])]
    assert {row["process"] for row in rows}.isdisjoint({os.getpid()})
    assert all(row["loads"] == 1 for row in rows)
    assert len({row["process"] for row in rows}) == 2


@pytest.mark.slow
def test_trial_whose_worker_dies_is_repeated(engine, curve, tmp_path):
    """Other trials run once."""

    def dies(d, seed):
        (tmp_path / f"{d} {os.getpid()}").touch()
        if d == 10 and len(list(tmp_path.glob("10 *"))) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return curve(d, seed)

    results = {i: result for i, result, _ in engine.run(dies, [(10, 0, None), (20, 0, None)])}
    assert results == {0: curve(10, 0), 1: curve(20, 0)}
    assert sorted(path.name.split()[0] for path in tmp_path.iterdir()) == ["10", "10", "20"]


def test_failing_trial_leaves_the_rows_of_finished_ones(engine, curve, tmp_path):
    def fails(d, seed):
        if d and seed == 2:
            time.sleep(1)
            raise ValueError("out of memory")
        return curve(d, seed)

    plan = {"dims": DIMS[-2:], "baseline": 0.8, "out": tmp_path}
    with pytest.raises(ValueError, match="out of memory"):
        measure_intrinsic_dimension(fails, **plan, engine=engine)
    rows = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    last = max(row["d"] for row in rows)
    assert {row["seed"] for row in rows if row["d"] == last} == {0, 1}
    assert measure_intrinsic_dimension(curve, **plan).d is not None


@pytest.mark.slow
def test_result_equals_that_of_one_process_and_workers_are_released(engine, curve, tmp_path):
    """Two slots are fewer than the three seeds, so the search is the same too."""
    assert engine.slots == 2
    there = measure_intrinsic_dimension(curve, DIMS, out=tmp_path, engine=engine)
    here = measure_intrinsic_dimension(curve, DIMS)
    assert there.answers == here.answers
    assert [(row["d"], row["seed"], row["score"]) for row in there.trials] == [
        (row["d"], row["seed"], row["score"]) for row in here.trials
    ]
    assert {row["process"] for row in there.trials}.isdisjoint({row["process"] for row in here.trials})
    calls = []
    again = measure_intrinsic_dimension(lambda d, seed: calls.append(d) or 0.0, DIMS, out=tmp_path)
    assert (again, calls) == (there, [])
    wait(lambda: ray.available_resources().get("CPU") == 2)


@pytest.mark.slow
def test_worker_that_dies_repeatedly_raises(engine):
    other = RayEngine()
    other.worker = ray.remote(max_restarts=0)(_Worker)
    with pytest.raises(RuntimeError, match=r"trial \(None, 0, None\).*died repeatedly.*--cpus"):
        list(other.run(lambda d, seed: os.kill(os.getpid(), signal.SIGKILL), [(None, 0, None)]))


def test_trial_that_exceeds_the_cluster_raises(engine):
    with pytest.raises(ValueError, match=r"cpus=1 and gpus=3 for each trial \(--cpus, --gpus\) exceed .* of Ray"):
        RayEngine(gpus=3)


@pytest.mark.slow
def test_trials_of_accelerate_and_ray_score_as_in_one_process(engine, tmp_path):
    """A trial has two processes with half the data each, or one worker of Ray, or runs in this process."""
    rng = random.Random(0)
    texts = [[rng.choice(["good", "bad", "film", "a", "very"]) for _ in range(6)] for _ in range(64)]
    rows = [{"text": " ".join(words), "label": words.count("good") - words.count("bad") + 0.0} for words in texts]
    data = {"train": write(tmp_path, "train.jsonl", rows[:16]), "eval": write(tmp_path, "eval.jsonl", rows)}
    base = Path(tiny("bert", tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # another sample in each process
    (base / "config.json").write_text(json.dumps({**config, **without}))
    yaml = tmp_path / "more.yaml"
    yaml.write_text("max_steps: 8\nuse_cpu: true\ndataloader_pin_memory: false\n")
    # On CPUs too, `--multi_gpu` is accelerate's name for several processes.
    launch = "accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    launch += " --mixed_precision no --dynamo_backend no"
    found = {}
    for name, more in {
        "launched": ["--engine", "ray", "--launch", launch, "--batch-size", "8"],
        "there": ["--engine", "ray", "--batch-size", "16"],
        "here": ["--batch-size", "16"],
    }.items():
        options = ["--dims", "64,512,2", "--seeds", "1", "--trials", "2", "--metric", "spearman", "--patience", "2"]
        options += ["--full-learning-rates", "0.001", "--learning-rates", "2e-4", "--config", str(yaml), *more]
        main(command(data, str(base), tmp_path / name, *options))
        report = json.loads((tmp_path / name / "report.json").read_text())
        found[name] = {(row["d"], row["seed"]): row["score"] for row in report["trials"]}
    assert len(list((tmp_path / "launched" / "tokens").iterdir())) == 2
    assert found["there"] == pytest.approx(found["here"], abs=1e-6)
    assert found["launched"] == pytest.approx(found["here"], abs=5e-3)  # ranks of near ties
    assert len({*found["here"].values()}) == 2


@pytest.mark.slow
def test_launched_process_ends_with_its_run(tmp_path):
    """The run is a process that does no more than launch it."""
    slow = tmp_path / "slow.py"
    slow.write_text(
        textwrap.dedent("""
        import os, sys, threading, time
        from pathlib import Path
        from peft_intrinsic.text.launch import _end_with
        threading.Thread(target=_end_with, args=(int(sys.argv[1]),), daemon=True).start()
        Path(__file__).with_name("pid").write_text(str(os.getpid()))
        time.sleep(120)
    """)
    )
    code = f"import os, subprocess; subprocess.run([{sys.executable!r}, {str(slow)!r}, str(os.getpid())])"
    run = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    pid = tmp_path / "pid"
    wait(lambda: pid.exists() and pid.read_text())
    run.kill()
    run.wait()
    wait(lambda: not _is_running(int(pid.read_text())))


def wait(until, seconds=120):
    start = time.monotonic()
    while not until():
        assert time.monotonic() - start < seconds
        time.sleep(0.2)


def test_launched_trial_gets_its_options_and_the_process_that_needs_it(tmp_path):
    """The launcher writes what it gets as the result."""
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        "import json, sys; trial = json.loads(sys.argv[3]); json.dump([sys.argv[1:3], trial], open(trial['out'], 'w'))"
    )
    options = TextOptions("none", task="glue/mrpc")
    call, trial = LaunchedFit(options, f"{sys.executable} {launcher}", tmp_path)(8, 1, 0.1)
    assert call == ["-m", "peft_intrinsic.text.launch"]
    assert (trial["trial"], trial["parent"], trial["folder"]) == ([8, 1, 0.1], os.getpid(), str(tmp_path))
    assert TextOptions(**{**trial["options"], "columns": tuple(trial["options"]["columns"])}) == options


def test_failing_launcher_raises_with_the_end_of_its_errors(tmp_path):
    launcher = tmp_path / "launcher.py"
    launcher.write_text("import sys; sys.exit('x' * 3000 + 'no room')")
    with pytest.raises(RuntimeError, match=r"launcher\.py ended with 1:\nx{100}[\s\S]*no room"):
        LaunchedFit(TextOptions("none", task="glue/mrpc"), f"{sys.executable} {launcher}", tmp_path)(8, 0, 0.1)
