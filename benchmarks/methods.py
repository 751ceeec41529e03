"""The methods that benchmarks/quality.py compares: this tuner, PEFT's methods, a trained head, full fine-tuning."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import peft
import torch
from peft import get_peft_model
from torch import nn

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.projection import PROJECTIONS, allocation, base
from peft_intrinsic.projection.base import Shapes, Spec, TensorProjection
from peft_intrinsic.projection.randomness import words
from peft_intrinsic.tuner import label_head


class OneHot(TensorProjection):
    """A rejected projection: every weight is one coordinate times a random sign."""

    def __init__(self, rows: int, cols: int, index: np.ndarray, size: np.ndarray) -> None:
        self.rows, self.cols = rows, cols
        self.index, self.size = torch.from_numpy(index), torch.from_numpy(size.astype(np.float32))

    def slab(self, theta: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        part = slice(start * self.cols, stop * self.cols)
        return (theta[self.index[part]] * self.size[part]).unflatten(-1, (stop - start, self.cols))


def build_one_hot(spec: Spec, shapes: Shapes) -> dict[str, TensorProjection]:
    """Build projections in which each tensor has its own coordinates, allocated to its weights at random."""
    result: dict[str, TensorProjection] = {}
    for name, (start, count) in allocation.allocate(spec.d, shapes).items():
        shape = shapes[name]
        raw = words(spec.seed, "one-hot", name, shape.size)
        signs = 1 - 2 * (raw & np.uint64(1)).astype(np.int64)
        order = np.argsort(raw, kind="stable") * count // shape.size
        result[name] = OneHot(shape.rows, shape.cols, start + order, spec.theta_scale * shape.entry_scale * signs)
    return result


def attach(model: Any, row: dict[str, Any]) -> Any:
    """Prepare the model of one run for training. `row["config"]` has options of the method's PEFT configuration.

    `row["head"]` is `"subspace"` (this tuner: within d), `"frozen"`, or `"free"` (trained fully, not counted).
    `row["factors"]` and `row["parts"]` replace scales and allocations of the projection. `row["logits"]` replaces the
    size of the logits of a head from the labels' names.
    """
    method, options = row["method"], dict(row.get("config", {}))
    if method == "full":
        return model
    if method == "head":
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
        return model
    if row["head"] == "free":
        options["modules_to_save"] = ["classifier"]
    if method == "intrinsic":
        with (
            patch.dict(PROJECTIONS, {"one_hot": build_one_hot}),
            patch.dict(base.FACTORS, row.get("factors", {})),
            patch.dict(base.PARTS, row.get("parts", {})),
            patch.object(label_head, "LOGIT_SCALE", row.get("logits", label_head.LOGIT_SCALE)),
        ):
            task = "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else "SEQ_CLS"
            options = {"projection": "fastfood", **options}  # the default of encoders, and of all when rows were stored
            model = get_peft_model(model, IntrinsicConfig(d=row["d"], seed=row["seed"], task_type=task, **options))
        return model
    if method == "bitfit":
        free = ["classifier"] if row["head"] == "free" else []
        for name, p in model.named_parameters():
            p.requires_grad_(name.endswith("bias") or any(part in name for part in free))
        return model
    for name, value in options.items():
        options[name] = row["seed"] if value == "seed" else value
    kind = next(k for k in vars(peft) if k.lower() == f"{method}config")
    return get_peft_model(model, getattr(peft, kind)(**options))


def count_trainable(model: nn.Module, row: dict[str, Any]) -> int:
    """Count the trainable parameters, without a free head."""
    counted = [
        p for n, p in model.named_parameters() if p.requires_grad and not (row["head"] == "free" and "class" in n)
    ]
    return sum(p.numel() for p in counted)
