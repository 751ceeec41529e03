"""Tiny models with masks."""

from __future__ import annotations

import torch
from conftest import build
from peft import PeftModel, get_peft_model

from peft_intrinsic import SupermaskConfig

CLOSE = {"rtol": 0, "atol": 1e-6}
LABELS = torch.tensor([0, 1, 2, 0])


def masked(family: str = "bert", base=None, **options) -> PeftModel:
    """A model with an adapter whose scores are not the initial ones."""
    options = {"initial_sparsity": 0.2, **options}
    model = get_peft_model(base or build(family), SupermaskConfig(**options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "supermask_scores" in name:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model.eval()


def layers(model) -> list:
    return [(n, m) for n, m in model.named_modules() if type(m).__name__ == "SupermaskLinear"]
