"""Methods that can be measured: random subspaces of all weights, and PEFT's methods with as many parameters."""

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
    "said": "θ spread over all weights, with a learned scale per layer, which d includes",
    "default": "θ spread over norms, biases and the head, or over all weights where those have fewer than d",
    "lora": "LoRA of queries and values, with the greatest rank that d allows",
    "lora-rank": "LoRA of queries and values with rank d, and the head, which PEFT trains fully",
    "unilora": "UniLoRA of queries and values, rank 4",
    "tinylora": "TinyLoRA of queries and values, with as many parameters for each as d allows",
}
"""Descriptions of the methods by name. The head stays frozen unless the method adapts or trains it."""

TITLES = {
    "did": "DID",
    "said": "SAID",
    "default": "this package",
    "lora": "LoRA",
    "lora-rank": "LoRA by rank",
    "unilora": "UniLoRA",
    "tinylora": "TinyLoRA",
}
"""Names of the methods in reports and figures."""


def build_config(method: str, d: int, seed: int, base: Any, task_type: str, head: Any = "keep") -> PeftConfig:
    """Build the configuration of a method with at most d trainable parameters. The base may be on the meta device.

    Raises:
        ValueError: d is too small for the method.
    """
    if method == "default":
        # One projection for every d: a decoder's default changes it where d exceeds the number of values. P adapts the
        # head, which has its start values already.
        return IntrinsicConfig(d=d, seed=seed, task_type=task_type, projection="fastfood", reinitialized=[])
    if method in ("did", "said"):
        return IntrinsicConfig(d=d, seed=seed, said=method == "said", head=head, task_type=task_type, **PAPER)
    if method == "lora-rank":
        return LoraConfig(r=d, lora_alpha=2 * d, task_type=task_type)  # the same scale for every rank
    if method == "unilora":
        return UniLoraConfig(r=4, theta_d_length=d, proj_seed=seed)
    step = get_step(method, base)
    if d < step:
        raise ValueError(f"d={d} is below the {step} parameters that {method} needs for this model. Use d ≥ {step}.")
    if method == "lora":
        return LoraConfig(r=d // step, lora_alpha=2 * (d // step))
    return TinyLoraConfig(r=math.ceil(math.sqrt(d // step)), u=d // step, projection_seed=seed)


def get_step(method: str, base: Any) -> int:
    """Get the number of which d must be a multiple for this method and model."""
    if method not in ("lora", "tinylora"):
        return 1
    return count_trained(LoraConfig(r=1) if method == "lora" else TinyLoraConfig(r=1, u=1), base)


def count_trained(config: PeftConfig, base: Any) -> int:
    """Count the trainable parameters of an adapter of a model, which may be on the meta device."""
    with torch.device("meta"):
        shapes = type(base)(base.config)
    return get_peft_model(shapes, config).num_parameters(only_trainable=True)
