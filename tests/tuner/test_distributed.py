"""Two processes of `torchrun`, with Accelerate, against one, and setups that raise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import batch, build, output, train, trained
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from peft_intrinsic import AdapterBank, IntrinsicConfig, RowAdam

SCRIPT = Path(__file__).parents[1] / "helpers" / "launched.py"
HUNG = "Timeout (0:03:00)!"
ALL = {"d": 60, "said": True, "target_modules": "all"}
LINEAR = {"d": 60, "target_modules": "all-linear"}
VALUES = {"d": 20, "projection": "value_bias"}
IDS = torch.randint(1, 90, (8, 7), generator=torch.Generator().manual_seed(5))


def launch(kind: str, folder: Path, settings: dict) -> subprocess.CompletedProcess:
    # Standalone: the launcher keeps the free port that it finds. `accelerate launch --main_process_port 0` lets it go
    # first, and another program may take it.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = {"capture_output": True, "text": True, "check": False, "env": environment}
    done = subprocess.run([*command, str(SCRIPT), kind, str(folder), json.dumps(settings)], **options)
    if HUNG in done.stderr:  # the sockets', once in some hundred launches; others occur again
        done = subprocess.run([*command, str(SCRIPT), kind, str(folder), json.dumps(settings)], **options)
    return done


def train_in_one_process(settings: dict) -> tuple[list[float], PeftModel]:
    """The same training without any of that."""
    model = get_peft_model(build("llama"), IntrinsicConfig(task_type="CAUSAL_LM", **settings))
    model.train()
    losses = train(model, {"input_ids": IDS, "labels": IDS}, 8, 4e-4)
    return losses, model.eval()


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "drop"), [(ALL, 0.1), (VALUES, 0.005)], ids=["said", "value_bias"])
@pytest.mark.parametrize(
    ("kind", "wrapped"), [("plain", "DistributedDataParallel"), ("fsdp2", "FSDPPeftModelForCausalLM")]
)
def test_two_processes_learn_the_same_as_one(kind, wrapped, settings, drop, tmp_path):
    done = launch(kind, tmp_path, settings)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "losses.json").read_text())
    losses, model = train_in_one_process(settings)
    assert (found["processes"], found["model"]) == (2, wrapped)
    assert losses[-1] < losses[0] - drop
    assert found["losses"] == pytest.approx(losses, abs=1e-4)
    assert sum(t.numel() for t in load_file(tmp_path / "adapter/adapter_model.safetensors").values()) == settings["d"]
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "settings"), [("bank", LINEAR), ("sharded_bank", ALL)])
def test_a_bank_learns_the_same_in_two_processes(kind, settings, tmp_path):
    """Each process has other rows in its half of the batch, and the gradients are sparse. FSDP 2 shards the model."""
    done = launch(kind, tmp_path, settings)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "losses.json").read_text())
    bank = AdapterBank(get_peft_model(build("llama"), IntrinsicConfig(**settings)).train(), 4)
    optimizer, losses, unused = RowAdam(bank.parameters(), 1e-3), [], bank.vectors[3].clone()
    for _ in range(4):
        loss = bank(input_ids=IDS, labels=IDS, adapter_index=[0, 1, 2, 0, 1, 2, 0, 1]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert (found["processes"], found["model"]) == (2, "DistributedDataParallel")
    assert found["losses"] == pytest.approx(losses, abs=1e-4)
    loaded = AdapterBank.from_pretrained(build("llama"), tmp_path / "bank")
    trained = bank.vectors.detach()
    assert (loaded.vectors - trained).norm() < 0.05 * trained.norm()  # Adam enlarges rounding
    assert torch.equal(loaded.vectors[3], unused)
    row = AdapterBank.from_pretrained(loaded.model, [str(tmp_path / "row")])
    assert torch.equal(row.vectors, loaded.vectors[1:2])


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")  # with one process
@pytest.mark.parametrize("shard", [fully_shard, partial(FullyShardedDataParallel, device_id=torch.device("cpu"))])
def test_a_bank_in_training_whose_rows_are_sharded_raises(shard, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        torch.distributed.init_device_mesh("cpu", (1,))
        bank = AdapterBank(get_peft_model(build("bert"), IntrinsicConfig(**LINEAR)).train(), 4)
        with pytest.raises(RuntimeError, match=r"sparse gradients. Call fully_shard\(bank.model\) instead"):
            shard(bank)(adapter_index=[0, 1, 2, 0], **batch("bert"))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_reentrant_checkpointing_raises(tmp_path):
    done = launch("reentrant", tmp_path, ALL)
    assert done.returncode != 0
    assert "Reentrant gradient checkpointing in several processes, or" in done.stderr
    assert not (tmp_path / "losses.json").exists()


def test_zero_3_raises():
    """DeepSpeed marks the parameters that it splits."""
    model = trained("bert")
    for parameter in model.parameters():
        parameter.ds_id = 0
    with pytest.raises(RuntimeError, match=r"ZeRO-3.*ZeRO-2, DDP or FSDP2"):
        output(model, batch("bert"))


FSDP_1 = """
import sys, torch
sys.path[:0] = [{tests!r}]
from conftest import batch, evaluate, output, trained
from torch.distributed.fsdp import FullyShardedDataParallel
torch.distributed.init_process_group("gloo", init_method="file://{folder}/meet", rank=0, world_size=1)
model = trained({name!r}, **{options!r})
expected = evaluate(model, {name!r})
theta = model.get_base_model().intrinsic.intrinsic_theta["default"].weight
output(model, batch({name!r})).square().sum().backward()
gradient = theta.grad.clone()
theta.grad = None
wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
for _ in range(2):  # what FSDP takes for a changed parameter it writes back
    torch.testing.assert_close(evaluate(wrapped, {name!r}), expected)
output(wrapped, batch({name!r})).square().sum().backward()
torch.testing.assert_close(theta.grad, gradient)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [("vit", {}), ("bert", {}), ("llama", VALUES)])
def test_fsdp_1_reads_its_own_parameters(name, options, tmp_path):
    code = FSDP_1.format(tests=str(Path(__file__).parents[1]), folder=tmp_path, name=name, options=options)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
