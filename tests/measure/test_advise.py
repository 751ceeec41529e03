"""Advice on the LoRA rank and on d: fit and interval beside independent ones, resuming, report, and LoRA by rank."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build
from helpers.texts import QUICK, command
from peft import get_peft_model
from scipy.stats import t as student
from sklearn.isotonic import IsotonicRegression
from test_documents import tiny

from peft_intrinsic.measure import analyze
from peft_intrinsic.measure.advise import advise
from peft_intrinsic.measure.evidence import TUNING
from peft_intrinsic.text import TextFit
from peft_intrinsic.text.methods import build_config, count_trained
from peft_intrinsic.text.options import TextOptions
from peft_intrinsic_cli import main

RANKS = [1, 2, 4, 8, 16, 32]
FULL = [0.96, 0.98, 1.0]
WIDTH = 24  # of the tiny model, with two layers and three labels


@pytest.fixture
def options(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny("bert", tmp_path / "base")
    (tmp_path / "more.yaml").write_text("max_steps: 120\nuse_cpu: true\ndataloader_pin_memory: false\n")
    fixed = ["--ranks", ",".join(map(str, RANKS)), "--dims", "16,512,6", "--baseline-seeds", "3", "--seeds", "3"]
    return ["advise", *command(data, "base", tmp_path / "out", "--config", "more.yaml", *fixed)[1:]]


def score_exactly(method: str, d: int | None, seed: int) -> float:
    """0.7 at rank 1 and 0.05 more for twice the rank; for d, as much from d = 16 on."""
    if d is None:
        return FULL[seed] if seed < 3 else 0.98
    return 0.7 + 0.05 * math.log2(d if method == "lora-rank" else d / 16)


def score_noisily(method: str, d: int | None, seed: int) -> float:
    """Scores that fall once: 0.86 at rank 4, 0.79 at rank 8."""
    noise = np.random.default_rng([0 if d is None else d, seed]).normal(0, 0.005)
    step = 0 if d is None else round(math.log2(d if method == "lora-rank" else d / 16))
    return min(score_exactly(method, d, 1) + {2: 0.06, 3: -0.06}.get(step, 0.0) + noise, 1.0)


@pytest.fixture
def scores(monkeypatch):
    """Trials have given scores instead of training. Returns the function that chooses them, and the trials."""
    trials: list[tuple] = []

    def use(score):
        def fit(self, d, seed, learning_rate):
            trials.append((self.options.method, d, seed, learning_rate))
            return {"score": score(self.options.method, d, seed)}

        monkeypatch.setattr(TextFit, "__call__", fit)
        return trials

    return use


def find_first(values: dict[int, float], grid: list[int], target: float) -> int | None:
    """The first of a grid at which scores, linear in the logarithm between measured values, reach a target."""
    measured = sorted(values)
    for at in grid:
        if at in values:
            score = values[at]
        elif measured[0] < at < measured[-1]:
            below, above = max(d for d in measured if d < at), min(d for d in measured if d > at)
            part = math.log(at / below) / math.log(above / below)
            score = (1 - part) * values[below] + part * values[above]
        else:
            continue
        if score >= target - 1e-9:
            return at
    return None


def test_interval_of_exact_scores_is_that_of_full_fine_tuning(options, scores):
    """Scores without noise leave Student's t of the median of three runs of full fine-tuning."""
    scores(score_exactly)
    main(options)
    advice = json.loads(Path("out/advice.json").read_text())
    half = 0.9 * 1.16 * np.std(FULL, ddof=1) / math.sqrt(3) * student.ppf((1 + 0.93) / 2, 2)
    target = 0.9 * 0.98
    exact = {rank: score_exactly("lora-rank", rank, 0) for rank in RANKS}
    assert advice["target"] == pytest.approx(target)
    assert advice["rank"]["value"] == find_first(exact, RANKS, target) == 16
    assert advice["rank"]["interval"] == [find_first(exact, RANKS, target + end) for end in (-half, half)] == [8, 32]
    dims = analyze("out/d").dims
    assert dims == (16, 512, 6)
    assert (advice["d"]["value"], advice["d"]["interval"]) == (256, [128, 512])


