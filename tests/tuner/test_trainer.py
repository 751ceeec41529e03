"""Trainer end to end: train, checkpoint, resume, reload, merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import build
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from peft_intrinsic import IntrinsicConfig


class Parity(Dataset):
    """Sequences whose label is the class of their first token."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(1, 90, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids[0] % 3}


def trainer(folder: Path, steps: int, said: bool, **options) -> Trainer:
    model = get_peft_model(build("bert"), IntrinsicConfig(d=40, said=said, task_type="SEQ_CLS", target_modules="all"))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=4,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        per_device_train_batch_size=8,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=3,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=Parity(), eval_dataset=Parity())


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.stack([Parity()[i]["input_ids"] for i in range(8)])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.slow
@pytest.mark.parametrize("said", [False, True])
def test_trainer_trains_resumes_reloads_and_merges(tmp_path, said):
    whole = trainer(tmp_path / "whole", 8, said)
    start = logits(whole.model)
    whole.train()
    assert not torch.allclose(logits(whole.model), start, atol=1e-3)

    half = trainer(tmp_path / "half", 4, said)
    half.train()
    resumed = trainer(tmp_path / "half", 8, said)
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-4"))
    expected = logits(whole.model)
    torch.testing.assert_close(logits(resumed.model), expected, rtol=1e-5, atol=1e-6)

    checkpoint = tmp_path / "whole" / "checkpoint-8"
    assert sum(t.numel() for t in load_file(checkpoint / "adapter_model.safetensors").values()) == 40
    reloaded = PeftModel.from_pretrained(build("bert"), checkpoint)
    torch.testing.assert_close(logits(reloaded), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logits(reloaded.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def test_load_best_model_at_end_restores_the_best_checkpoint(tmp_path):
    """The second of three checkpoints is the best, because the metric says so."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    run = trainer(tmp_path, 12, False, eval_strategy="steps", eval_steps=4, **best)
    scores = iter([1.0, 3.0, 2.0])
    run.compute_metrics = lambda _: {"score": next(scores)}
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-8")
    saved = {step: load_file(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (4, 8, 12)}
    found = get_peft_model_state_dict(run.model)
    assert found.keys() == saved[8].keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, saved[8][name])
        assert not any(torch.equal(tensor, saved[step][name]) for step in (4, 12))
