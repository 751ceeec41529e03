"""Bytes per task of full fine-tuning and of saved adapters, and the time of a training step.

    python benchmarks/storage.py [--model FOLDER]

The model is all-MiniLM-L6-v2 with a head of two classes. Bytes are those of the safetensors files, without
configurations; parameters are in float32. `layers 0 and 5` freezes all other layers and stores only what it trains. The
supermask has 3 % zeros. The packed adapter is `peft_intrinsic.codec.compress(model, 8)`. A step is forward, backward
and AdamW of 32 sentences of 32 tokens on one thread. Its time is the median of five, divided by that of a LoRA with
r = 8 on queries and values.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "examples"))
import torch
from carriers import minilm
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from peft_intrinsic import IntrinsicConfig, SupermaskConfig
from peft_intrinsic.codec import compress


def count_saved_bytes(model: Any) -> int:
    """Count the bytes of the weights that `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def measure_step(model: Any) -> float:
    """Measure the seconds of a training step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    ids, times = torch.randint(1000, 20000, (32, 32), generator=torch.Generator().manual_seed(0)), []
    model.train()
    for _ in range(6):
        start = time.perf_counter()
        model(input_ids=ids, labels=torch.zeros(32, dtype=torch.long)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = args.model or minilm()

    def base() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, dtype=torch.float32)

    def adapter(config: Any) -> Callable[[], Any]:
        return lambda: get_peft_model(base(), config)

    def layers() -> Any:
        model = base()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in ("layer.0.", "layer.5.", "classifier")))
        return model

    def changed(model: Any) -> int:
        return 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)

    linear = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"
    mask = SupermaskConfig(target_modules=linear, task_type="SEQ_CLS")
    rows: dict[str, tuple[Callable[[], Any], Callable[[Any], int]]] = {
        "LoRA, r = 8, queries and values": (
            adapter(LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS")),
            count_saved_bytes,
        ),
        "full": (base, count_saved_bytes),
        "layers 0 and 5": (layers, changed),
        "supermask, 3 % zeros": (adapter(mask), count_saved_bytes),
        "intrinsic, d = 200": (adapter(IntrinsicConfig(d=200, task_type="SEQ_CLS")), count_saved_bytes),
        "intrinsic, d = 200, packed": (
            adapter(IntrinsicConfig(d=200, task_type="SEQ_CLS", init_weights=False)),
            lambda model: len(compress(model, 8)),
        ),
    }
    print("| what is stored for a task | bytes | step / LoRA's |\n|---|---|---|")
    first = 0.0
    for name, (build, count_bytes) in rows.items():
        model = build()
        seconds = measure_step(model)
        first = first or seconds
        print(f"| {name} | {count_bytes(model):,} | {seconds / first:.2f} |", flush=True)


if __name__ == "__main__":
    main()
