"""What can be measured: random subspaces of all weights, and PEFT's methods on the same axis of trained numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, TinyLoraConfig, UniLoraConfig, get_peft_model

from ..tuner import IntrinsicConfig

PAPER: dict[str, Any] = {"target_modules": "all", "projection": "global"}
"""An intrinsic dimension is that of all weights, with θ spread over all of them (Aghajanyan et al. 2020, 3.1)."""

METHODS: dict[str, str] = {
    "did": "θ spread over all weights",
    "said": "likewise, with a learned scale per layer counted inside d",
    "default": "this package's default subspace",
    "lora": "LoRA of queries and values, of the greatest rank that d numbers allow",
    "unilora": "UniLoRA of queries and values, rank 4",
    "tinylora": "TinyLoRA of queries and values, as many numbers for each as d allows",
}
"""Methods by name. The head stays as it was drawn, unless the method moves it."""


def adapter(method: str, d: int, seed: int, base: Any, task_type: str, head: Any = "keep") -> PeftConfig:
    """The configuration of a method with d numbers; those that come in steps take the most that d allows.

    Args:
        method: a key of `METHODS`.
        d: how many numbers.
        seed: of the projection.
        base: the model, or one of its shapes.
        task_type: of PEFT.
        head: see `IntrinsicConfig`.

    Raises:
        ValueError: d is too small for the method.
    """
    if method in ("did", "said", "default"):
        where = {} if method == "default" else PAPER
        return IntrinsicConfig(d=d, seed=seed, said=method == "said", head=head, task_type=task_type, **where)
    if method == "unilora":
        return UniLoraConfig(r=4, theta_d_length=d, proj_seed=seed)
    least = step(method, base)
    if d < least:
        raise ValueError(f"{method} has {least} numbers at least for this model, got d={d}.")
    if method == "lora":
        return LoraConfig(r=d // least, lora_alpha=2 * (d // least))
    return TinyLoraConfig(r=math.ceil(math.sqrt(d // least)), u=d // least, projection_seed=seed)


def step(method: str, base: Any) -> int:
    """In what steps a method's numbers come for this model; the least that it can have."""
    if method not in ("lora", "tinylora"):
        return 1
    with torch.device("meta"):
        shapes = type(base)(base.config)
    config = LoraConfig(r=1) if method == "lora" else TinyLoraConfig(r=1, u=1)
    return get_peft_model(shapes, config).num_parameters(only_trainable=True)
