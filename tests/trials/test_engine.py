"""Trials side by side through Ray, and each in a launched process: the same results as here."""

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
    # Not of this module: workers do not have it, and would look for it.
    return lambda d, seed: 0.8 if d is None else 0.8 / (1 + 60 / d) + 0.001 * seed


def test_the_same_result_as_in_process(engine, curve, tmp_path):
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


def test_trials_run_side_by_side_in_workers_that_load_the_fit_once(engine, tmp_path):
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

    rows = [found for _, found, _ in engine.run(Fit(), [(d, 0, None) for d in range(6)])]
    assert {row["process"] for row in rows}.isdisjoint({os.getpid()})
    assert all(row["loads"] == 1 for row in rows)
    assert len({row["process"] for row in rows}) == 2
    engine.close()
    wait(lambda: ray.available_resources().get("CPU") == 2)  # for whoever comes next


def test_finished_trials_are_kept_when_another_fails(engine, curve, tmp_path):
    def fails(d, seed):
        if d and seed == 2:
            time.sleep(1)
            raise ValueError("out of memory")
        return curve(d, seed)

    with pytest.raises(ValueError, match="out of memory"):
        measure_intrinsic_dimension(fails, DIMS, out=tmp_path, engine=engine)
    rows = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    last = max(row["d"] or 0 for row in rows)
    assert {row["seed"] for row in rows if row["d"] == last} == {0, 1}
    assert measure_intrinsic_dimension(curve, DIMS, out=tmp_path, engine=engine).d is not None


def test_a_trial_whose_worker_dies_is_repeated(engine, curve, tmp_path):
    marker = tmp_path / "died"

    def dies(d, seed):
        if d == DIMS[0] and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return curve(d, seed)

    assert measure_intrinsic_dimension(dies, DIMS, engine=engine).d == measure_intrinsic_dimension(curve, DIMS).d
    assert marker.exists()


def test_a_worker_that_dies_again_and_again(engine):
    other = RayEngine()
    other.worker = ray.remote(max_restarts=0)(_Worker)
    with pytest.raises(RuntimeError, match=r"trial \(None, \d, None\).*died again and again.*--cpus"):
        measure_intrinsic_dimension(lambda d, seed: os.kill(os.getpid(), signal.SIGKILL), DIMS, engine=other)


def test_a_trial_that_fits_nowhere(engine):
    with pytest.raises(ValueError, match=r"cpus=1 and gpus=3 for each trial \(--cpus, --gpus\), but Ray has"):
        RayEngine(gpus=3)


def test_each_trial_an_accelerate_launch_in_ray(engine, tmp_path):
    """Two processes per trial with half the data each, or one worker, under Ray, against one process here."""
    rng = random.Random(0)
    texts = [[rng.choice(["good", "bad", "film", "a", "very"]) for _ in range(6)] for _ in range(64)]
    rows = [{"text": " ".join(words), "label": words.count("good") - words.count("bad") + 0.0} for words in texts]
    data = {"train": write(tmp_path, "train.jsonl", rows[:16]), "eval": write(tmp_path, "eval.jsonl", rows)}
    base = Path(tiny("bert", tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # drawn differently in two processes
    (base / "config.json").write_text(json.dumps({**config, **without}))
    yaml = tmp_path / "more.yaml"
    yaml.write_text("max_steps: 8\nuse_cpu: true\ndataloader_pin_memory: false\n")
    # On CPUs too, `--multi_gpu` is accelerate's name for several processes.
    launch = "accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    launch += " --mixed_precision no --dynamo_backend no"
    found = {}
    for name, more in {
        "launched": ["--engine", "ray", "--launch", launch, "--batch", "8"],
        "there": ["--engine", "ray", "--batch", "16"],
        "here": ["--batch", "16"],
    }.items():
        options = ["--dims", "64,512,2", "--seeds", "1", "--metric", "spearman", "--patience", "2"]
        options += ["--full-learning-rates", "0.001", "--learning-rates", "2e-4", "--config", str(yaml), *more]
        main(command(data, str(base), tmp_path / name, *options))
        report = json.loads((tmp_path / name / "report.json").read_text())
        found[name] = {(row["d"], row["seed"]): row["score"] for row in report["trials"]}
    assert len(list((tmp_path / "launched" / "tokens").iterdir())) == 2
    assert found["there"] == pytest.approx(found["here"], abs=1e-6)
    assert found["launched"] == pytest.approx(found["here"], abs=5e-3)  # ranks of near ties
    assert len({*found["here"].values()}) == 3


def test_launched_processes_end_with_their_run(tmp_path):
    code = f"""
    from peft_intrinsic.text.launch import LaunchedFit, _is_running
    from peft_intrinsic.text.options import TextOptions
    options = TextOptions("none", task="glue/mrpc")
    LaunchedFit(options, "{sys.executable} {tmp_path}/slow.py", {str(tmp_path)!r})(8, 0)
    """
    (tmp_path / "slow.py").write_text(
        textwrap.dedent("""
        import json, os, sys, threading, time
        from pathlib import Path
        from peft_intrinsic.text.launch import _end_with
        threading.Thread(target=_end_with, args=(json.loads(sys.argv[-1])["parent"],), daemon=True).start()
        Path(__file__).with_name("pid").write_text(str(os.getpid()))
        time.sleep(120)
    """)
    )
    run = subprocess.Popen([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], stderr=subprocess.DEVNULL)
    pid = tmp_path / "pid"
    wait(lambda: pid.exists() and pid.read_text())
    run.kill()
    run.wait()
    wait(lambda: not _is_running(int(pid.read_text())))


def wait(for_what, seconds=120):
    start = time.monotonic()
    while not for_what():
        assert time.monotonic() - start < seconds
        time.sleep(0.2)


def test_a_launcher_that_fails(tmp_path):
    with pytest.raises(RuntimeError, match=r"python ended with 1:[\s\S]*never\.jsonl"):
        LaunchedFit(TextOptions("none", train="never.jsonl", eval="never.jsonl"), "python", tmp_path)(8, 0, 0.1)
