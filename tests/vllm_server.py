"""Check adapters that vLLM serves from a store: `python tests/vllm_server.py`, or `make test-vllm`.

It runs in an environment of its own, without pytest, on a tiny random model in float32. Log-probabilities of the next
token must agree with those of `PeftModel` within `TOLERANCE`, and differ between adapters by far more. (With
prompt_logprobs and a LoRA, vLLM 0.32 ends on several prompts at once.)
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_intrinsic import IntrinsicConfig, save_as_lora
from peft_intrinsic.codec import compress

TOLERANCE = 2e-3
"""Of a log-probability in float32, in nats: two implementations of the model."""

FAR = 0.1
"""By so much the log-probabilities of two adapters differ at least for one token."""

ADAPTERS, PORT = 50, 8123
PROMPTS = [[5, 17, 9, 40, 3, 77], [60, 2, 2, 31], [8, 91, 44, 12, 70, 23, 6, 55, 19]]
SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


def make_base(folder: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, num_hidden_layers=3, max_position_embeddings=256, **SIZES))
    for p in model.parameters():
        p.data.mul_(3 if p.dim() > 1 else 1)
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(100)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1").save_pretrained(folder)


def adapt(base: Path, seed: int, **options: Any) -> PeftModel:
    """An adapter with θ of few values, so that packing loses nothing but float16 digits."""
    options = {"d": 40, "projection": "value_lora", "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), IntrinsicConfig(**options)).eval()
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randint(-4, 5, (options["d"],), generator=generator) / 32
    model.base_model.vector.intrinsic_theta["default"].weight.data.copy_(theta)
    return model


Scores = list[dict[int, float]]


@torch.no_grad()
def expected(model: Any) -> Scores:
    """Log-probabilities of all next tokens, for each prompt."""
    logits = [model(input_ids=torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS]
    return [dict(enumerate(values.float().log_softmax(-1).tolist())) for values in logits]


def post(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read().decode()
            return answer.status, json.loads(text) if text.startswith("{") else text
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def ask(model: str, prompt: list[int], tokens: int = 1) -> tuple[int, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 20}
    return post("/v1/completions", {**body, "ignore_eos": True, "return_tokens_as_token_ids": True})


def served(model: str) -> Scores:
    """Log-probabilities of the likeliest next tokens, for each prompt."""
    result = []
    for prompt in PROMPTS:
        status, answer = ask(model, prompt)
        assert status == 200, (model, status, answer)
        (top,) = answer["choices"][0]["logprobs"]["top_logprobs"]
        assert len(top) >= 20
        result.append({int(token.removeprefix("token_id:")): score for token, score in top.items()})
    return result


def distance(found: Scores, other: Scores) -> float:
    """Largest difference for the tokens of the first."""
    pairs = zip(found, other, strict=True)
    return max(abs(score - there[token]) for here, there in pairs for token, score in here.items())


@contextlib.contextmanager
def server(folder: Path, *options: str) -> Iterator[subprocess.Popen]:
    environment = {
        **os.environ,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_PLUGINS": "peft_intrinsic",
        "PEFT_INTRINSIC_STORE": f"sqlite:///{folder / 'adapters.db'}",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(folder / "base"), "--served-model-name", "raw"]
    command += ["--enable-lora", "--max-lora-rank", "16", "--max-model-len", "128", "--host", "127.0.0.1"]
    command += ["--port", str(PORT), "--enforce-eager", "--dtype", "float32", *options]
    log = folder / "server.log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2):
                break
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(1)
        yield process
        assert process.poll() is None, "the server ended"
    except Exception:
        lines = [line for line in log.read_text().splitlines() if " ERROR " in line]
        print("\n".join(lines[:60]), file=sys.stderr)
        raise
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def store(folder: Path, rows: dict[str, bytes | None]) -> None:
    with sqlite3.connect(folder / "adapters.db") as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS adapters (name VARCHAR(128) PRIMARY KEY, data BLOB NOT NULL)")
        for name, data in rows.items():
            if data is None:
                connection.execute("DELETE FROM adapters WHERE name = ?", (name,))
            else:
                connection.execute("INSERT OR REPLACE INTO adapters VALUES (?, ?)", (name, data))


def check(folder: Path) -> None:
    base = folder / "base"
    adapters = {f"user{i}": adapt(base, i) for i in range(ADAPTERS)}
    packed = {name: compress(model, levels=9) for name, model in adapters.items()}
    foreign = LlamaForCausalLM.from_pretrained(base)
    foreign.model.norm.weight.data.mul_(2)
    bad: dict[str, bytes | None] = {
        "damaged": packed["user0"][:-1] + b"x",
        "foreign": compress(get_peft_model(foreign, IntrinsicConfig(d=40, projection="value_lora")), levels=9),
        "oversized": compress(adapt(base, 0, projection="fastfood", target_modules=["v_proj"], block_size=32)),
        "norms": compress(adapt(base, 0, projection="fastfood")),
    }
    store(folder, {**packed, **bad})
    plain = expected(LlamaForCausalLM.from_pretrained(base))
    wanted = {name: expected(model) for name, model in adapters.items()}
    with server(folder, "--max-loras", "2", "--max-cpu-loras", "2") as process:
        assert "The first adapter of the store, 'damaged', cannot be served" in (folder / "server.log").read_text()
        found = {name: served(name) for name in adapters}
        errors = [distance(found[name], wanted[name]) for name in adapters]
        apart = [distance(wanted["user0"], wanted[name]) for name in adapters if name != "user0"]
        print(
            f"{ADAPTERS} adapters over 2 slots: largest error {max(errors):.1e}, smallest difference {min(apart):.2f}"
        )
        assert max(errors) < TOLERANCE
        assert min(apart) > FAR
        assert max(distance(served(name), wanted[name]) for name in list(adapters)[:10]) < TOLERANCE  # were evicted
        print("evicted adapters are loaded again")
        names = ["__base__", "user0", "user1"] * 8
        with ThreadPoolExecutor(len(names)) as pool:
            together = list(pool.map(served, names))
        right = {"__base__": plain, **wanted}
        worst = max(distance(scores, right[name]) for name, scores in zip(names, together, strict=True))
        print(f"{len(names)} requests at once, a third of them to the base model: largest error {worst:.1e}")
        assert worst < TOLERANCE
        for name, message in (
            ("damaged", "damaged"),
            ("foreign", "The adapter was made for"),
            ("norms", "A LoRA cannot represent"),
            ("../user0", "no name of an adapter"),
            ("oversized", "rank 32, and the server takes ranks up to 16"),
        ):
            status, answer = ask(name, PROMPTS[0])
            print(f"{name}: {status}, {answer['error']['message'][:110]}")
            assert status == 400, (name, status, answer)
            assert message in answer["error"]["message"]
        assert ask("nobody", PROMPTS[0])[0] == 404
        store(folder, {"user2": packed["user3"], "user4": None})
        for name in ("user2", "user4"):
            assert post("/v1/unload_lora_adapter", {"lora_name": name})[0] == 200
        assert distance(served("user2"), wanted["user3"]) < TOLERANCE
        assert ask("user4", PROMPTS[0])[0] == 404
        print("a replaced and a removed row are noticed after /v1/unload_lora_adapter")
        assert distance(served("user5"), wanted["user5"]) < TOLERANCE
        assert process.poll() is None


def measure(folder: Path) -> None:
    """Print bytes, seconds to the first token, and the throughput of mixes beside folders of LoRAs and the base."""
    base = folder / "base"
    names = [f"user{i}" for i in range(ADAPTERS) if i not in (2, 4)]
    with sqlite3.connect(folder / "adapters.db") as connection:
        sizes = [row[0] for row in connection.execute("SELECT length(data) FROM adapters WHERE name LIKE 'user%'")]
    print(f"bytes at rest: {statistics.mean(sizes):.0f} on average")
    folders = [f"plain{i}" for i in range(8)]
    for i, name in enumerate(folders):
        save_as_lora(folder / name, adapt(base, i))
    modules = [f"{name}={folder / name}" for name in folders]
    with server(folder, "--max-loras", "8", "--max-cpu-loras", "64", "--lora-modules", *modules):
        ask("raw", PROMPTS[0])
        new: list[float] = []
        known: list[float] = []
        for name in names:
            for times in (new, known):
                start = time.perf_counter()
                assert ask(name, PROMPTS[0])[0] == 200
                times.append(time.perf_counter() - start)
        print(
            f"first token: new adapter {statistics.median(new):.3f} s, known {statistics.median(known):.3f} s (median)"
        )

        def throughput(models: list[str]) -> float:
            requests = [models[i % len(models)] for i in range(96)]
            start = time.perf_counter()
            with ThreadPoolExecutor(32) as pool:
                done = list(pool.map(lambda name: ask(name, PROMPTS[2], 32), requests))
            assert all(status == 200 for status, _ in done)
            return 32 * len(requests) / (time.perf_counter() - start)

        mixes = {
            "base": ["raw"],
            "1 LoRA folder": folders[:1],
            "8 LoRA folders": folders,
            "1 of the store": names[:1],
            "8 of the store": names[:8],
            "48 of the store over 8 slots": names,
        }
        speeds: dict[str, list[float]] = {mix: [] for mix in mixes}
        for _ in range(3):
            for mix, chosen in mixes.items():
                speeds[mix].append(throughput(chosen))
        reference = statistics.median(speeds["1 LoRA folder"])
        for mix, values in speeds.items():
            print(f"throughput, {mix}: {statistics.median(values) / reference:.2f} of one LoRA folder")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_base(folder / "base")
        check(folder)
        if "--measure" in sys.argv[1:]:
            measure(folder)


if __name__ == "__main__":
    main()
