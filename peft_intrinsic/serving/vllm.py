"""A resolver for vLLM, which calls it for adapters that it does not know."""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import logging
import os
import shutil
import tempfile
from functools import cached_property
from pathlib import Path

from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from .expand import LoraExpander
from .store import open_store

logger = logging.getLogger("vllm.peft_intrinsic")  # vLLM silences warnings of loggers outside its own

RESOLVER = "peft_intrinsic"
"""Name of the resolver in vLLM's registry."""

BASE = "__base__"
"""PEFT's name for the base model without an adapter, served as an adapter of zeros."""

MAX_CACHE = 2**34
"""Bytes of LoRAs that a server may write to its temporary folder: 16 GiB, 300,000 adapters of a model of 135 M."""


class StoreResolver(LoRAResolver):
    """Adapters of a store, as LoRAs in a temporary folder.

    Folders are named by their content and live as long as the server: vLLM reads an adapter again after it was evicted,
    and does not survive that its folder is gone.

    Args:
        url: of the store, as for `open_store`.

    Raises:
        ValueError: there is no such store.
    """

    def __init__(self, url: str) -> None:
        self.store = open_store(url)
        self._expanders: dict[str, LoraExpander] = {}
        self._max_rank: int | None = None  # unknown without `prepare`
        self._size = 0
        self._lock = asyncio.Lock()

    @cached_property
    def _cache(self) -> Path:
        folder = tempfile.mkdtemp(prefix="peft_intrinsic-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)

    async def prepare(self, base_model_name: str, max_rank: int) -> None:
        """Read the base model, and warn if it is not that of the store's first adapter, or cannot serve this otherwise.

        Args:
            base_model_name: folder or name of the base model.
            max_rank: the largest rank that the server takes.
        """
        self._max_rank = max_rank
        async with self._lock:
            await asyncio.to_thread(self._check_first, base_model_name)

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Make the LoRA of a stored adapter, or return None if the store has none of this name.

        Raises:
            ValueError: the name is invalid, or the adapter cannot be served. vLLM answers with status 400.
        """
        async with self._lock:
            path = await asyncio.to_thread(self._resolve, base_model_name, lora_name)
        return path and LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(path))

    def _find_expander(self, base: str) -> LoraExpander:
        if base not in self._expanders:
            self._expanders[base] = LoraExpander(base)
        return self._expanders[base]

    def _check_first(self, base: str) -> None:
        expander, name = self._find_expander(base), None
        try:
            name = next(iter(self.store.names()), None)
            if name is not None and (adapter := self.store.get(name)) is not None:
                expander.expand(adapter, self._max_rank)
        except Exception as error:  # other adapters may fit, and requests for this one get the error
            logger.warning("The first adapter of the store, %r, cannot be served. %s", name, error)

    def _resolve(self, base: str, name: str) -> Path | None:
        adapter = None if name == BASE else self.store.get(name)
        if adapter is None and name != BASE:
            return None
        expander = self._find_expander(base)
        config, state = expander.zeros() if adapter is None else expander.expand(adapter, self._max_rank)
        data = save({key: value.contiguous() for key, value in state.items()}, {"format": "pt"})
        folder = self._cache / hashlib.sha256(data).hexdigest()[:32]
        if not folder.exists():
            self._write(folder, config, data)
        return folder

    def _write(self, folder: Path, config: LoraConfig, data: bytes) -> None:
        if self._size + len(data) > MAX_CACHE:
            raise ValueError(
                f"The server has made LoRAs of {self._size} bytes, of {MAX_CACHE} that it may. Restart it to free them."
            )
        new = Path(tempfile.mkdtemp(dir=self._cache))
        (new / SAFETENSORS_WEIGHTS_NAME).write_bytes(data)
        config.save_pretrained(str(new))
        os.rename(new, folder)
        self._size += len(data)


def register_resolver(url: str) -> None:
    """Register the resolver of a store with vLLM."""
    LoRAResolverRegistry.register_resolver(RESOLVER, StoreResolver(url))


async def prepare_resolver(base_model_name: str, max_rank: int) -> None:
    """Prepare the registered resolver, before the first request: see `StoreResolver.prepare`."""
    await LoRAResolverRegistry.get_resolver(RESOLVER).prepare(base_model_name, max_rank)
