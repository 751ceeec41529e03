"""vLLM's plugins with a mock of its registry. `make test-vllm` runs vLLM itself."""

from __future__ import annotations

import asyncio
import importlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import build, evaluate
from peft import PeftModel, get_peft_model

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.codec import compress, load_packed
from peft_intrinsic_autoload.vllm import StartCheck, register

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
WARNING = "The first adapter of the store, 'ann', cannot be served. "


class Registry(dict):
    def register_resolver(self, name: str, resolver: Any) -> None:
        self[name] = resolver

    def get_resolver(self, name: str) -> Any:
        return self[name]


@dataclass
class Request:
    lora_name: str
    lora_int_id: int
    lora_path: str


@pytest.fixture
def registry(monkeypatch) -> Iterator[Registry]:
    modules = {name: ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request", "vllm.lora.resolver")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    resolver: Any = modules["vllm.lora.resolver"]
    resolver.LoRAResolver, resolver.LoRAResolverRegistry = object, Registry()
    modules["vllm.lora.request"].LoRARequest = Request
    monkeypatch.delitem(sys.modules, "peft_intrinsic.serving.vllm", raising=False)
    importlib.import_module("peft_intrinsic.serving.vllm")
    yield resolver.LoRAResolverRegistry
    del sys.modules["peft_intrinsic.serving.vllm"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build("llama").save_pretrained(folder)
    return folder


def packed(seed: int, model: Any = None, **options) -> bytes:
    torch.manual_seed(seed)
    options = {"d": 20, "serving": "lora", "init_weights": False, "task_type": "CAUSAL_LM", **options}
    return compress(get_peft_model(model or build("llama"), IntrinsicConfig(**options)))


def start(base: Path | None, max_rank: int = 16) -> None:
    """What vLLM does: it loads its plugins, then calls those of endpoints with the engine."""
    register()
    check = StartCheck()
    check.attach_router(None)
    config = SimpleNamespace(
        model_config=SimpleNamespace(model=str(base)), lora_config=SimpleNamespace(max_lora_rank=max_rank)
    )
    asyncio.run(check.init_state(SimpleNamespace(vllm_config=config), None, None))


@pytest.fixture
def store(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PEFT_INTRINSIC_STORE", str(tmp_path))
    (tmp_path / "bob.pia").write_bytes(packed(2))
    return tmp_path


def resolve(registry: Registry, base: Path, name: str) -> Request | None:
    return asyncio.run(registry["peft_intrinsic"].resolve_lora(str(base), name))


@pytest.mark.parametrize("prepared", [True, False])
def test_a_name_of_the_store_becomes_a_folder_that_peft_loads(registry, store, base, prepared, caplog):
    if prepared:
        start(base)
    else:  # VLLM_PLUGINS does not name the plugin
        register()
    assert not caplog.records
    for name, expected in (("bob", load_packed(build("llama"), store / "bob.pia")), ("__base__", build("llama"))):
        found = resolve(registry, base, name)
        assert (found.lora_name, found.lora_int_id) == (name, 1)
        loaded = PeftModel.from_pretrained(build("llama"), found.lora_path).eval()
        torch.testing.assert_close(evaluate(loaded, "llama"), evaluate(expected, "llama"), **CLOSE)
        assert resolve(registry, base, name).lora_path == found.lora_path
    assert resolve(registry, base, "carl") is None
    with pytest.raises(ValueError, match="no name of an adapter"):
        resolve(registry, base, "../bob")


def foreign() -> bytes:
    model = build("llama")
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    return packed(1, model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (foreign, "The adapter was made for"),
        (lambda: packed(1)[:-1], "This packed adapter is damaged"),
        (
            lambda: packed(1, projection="fastfood", block_size=32),
            "The adapter is a LoRA of rank 32, and the server takes ranks up to 16",
        ),
        (lambda: packed(1, serving=None), "A LoRA cannot represent"),
    ],
)
def test_the_start_warns_of_a_first_adapter_that_does_not_fit_and_the_server_lives(
    make, message, registry, store, base, caplog
):
    (store / "ann.pia").write_bytes(make())
    start(base)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith(WARNING + message)
    with pytest.raises(ValueError, match=message):
        resolve(registry, base, "ann")
    assert resolve(registry, base, "bob") is not None


def test_an_empty_store_starts_silently(registry, tmp_path, monkeypatch, base, caplog):
    monkeypatch.setenv("PEFT_INTRINSIC_STORE", str(tmp_path))
    start(base)
    assert not caplog.records


def test_without_a_store_or_loras_nothing_is_registered(registry, store, monkeypatch):
    without = SimpleNamespace(vllm_config=SimpleNamespace(lora_config=None))
    for client in (None, without):  # a server that renders prompts alone has no engine
        asyncio.run(StartCheck().init_state(client, None, None))
    monkeypatch.delenv("PEFT_INTRINSIC_STORE")
    start(None)
    assert not registry
