"""Recordings: contents of snapshots, resuming, gradients, and errors."""

from __future__ import annotations

import pytest
import torch
from conftest import batch, build
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_intrinsic.trajectory import TrajectoryCallback, record, record_gradients, snapshots
from peft_intrinsic.trajectory.record import START, parameters_of


def perturb(model, size: float = 1e-3, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))


def blocks(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if any(f".{i}." in n for i in range(9))}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_a_snapshot_holds_the_change_since_the_start(tmp_path, family):
    model = build(family)
    start = blocks(model)
    record(model, tmp_path, 0)
    perturb(model)
    record(model, tmp_path, 5)
    record(model, tmp_path, 70, dtype=torch.float32)
    files = snapshots(tmp_path)
    assert [path.name for path in files] == ["snapshot-00000005.safetensors", "snapshot-00000070.safetensors"]
    for path, dtype, tolerance in zip(files, (torch.float16, torch.float32), (2e-6, 1e-9), strict=True):
        found = load_file(path)
        assert set(found) == set(start)
        for name, end in blocks(model).items():
            assert found[name].dtype == dtype
            assert torch.allclose(found[name].double(), (end - start[name]).double(), rtol=0, atol=tolerance), name


def test_parameters_are_selected_by_a_regular_expression(tmp_path):
    model = build("bert")
    record(model, tmp_path, 0, parameters=r".*(query\.weight|classifier\..*)")
    perturb(model)
    record(model, tmp_path, 1)
    names = set(load_file(snapshots(tmp_path)[0]))
    assert names == {n for n in dict(model.named_parameters()) if "query.weight" in n or n.startswith("classifier.")}
    with pytest.raises(ValueError, match=r"parameters='nothing' matches none"):
        record(model, tmp_path / "other", 0, parameters="nothing")


def test_tied_parameters_are_recorded_once():
    model = build("custom")
    for pattern in (r"(embed|out)\..*", r"out\..*"):
        assert list(parameters_of(model, pattern)) == ["embed.weight"]


def test_a_tied_output_layer_is_recorded_at_every_step(tmp_path):
    model = build("llama")
    record(model, tmp_path, 0, parameters=r"(lm_head|model\.layers\.0)\..*")
    perturb(model)
    record(model, tmp_path, 1)
    assert "model.embed_tokens.weight" in load_file(snapshots(tmp_path)[0])


def test_gradients_are_recorded_as_snapshots_and_the_model_is_unchanged(tmp_path):
    model = build("bert")
    inputs = batch("bert")
    labels = [torch.tensor([0, 1, 2, i]) for i in range(2)]
    record_gradients(model, tmp_path, labels, lambda m, y: m(**inputs, labels=y).loss)
    assert all(p.grad is None for p in model.parameters())
    model(**inputs, labels=labels[1]).loss.backward()
    found = load_file(snapshots(tmp_path)[1])
    for name, p in parameters_of(model).items():
        assert torch.allclose(found[name].float(), p.grad, rtol=2**-8, atol=0), name
    with pytest.raises(ValueError, match="holds 2 snapshots"):
        record_gradients(model, tmp_path, labels, lambda m, y: m(**inputs, labels=y).loss)


def test_a_missing_start_another_model_and_values_that_are_not_finite_raise_errors(tmp_path):
    model = build("bert")
    with pytest.raises(ValueError, match="has no start"):
        record(model, tmp_path, 3)
    record(model, tmp_path, 0)
    with pytest.raises(ValueError, match="started with another model"):
        record(build("gpt2"), tmp_path, 1)
    perturb(model, 1e6)
    with pytest.raises(ValueError, match=r"is not finite at step 1.*float32"):
        record(model, tmp_path, 1)
    assert snapshots(tmp_path) == []
    record(model, tmp_path, 1, dtype=torch.float32)
    with torch.no_grad():
        next(iter(parameters_of(model).values())).fill_(torch.nan)
    with pytest.raises(ValueError, match="is not finite at step 2"):
        record(model, tmp_path, 2, dtype=torch.float32)
    with pytest.raises(ValueError, match="no gradient"):
        record(model, tmp_path, 2, gradients=True)
    for every in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"every={every} is no positive integer"):
            TrajectoryCallback(tmp_path, every=every)


class Stop(Exception):
    """An interruption."""


def trainer(folder, callback, interrupted: int | None = None, **options) -> Trainer:
    """Full fine-tuning of a tiny model with a checkpoint every two steps. `interrupted` raises `Stop` at that step."""
    rows = [{"input_ids": [3 + i % 7, 4, 5], "labels": i % 3} for i in range(24)]
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        save_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{"max_steps": 6, **options},
    )
    data = Dataset.from_list(rows)
    result = Trainer(build("bert"), arguments, train_dataset=data, eval_dataset=data, callbacks=[callback])
    if interrupted:
        step = result.training_step

        def training_step(*args, **kwargs):
            if result.state.global_step == interrupted:
                raise Stop
            return step(*args, **kwargs)

        result.training_step = training_step
    return result


