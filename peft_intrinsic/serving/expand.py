"""The LoRA that equals a stored adapter, made from its d parameters in milliseconds."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from ..codec import load_packed, read_packed
from ..tuner.base_model import base_digest
from ..tuner.config import IntrinsicConfig
from ..tuner.to_lora import convert_to_lora
from .saved import is_packed, read_saved
from .store import Stored

KINDS = 64
"""Maximum number of kinds of adapters in memory. Another one replaces the least recently used."""


class LoraExpander:
    """Convert stored adapters of one base model to LoRAs.

    The base model is read at the start, for its digest, and for each kind of adapter (its options and seed), to compute
    P. Its weights do not stay in memory, and of the kinds only the 64 that were used last.

    Args:
        base: folder or name of the base model, a decoder that generates text.

    Example:
        >>> expander = LoraExpander("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> config, tensors = expander.expand(Path("ann.pia").read_bytes())
    """

    def __init__(self, base: str | os.PathLike) -> None:
        self.base = str(base)
        self._digest = base_digest(self._load())
        self._kinds: dict[Any, PeftModel] = {}
        self._lock = threading.Lock()

    def expand(self, adapter: Stored, max_rank: int | None = None) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
        """Convert an adapter to the LoRA with equal outputs within rounding.

        Args:
            adapter: bytes of a packed adapter or of θ in safetensors, or the folder of a saved adapter.
            max_rank: the largest rank that the server takes.

        Returns:
            The configuration and the state dict of the LoRA.

        Raises:
            ValueError: the adapter is damaged, is of another base model, adapts what a LoRA cannot represent, or has a
                larger rank.
        """
        with self._lock:
            model = self._with_packed(adapter) if is_packed(adapter) else self._with_saved(adapter)
            config, state = convert_to_lora(model)
        if config.modules_to_save or config.trainable_token_indices:
            raise ValueError(
                f"The adapter trains {config.modules_to_save or 'rows of embeddings'} fully, which servers of LoRAs do "
                "not take. Train it without these."
            )
        if max_rank is not None and config.r > max_rank:
            raise ValueError(
                f"The adapter is a LoRA of rank {config.r}, and the server takes ranks up to {max_rank}. Start it with "
                f"--max-lora-rank of at least {config.r}, or train with serving='lora' (rank 1 or 8) or a smaller "
                "block_size."
            )
        return config, state

    def zeros(self) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
        """Make a LoRA of rank 1 that leaves the base model as it is."""
        with self._lock:
            config = IntrinsicConfig(d=1, block_size=1, target_modules="all-linear", task_type="CAUSAL_LM")
            return convert_to_lora(self._attached(None, lambda base: get_peft_model(base, config)))

    def _attached(self, kind: Any, attach: Callable[[Any], PeftModel]) -> PeftModel:
        """The base model with an adapter of this kind, without its weights."""
        model = self._kinds.pop(kind, None) or _without_weights(attach(self._load()))
        self._kinds[kind] = model
        if len(self._kinds) > KINDS:
            del self._kinds[next(iter(self._kinds))]
        return model

    def _with_packed(self, data: bytes) -> PeftModel:
        packed = read_packed(data)
        if packed.base_digest != self._digest:
            raise ValueError(
                f"The adapter was made for {packed.base or 'a base model without a name'} (digest "
                f"{packed.base_digest.hex()}), and the server has {self.base} (digest {self._digest.hex()}). Pack an "
                "adapter that was trained on this model."
            )
        options = [(name, repr(value)) for name, value in sorted(packed.options.items())]
        numbers = (packed.d, packed.seed, packed.block_size, packed.algorithm)
        key = (*numbers, packed.manifest_digest, *packed.reinitialized, *options)
        model = self._attached(key, lambda base: load_packed(base, data, check_base=False))
        return _with_vectors(model, torch.from_numpy(packed.theta), torch.from_numpy(packed.scales))

    def _with_saved(self, adapter: Stored) -> PeftModel:
        config, vectors = read_saved(adapter)
        key = repr(sorted((name, repr(value)) for name, value in config.to_dict().items() if name != "checksum"))
        return _with_vectors(self._attached(key, lambda base: get_peft_model(base, config)), *vectors)

    def _load(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.base, dtype="auto")


@torch.no_grad()
def _with_vectors(model: PeftModel, *vectors: torch.Tensor) -> PeftModel:
    """Set θ and λ of the only adapter."""
    vector: Any = model.base_model.vector
    own = [each.weight for each in (*vector.intrinsic_theta.values(), *vector.intrinsic_lambda.values())]
    values = [each for each in vectors if len(each)]
    if (sizes := [len(each) for each in own]) != (stored := [len(each) for each in values]):
        raise ValueError(f"The adapter has {stored} entries of θ and λ instead of {sizes}. Save it again.")
    for parameter, value in zip(own, values, strict=True):
        parameter.copy_(value)
    return model


def _without_weights(model: PeftModel) -> PeftModel:
    """Free the weights of the base model, which converting to LoRA does not read."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and "intrinsic_" not in name:
            parameter.data = parameter.data.new_empty(0)
    return model