def test_advice_is_the_crossing_of_an_isotonic_fit(options, scores):
    scores(score_noisily)
    main([*options, "--sweep", "--target", "0.85"])
    advice = json.loads(Path("out/advice.json").read_text())
    for name in ("rank", "d"):
        rows = [json.loads(line) for line in Path("out", name, "trials.jsonl").read_text().splitlines()]
        groups: dict = {}
        for row in rows:
            if row["seed"] != TUNING and row["score"] > 2 / 3:  # others collapsed to the majority class
                groups.setdefault(row["d"], []).append(row["score"])
        target = 0.85 * float(np.median(groups.pop(None)))
        grid = sorted({row["d"] for row in rows if row["d"]})
        levels, weights = zip(*((np.median(groups[d]), len(groups[d])) for d in sorted(groups)), strict=True)
        assert list(levels) != sorted(levels)
        fit = IsotonicRegression().fit(range(len(levels)), levels, weights).predict(range(len(levels)))
        fitted = dict(zip(sorted(groups), fit, strict=True))
        assert advice["target"] == pytest.approx(target)
        assert advice[name]["value"] == find_first(fitted, grid, target)
        assert advice[name]["value"] > find_first(dict(zip(sorted(groups), levels, strict=True)), grid, target)
        low, high = advice[name]["interval"]
        assert low <= advice[name]["value"] <= (high or math.inf)


def test_full_fine_tuning_runs_once_and_the_same_command_resumes(options, scores, capsys):
    trials = scores(score_noisily)
    main([*options, "--learning-rates", "auto", "--full-learning-rates", "auto", "--baseline-seeds", "4"])
    assert len(set(trials)) == len(trials)
    full = [(seed, rate) for _, d, seed, rate in trials if d is None]
    assert len(set(full)) == len(full)
    assert {method for method, d, _, _ in trials if d is None} == {"lora-rank"}
    tuned = {method: {d for own, d, seed, _ in trials if own == method and seed == TUNING} for method, *_ in trials}
    assert {None, 1} <= tuned["lora-rank"]  # learning rates are tried for both, by the same rule
    assert {16} <= tuned["default"]
    advice, shown = Path("out/advice.json").read_text(), capsys.readouterr().out
    assert json.loads(advice)["cost"]["trials"] == len(trials)
    again = len(trials)
    main([*options, "--learning-rates", "auto", "--full-learning-rates", "auto", "--baseline-seeds", "4"])
    assert len(trials) == again
    assert Path("out/advice.json").read_text() == advice
    assert capsys.readouterr().out == shown
    both = [analyze(Path("out", name)) for name in ("rank", "d")]
    assert both[0].target == both[1].target == pytest.approx(json.loads(advice)["target"])


def test_report_says_what_was_chosen_and_what_it_cost(options, scores, capsys):
    scores(score_exactly)
    main(options)
    out = capsys.readouterr().out
    layers = 2 * 2 * 16 * (WIDTH + WIDTH)  # rank 16, queries and values of two layers
    size = layers + 2 * WIDTH + 2  # and the head for two labels
    goal = "reaches 0.9 of the score of full fine-tuning is"
    assert f"The smallest LoRA rank that {goal} 16 (90 % interval [8, 32]), with {size} trainable parameters." in out
    assert f"The smallest d of IntrinsicConfig that {goal} 256 (90 % interval [128, 512]), with 256 trainable" in out
    assert "full fine-tuning scores 0.9800 (median of 3 seeds), the target is 0.8820 (0.9 of the score)." in out
    assert Path("out/advice.md").read_text() in out
    advice = json.loads(Path("out/advice.json").read_text())
    assert (advice["full"], advice["full_scores"], advice["share"]) == (0.98, FULL, 0.9)
    assert advice["rank"]["parameters"] == size
    stored = {line for name in ("rank", "d") for line in Path("out", name, "trials.jsonl").read_text().splitlines()}
    keys = {(row["d"], row["seed"], row["learning_rate"], row["score"]) for row in map(json.loads, stored)}
    assert advice["cost"]["trials"] == len(keys)


def test_targets_outside_of_the_measured_sizes_are_reported_as_such(options, scores, capsys):
    scores(lambda method, d, seed: 0.98 if d is None else 0.7 if method == "lora-rank" else 0.97)
    main(options)
    out = capsys.readouterr().out
    assert "No measured LoRA rank up to 32 reaches 0.9 of the score of full fine-tuning" in out
    assert "Try larger ones (--ranks)." in out
    assert "is 16 (90 % interval [≤ 16, ≤ 16]), with 16 trainable parameters. No smaller d was measured." in out
    advice = json.loads(Path("out/advice.json").read_text())
    assert (advice["rank"]["value"], advice["rank"]["parameters"], advice["d"]["value"]) == (None, None, 16)
    scores(lambda method, d, seed: 0.98 if d is None else 0.7 if method == "default" else 0.97)
    main([*options, "--overwrite"])
    assert "No measured d of IntrinsicConfig up to 512 reaches 0.9" in (out := capsys.readouterr().out)
    assert "Try larger ones (--dims)." in out
    main([*options, "--overwrite", "--trials", "6"])
    out = capsys.readouterr().out
    assert re.search(r"No measured d of IntrinsicConfig up to (16|32|64|128) reaches", out)
    assert "Larger ones need more trials (--trials, --minutes)." in out


