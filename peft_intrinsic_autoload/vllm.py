"""The entry point of vLLM's plugins, called in each of its processes."""

import os


def register() -> None:
    """Register the resolver of adapters where `PEFT_INTRINSIC_STORE` names a store."""
    if os.environ.get("PEFT_INTRINSIC_STORE"):
        from peft_intrinsic.serving.vllm import register_resolver

        register_resolver(os.environ["PEFT_INTRINSIC_STORE"])