@pytest.mark.parametrize(
    ("options", "every", "steps"),
    [({}, 2, [2, 4, 6]), ({}, 4, [4, 6]), ({"max_steps": -1, "num_train_epochs": 2}, None, [6, 12])],
)
def test_the_callback_records_every_few_steps_or_every_epoch(tmp_path, options, every, steps):
    run = trainer(tmp_path / "run", TrajectoryCallback(tmp_path / "recording", every), **options)
    start = blocks(run.model)
    run.train()
    files = snapshots(tmp_path / "recording")
    assert [int(path.stem[-8:]) for path in files] == steps
    last = load_file(files[-1])
    for name, end in blocks(run.model).items():
        assert torch.allclose(last[name].float(), end - start[name], rtol=0, atol=1e-5), name


def test_an_interrupted_recording_resumes_with_the_run(tmp_path):
    trainer(tmp_path / "whole", TrajectoryCallback(tmp_path / "a", 1)).train()
    with pytest.raises(Stop):
        trainer(tmp_path / "cut", TrajectoryCallback(tmp_path / "b", 1), interrupted=5).train()
    assert len(snapshots(tmp_path / "b")) == 5  # the last one is after the checkpoint
    trainer(tmp_path / "cut", TrajectoryCallback(tmp_path / "b", 1)).train(resume_from_checkpoint=True)
    for one, other in zip(snapshots(tmp_path / "a"), snapshots(tmp_path / "b"), strict=True):
        assert one.name == other.name
        a, b = load_file(one), load_file(other)
        assert all(torch.allclose(a[name].float(), b[name].float(), rtol=0, atol=1e-5) for name in a)


def test_another_run_in_the_same_folder_raises_an_error(tmp_path):
    trainer(tmp_path / "run", TrajectoryCallback(tmp_path / "a", 2)).train()
    with pytest.raises(ValueError, match="holds 3 snapshots of a run, up to step 6"):
        trainer(tmp_path / "again", TrajectoryCallback(tmp_path / "a", 2)).train()
    with pytest.raises(ValueError, match="resumes at step 6"):
        trainer(tmp_path / "run", TrajectoryCallback(tmp_path / "b", 2), max_steps=8).train(resume_from_checkpoint=True)
    assert len(snapshots(tmp_path / "a")) == 3
    with pytest.raises(ValueError, match="holds 3 snapshots"):
        record(build("bert"), tmp_path / "a", 0)


def test_snapshots_after_the_checkpoint_are_deleted_when_the_run_resumes(tmp_path):
    with pytest.raises(Stop):
        trainer(tmp_path / "cut", TrajectoryCallback(tmp_path / "a", 1), interrupted=5).train()
    trainer(tmp_path / "cut", TrajectoryCallback(tmp_path / "a", 3)).train(resume_from_checkpoint=True)
    assert [int(path.stem[-8:]) for path in snapshots(tmp_path / "a")] == [1, 2, 3, 4, 6]


class Last(TrainerCallback):
    """The parameters after the last step."""

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        self.found = blocks(model)


def test_the_last_snapshot_is_of_the_last_step_not_of_the_best_model(tmp_path):
    """Trainer loads the best model when training ends."""
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    run = trainer(
        tmp_path / "run",
        TrajectoryCallback(tmp_path / "a", 4),
        metric_for_best_model="eval_x",
        save_total_limit=1,
        **best,
    )
    falling = iter([2.0, 1.0, 0.0])
    run.compute_metrics = lambda prediction: {"x": next(falling)}
    last = Last()
    run.add_callback(last)
    run.train()
    assert run.state.best_global_step == 2
    found, start = load_file(snapshots(tmp_path / "a")[-1]), blocks(build("bert"))
    for name, value in found.items():
        assert torch.allclose(value.float(), last.found[name] - start[name], rtol=0, atol=1e-5), name


def test_the_start_has_the_dtype_of_the_model_and_a_digest_that_does_not_depend_on_it(tmp_path):
    model = build("bert").to(torch.bfloat16)
    record(model, tmp_path / "a", 0)
    record(build("bert"), tmp_path / "b", 0)
    with safe_open(tmp_path / "a" / START, "pt") as a, safe_open(tmp_path / "b" / START, "pt") as b:
        assert a.metadata()["base"] == b.metadata()["base"]
        assert {a.get_tensor(name).dtype for name in a.keys()} == {torch.bfloat16}  # noqa: SIM118
        assert {b.get_tensor(name).dtype for name in b.keys()} == {torch.float32}  # noqa: SIM118
