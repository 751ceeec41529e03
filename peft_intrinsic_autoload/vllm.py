"""The entry points of vLLM's plugins. Nothing else is imported where `PEFT_INTRINSIC_STORE` names no store."""

from __future__ import annotations

import os
from typing import Any


def register() -> None:
    """Register the resolver of adapters, in each of vLLM's processes."""
    if os.environ.get("PEFT_INTRINSIC_STORE"):
        from peft_intrinsic.serving.vllm import register_resolver

        register_resolver(os.environ["PEFT_INTRINSIC_STORE"])


class StartCheck:
    """An endpoint plugin without endpoints: vLLM calls it before the first request, when it knows the base model.

    vLLM loads plugins of this kind only where `VLLM_PLUGINS` names them.
    """

    name = "peft_intrinsic"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add no routes."""

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Prepare the resolver for the base model and the largest rank of the server."""
        config = engine_client and engine_client.vllm_config
        if os.environ.get("PEFT_INTRINSIC_STORE") and config and config.lora_config:
            from peft_intrinsic.serving.vllm import prepare_resolver

            await prepare_resolver(config.model_config.model, config.lora_config.max_lora_rank)
