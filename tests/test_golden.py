"""Files that commit d665cba wrote, with the options' former names, are read as before."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.golden import OUT, base, logits, measure
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_intrinsic import AdapterBank, IntrinsicConfig
from peft_intrinsic.analysis import frozen_sweep
from peft_intrinsic.bounds import Certificate
from peft_intrinsic.codec import adapter_from_string, adapter_to_string, compress, load_packed, read_packed
from peft_intrinsic.commands import trajectory as command
from peft_intrinsic.measure import analyze
from peft_intrinsic.trajectory import fit_subspace
from peft_intrinsic.trials.store import TRIALS, Store
from peft_intrinsic_cli import main

OUTPUTS = load_file(OUT / "outputs.safetensors")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""Logits of about 1, in float32; kernels of another machine sum in another order."""

BASES = {"new_head": "headless", "whole_head": "headless", "added_bias": "llama"}  # of the others "bert"
ADAPTERS = sorted(path.name for path in (OUT / "adapters").iterdir())
PACKED = sorted(path.stem for path in (OUT / "packed").glob("*.pia") if path.stem in ADAPTERS)

adapters = pytest.mark.parametrize("name", ADAPTERS)
packed = pytest.mark.parametrize("name", PACKED)


def loaded(name: str, folder: Path) -> Any:
    return PeftModel.from_pretrained(base(BASES.get(name, "bert"), folder), str(OUT / "adapters" / name)).eval()


def copied(run: str, folder: Path) -> Path:
    return shutil.copytree(OUT / "trials" / run, folder / run)


def rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of a run, without what differs from process to process."""
    lines = map(json.loads, (folder / TRIALS).read_text().splitlines())
    left_out = ("seconds", "process", "versions", "sum")
    return [{name: value for name, value in row.items() if name not in left_out} for row in lines]


@adapters
def test_an_old_adapter_gives_its_logits(name, tmp_path):
    model = loaded(name, tmp_path)
    torch.testing.assert_close(logits(model), OUTPUTS[name], **CLOSE)
    with model.disable_adapter():
        assert (logits(model) - OUTPUTS[name]).abs().max() > 100 * CLOSE["atol"]


@adapters
def test_an_old_adapter_saved_again_is_the_same(name, tmp_path):
    loaded(name, tmp_path / "base").save_pretrained(tmp_path / "again", save_embedding_layers=False)
    before, after = (
        PeftConfig.from_pretrained(str(folder)) for folder in (OUT / "adapters" / name, tmp_path / "again")
    )
    assert after.checksum == before.checksum is not None
    assert not before.differences(after)
    model = PeftModel.from_pretrained(base(BASES.get(name, "bert"), tmp_path / "base"), str(tmp_path / "again"))
    torch.testing.assert_close(logits(model.eval()), OUTPUTS[name], **CLOSE)


def test_an_old_adapter_joins_a_bank(tmp_path):
    model = loaded("new_head", tmp_path)
    bank = AdapterBank.from_pretrained(model, [str(OUT / "adapters" / "new_head")])
    with bank.select([0, 0]):
        torch.testing.assert_close(logits(model), OUTPUTS["new_head"], **CLOSE)


@packed
def test_an_old_packed_adapter_gives_its_logits(name, tmp_path):
    model = load_packed(base(BASES.get(name, "bert"), tmp_path), OUT / "packed" / f"{name}.pia")
    torch.testing.assert_close(logits(model), OUTPUTS[f"{name}.pia"], **CLOSE)


@packed
def test_an_old_adapter_packs_to_the_same_bytes(name, tmp_path):
    data = (OUT / "packed" / f"{name}.pia").read_bytes()
    assert compress(loaded(name, tmp_path), levels=5) == data
    assert read_packed(data).to_bytes() == data
    text = json.loads((OUT / "packed" / "texts.json").read_text())[name]
    assert (adapter_from_string(text), adapter_to_string(data)) == (data, text)


def test_an_old_certificate_claims_the_same():
    stored = json.loads((OUT / "packed" / "adapter.certificate.json").read_text())["certificate"]
    found = Certificate.from_dict(stored)
    assert found.num_tried == stored["tried"] == 2
    for name, figure in found.to_dict().items():
        if name != "num_tried":
            assert figure == pytest.approx(stored[name], rel=1e-12), name


def test_an_old_recording_has_the_same_subspace(tmp_path):
    fit_subspace(OUT / "recording", 2, out=tmp_path / "subspace.safetensors")
    found, stored = (load_file(path / "subspace.safetensors") for path in (tmp_path, OUT / "adapters" / "trajectory"))
    torch.testing.assert_close(found, stored, **CLOSE)


@pytest.mark.parametrize(
    ("run", "options"), [("score", {"relative_to": "score"}), ("gain", {"relative_to": "gain", "center": "mean"})]
)
def test_an_old_run_resumes_where_it_stopped(run, options, tmp_path):
    """Stopped after 9 of 28 trials, it runs the others and no more; then nothing is left to run."""
    whole, stopped = OUT / "trials" / run, copied(f"{run}_stopped", tmp_path)
    expected = json.loads((whole / "found.json").read_text())
    calls: list[Any] = []
    first = measure(calls, out=stopped, **options)
    assert len(calls) == 28 - 9
    second = measure(calls, out=stopped, **options)
    assert len(calls) == 28 - 9
    assert rows(stopped) == rows(whole)
    for result in (first, second, analyze(stopped)):
        answer = result.answers[options["relative_to"]]
        assert [answer.d, list(answer.interval), answer.target] == [
            expected["answer"][name] for name in ("d", "interval", "target")
        ]
    assert first.stopped == expected["stopped"]


@pytest.mark.parametrize("run", ["text", "study"])
def test_an_old_run_on_text_is_analyzed(run, tmp_path):
    result = analyze(copied(run, tmp_path))
    expected = json.loads((OUT / "trials" / run / "found.json").read_text())
    assert result.relative_to == "gain"
    assert [result.d, list(result.interval), result.target] == [
        expected["answer"][name] for name in ("d", "interval", "target")
    ]
    assert result.baseline.scores == expected["baseline"]["scores"]
    assert all(math.isfinite(row["score"]) for row in result.trials)


def test_an_old_sweep_of_frozen_layers_runs_nothing_again(tmp_path):
    def fit(names: list[str], seed: int) -> float:
        raise AssertionError("this trial is stored")

    found = frozen_sweep(fit, ["a", "b", "c"], copied("frozen", tmp_path), seeds=1)
    assert found == {k: [0.5 + k / 8] for k in range(4)}


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (
            "transfer",
            ["--source-task", "run/one", "--modules-to-save", "classifier", "--eval", "e.csv", "run/one", "run/two"],
        ),
        ("outliers", ["--eval", "e.csv", "some/adapter"]),
    ],
)
def test_an_old_run_of_a_command_has_its_rows(action, words, tmp_path, monkeypatch):
    found: list[Any] = []
    monkeypatch.setattr(command, action, found.append)
    main(["trajectory", action, "--model", "some/model", "--train", "t.csv", "-o", "out", *words])
    with Store(copied(action, tmp_path), command._build_settings(found[0])) as store:
        assert store.rows[store.key({"run": "zero-shot"})]["accuracy"] == 0.5


def test_users_pass_the_present_names_alone():
    with pytest.raises(TypeError, match=r"unexpected keyword.*redrawn"):
        IntrinsicConfig(redrawn=[])
    with pytest.raises(ValueError, match="Target modules vectors not found"):
        get_peft_model(base("bert", Path()), IntrinsicConfig(target_modules="vectors"))
