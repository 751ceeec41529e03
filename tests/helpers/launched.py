"""A training run for `torchrun`: the losses go to FOLDER/losses.json, the adapter to FOLDER/adapter.

    python launched.py KIND FOLDER OPTIONS    OPTIONS of IntrinsicConfig, as JSON
    KIND: plain, reentrant, fsdp2, bank, sharded_bank

With the last two, four rows of an adapter bank are trained instead, and saved as the bank.
accelerate shards on accelerators alone, so FSDP2 is torch's own call, in its processes.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import build
from peft import get_peft_model

from peft_intrinsic import AdapterBank, IntrinsicConfig, RowAdam


def sharded(model: nn.Module) -> Any:
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for module in model.modules():
        if isinstance(module, LlamaDecoderLayer):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train_bank(folder: Path, options: dict[str, Any], shard: bool) -> None:
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
    bank = AdapterBank(get_peft_model(build("llama"), IntrinsicConfig(**options)).train(), 4)
    if shard:
        sharded(bank.model)
        assert all(isinstance(p, DTensor) for p in bank.model.parameters())
    model = accelerator.prepare(bank)
    optimizer = RowAdam(bank.parameters(), 1e-3)
    ids = torch.randint(1, 90, (8, 7), generator=torch.Generator().manual_seed(5))
    rows = [{"input_ids": row, "labels": row, "adapter_index": i % 3} for i, row in enumerate(ids)] * 4
    losses = []
    for batch in accelerator.prepare(DataLoader(rows, batch_size=8, shuffle=False)):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach().reshape(1)).mean().item())
    if accelerator.is_main_process:
        found = {"losses": losses, "processes": accelerator.num_processes, "model": type(model).__name__}
        (folder / "losses.json").write_text(json.dumps(found))
        bank.save_pretrained(folder / "bank")
        bank.save_adapter(1, folder / "row")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def main(kind: str, folder: Path, options: dict[str, Any]) -> None:
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
    peft_model = get_peft_model(build("llama"), IntrinsicConfig(task_type="CAUSAL_LM", **options))
    if kind == "reentrant":
        peft_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    peft_model.train()
    shard = kind == "fsdp2"
    model = sharded(peft_model) if shard else accelerator.prepare(peft_model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-4)
    ids = torch.randint(1, 90, (8, 7), generator=torch.Generator().manual_seed(5)).repeat(8, 1)
    loader = accelerator.prepare(DataLoader(ids, batch_size=8, shuffle=False))
    losses = []
    for batch in loader:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach().reshape(1)).mean().item())
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=whole) if shard else accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        found = {"losses": losses, "processes": accelerator.num_processes, "model": type(model).__name__}
        (folder / "losses.json").write_text(json.dumps(found))
        peft_model.save_pretrained(folder / "adapter", state_dict=state)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(180, exit=True)  # prints where it hangs
    kind, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    if kind.endswith("bank"):
        train_bank(folder, options, kind == "sharded_bank")
    else:
        main(kind, folder, options)
