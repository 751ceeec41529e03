"""Base models and trials of the golden files, the same when these are written and when they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

OUT = Path(__file__).parents[1] / "golden" / "written_by_d665cba"
SIZES: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
RATES = ((0.1, 0.2), (0.1, 0.2))


@torch.no_grad()
def filled(model: nn.Module) -> nn.Module:
    """The model with weights from a formula."""
    for k, (_, p) in enumerate(sorted(model.named_parameters())):
        values = ((torch.arange(p.numel()) * 37 + k * 11) % 101 - 50) / 512
        p.copy_(values.view(p.shape) * (4 if p.dim() > 1 else 1) + p.mean().round())  # norms begin at 1
    return model.eval()


def base(kind: str, folder: Path) -> nn.Module:
    """A base model; `headless` loads an encoder from a checkpoint without the task's head, which it writes."""
    if kind == "llama":
        return filled(LlamaForCausalLM(LlamaConfig(**SIZES)))
    model = filled(BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)))
    if kind == "bert":
        return model
    model.bert.save_pretrained(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """Of two inputs."""
    return model(input_ids=(torch.arange(10).view(2, 5) * 7) % 31).logits


def fit(d: int | None, seed: int, rate: float) -> dict[str, Any]:
    """A trial that trains nothing: d = 40 reaches 0.9 of the baseline."""
    score = (90 if d is None else min(20 + 10 * d.bit_length(), 88)) + seed % 3 - round(20 * abs(rate - 0.2))
    return {"score": score / 100, "correct": [i < score for i in range(100)], "note": "kept"}


def measure(calls: list[Any], correct: str = "correct", **options: Any) -> Any:
    """A measurement by `fit`, which notes its calls; names of options, and of `correct`, are the caller's."""
    from peft_intrinsic.measure import grid, measure_intrinsic_dimension

    def noted(*trial: Any) -> dict[str, Any]:
        calls.append(trial)
        if len(calls) > options.get("stop", 10**6):
            raise KeyboardInterrupt
        found = fit(*trial)
        found[correct] = found.pop("correct")
        return found

    asked = {name: value for name, value in options.items() if name != "stop"}
    return measure_intrinsic_dimension(noted, grid(4, 512, 12), trials=28, majority=0.25, learning_rates=RATES, **asked)
