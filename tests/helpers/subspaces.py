"""Subspaces of tiny models, and adapters in them."""

from __future__ import annotations

import torch
from conftest import build
from peft import PeftModel, get_peft_model

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.trajectory import Subspace, fit_subspace, record

CLOSE = {"rtol": 0, "atol": 2e-5}


def make_subspace(family: str, folder, dim: int = 3, seed: int = 0, **options) -> Subspace:
    """Fit a subspace to a random walk of `build(family)`."""
    model = build(family)
    generator = torch.Generator().manual_seed(seed)
    record(model, folder / "run", 0, parameters=options.pop("parameters", None))
    for step in range(1, dim + 1):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.02)
        record(model, folder / "run", step, dtype=torch.float32)
    return fit_subspace(folder / "run", dim, out=folder / "subspace.safetensors", **options)


def attach(family: str, subspace: Subspace, **options) -> PeftModel:
    """An adapter on `build(family)` that trains in the subspace."""
    options = {"d": subspace.dim, "projection": "trajectory", "subspace": str(subspace.path), **options}
    return get_peft_model(build(family), IntrinsicConfig(**options)).eval()


def theta(model, adapter: str = "default") -> torch.nn.Parameter:
    return model.get_base_model().intrinsic.intrinsic_theta[adapter].weight


def set_theta(model, seed: int = 0, size: float = 0.01) -> None:
    values = torch.randn(len(theta(model)), generator=torch.Generator().manual_seed(seed))
    theta(model).data.copy_(size * values)