def test_dry_run_prints_both_plans_and_trains_nothing(options, scores, capsys):
    trials = scores(score_exactly)
    main([*options, "--dry-run", "--minutes", "10"])
    out = capsys.readouterr().out
    assert "base by lora-rank" in out
    assert "grid: 6 dimensions from 1 to 32" in out
    assert "base by default" in out
    assert out.count("5 minutes") == 2
    assert not trials
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--ranks", "4,2"), "ranks=[4, 2] (--ranks) must be ascending whole numbers from 1 on, at least two."),
        (("--ranks", "0,2"), "(--ranks) must be ascending"),
        (("--ranks", "4"), "(--ranks) must be ascending"),
        (("--ranks", "1,x"), "'1,x' is not whole numbers"),
        (("--target", "1.5"), "target must lie in (0, 1], got 1.5"),
        (("--dims", "16,9999999,6"), "fewer than 9999999"),
    ],
)
def test_bad_options_raise_before_training(options, scores, capsys, more, message):
    trials = scores(score_exactly)
    with pytest.raises(SystemExit, match="2"):
        main([*options, *more])
    assert message in capsys.readouterr().err
    assert not trials


def test_a_folder_of_other_settings_raises_before_the_first_measurement_trains(options, scores, capsys):
    trials = scores(score_exactly)
    main(options)
    count = len(trials)
    shutil.rmtree("out/rank")
    with pytest.raises(SystemExit, match="2"):
        main([*options, "--epochs", "9"])
    assert "num_train_epochs" in capsys.readouterr().err
    assert len(trials) == count


def test_lora_by_rank_trains_the_head_as_peft_does():
    base = build("bert")
    model = get_peft_model(base, build_config("lora-rank", 3, 0, base, "SEQ_CLS"))
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition("lora_")[0].rpartition("self.")[2] for name in names if "lora_" in name} == {
        "query.",
        "value.",
    }
    assert {name for name in names if "lora_" not in name} == {
        f"base_model.model.classifier.modules_to_save.default.{kind}" for kind in ("weight", "bias")
    }
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == 3 * 2 * 2 * 2 * WIDTH + 3 * WIDTH + 3
    meta = build("bert").to("meta")
    assert count_trained(build_config("lora-rank", 3, 0, meta, "SEQ_CLS"), meta) == trained


@pytest.mark.slow
def test_a_trial_of_lora_by_rank_leaves_base_and_head_unchanged(data, tmp_path):
    base = tiny("bert", tmp_path / "base")
    fit = TextFit(TextOptions(base, **data, arguments={**QUICK, "max_steps": 20}, method="lora-rank"))
    before = {name: value.clone() for name, value in fit.base.state_dict().items()}
    first = fit(2, 0, 1e-2)
    assert fit.base.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in fit.base.state_dict().items())
    assert fit(2, 0, 1e-2) == first


@pytest.mark.slow
def test_advice_on_a_task_that_is_learned(options):
    few = ["--seeds", "1", "--baseline-seeds", "1", "--ranks", "1,8", "--dims", "256,512,2"]
    main([*options, "--learning-rates", "1e-2", *few])
    advice = json.loads(Path("out/advice.json").read_text())
    assert advice["full"] == pytest.approx(1)
    assert advice["rank"]["value"] in (1, 8)
    assert Path("out/rank/curve.png").exists()
    assert Path("out/d/report.md").exists()


def test_given_scores_of_full_fine_tuning_replace_its_trials(options, scores, data, tmp_path):
    trials = scores(score_exactly)
    plan = {"dims": [16, 32, 64, 128, 256, 512], "learning_rates": ((1e-4,), (2e-4,)), "baseline": FULL}
    settings = {"model": str(tmp_path / "base"), **data, "arguments": {**QUICK, "max_steps": 20}}
    advice = advise(settings, RANKS, tmp_path / "given", plan)
    assert not [d for _, d, _, _ in trials if d is None]
    assert (advice.results["rank"].d, advice.results["d"].d) == (16, 256)
