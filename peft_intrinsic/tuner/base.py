"""The base class of the tuners: errors where PEFT would do nothing or fail midway."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from .layer import find_adapter


class CheckedTuner(BaseTuner):
    """PEFT's tuner, with checks of the model and of the names of adapters."""

    peft_config: Any

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach an adapter as in PEFT.

        Raises:
            ValueError: the model is scripted or traced; or the call comes from diffusers' `add_adapter`.
        """
        if isinstance(model, torch.jit.ScriptModule):
            raise ValueError(
                "The model is scripted or traced: its compiled code would not use an adapter. Attach the adapter to "
                "the plain model, and script or trace that after merging."
            )
        if hasattr(model, "save_lora_adapter") and getattr(model, "_hf_peft_config_loaded", False):
            if not hasattr(model, "peft_config"):
                model.__dict__["_hf_peft_config_loaded"] = False  # set before the call: get_peft_model must still work
            raise ValueError(
                f"add_adapter({type(self.peft_config[adapter_name]).__name__}(…)): diffusers saves and loads adapters "
                "as LoRA files, which cannot represent this one. Use get_peft_model(model, config), its "
                "save_pretrained, and PeftModel.from_pretrained."
            )
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _check_attached(self, adapter_names: str | Sequence[str] | None) -> None:
        """Raise ValueError if one of the adapters is not attached. None means the active ones."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names or ():
            find_adapter(self, name)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters as in PEFT. Raise ValueError if one is not attached."""
        self._check_attached(adapter_name)
        super().set_adapter(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze adapters as in PEFT. Raise ValueError if one is not attached."""
        self._check_attached(adapter_names)
        super().set_requires_grad(adapter_names, requires_grad)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters as in PEFT. Raise ValueError if one is not attached."""
        self._check_attached(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)
