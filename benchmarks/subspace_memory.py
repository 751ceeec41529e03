"""Peak memory of `fit_subspace`, relative to the size of the model.

    python benchmarks/subspace_memory.py [--model FOLDER] [--snapshots 32] [--dim 32] [--scratch FOLDER]

Without --model, a random encoder of BERT-base's shape is used. The snapshots are steps of a random walk. Prints the
peak memory of the fitting process above its start, relative to the model's size in float32.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModel, BertConfig, BertModel

from peft_intrinsic.trajectory import fit_subspace, record


def record_walk(model: Any, folder: Path, count: int) -> None:
    """Record a random walk."""
    record(model, folder, 0)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, count + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-3 / step * torch.randn(parameter.shape, generator=generator))
        record(model, folder, step)


def fit(folder: Path, dim: int, queue: Any) -> None:
    """Fit in its own process, which puts "ready" and "done" into the queue."""
    torch.set_num_threads(1)
    queue.put("ready")
    fit_subspace(folder, dim, out=folder / "subspace.safetensors")
    queue.put("done")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--snapshots", type=int, default=32)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--scratch", type=Path, default=Path("runs/subspace_memory"))
    args = parser.parse_args()
    model = AutoModel.from_pretrained(args.model) if args.model else BertModel(BertConfig())
    size = 4 * model.num_parameters()
    record_walk(model, args.scratch, args.snapshots)
    del model
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=fit, args=(args.scratch, args.dim, queue))
    process.start()
    queue.get()
    watched = psutil.Process(process.pid)
    before = highest = watched.memory_info().rss
    while queue.empty():
        highest = max(highest, watched.memory_info().rss)
        time.sleep(0.01)
    process.join()
    file = (args.scratch / "subspace.safetensors").stat().st_size
    print(f"model {size / 2**20:.0f} MiB in float32, {args.snapshots} snapshots, dim {args.dim}")
    print(f"subspace file {file / 2**20:.0f} MiB")
    print(f"peak {(highest - before) / 2**20:.0f} MiB above the start: {(highest - before) / size:.2f} x the model")
    shutil.rmtree(args.scratch)


if __name__ == "__main__":
    main()
