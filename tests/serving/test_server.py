"""The server: many users of one model, over HTTP."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TemperatureLogitsWarper, TopPLogitsWarper

from peft_intrinsic import IntrinsicConfig
from peft_intrinsic.codec import compress, load_packed, read_packed
from peft_intrinsic.serving import open_store
from peft_intrinsic.serving.engine import Engine, Job
from peft_intrinsic_cli import main

fastapi = pytest.importorskip("fastapi.testclient", reason="FastAPI, of the extra serve, is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn, of the extra serve, is not installed")
openai = pytest.importorskip("openai", reason="openai is not installed")
create_app = pytest.importorskip("peft_intrinsic.serving.app").create_app

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
PROMPTS = ["abc", "b", "hello world", "xyz xyz xyz"]
USERS = ["ann", "bob", "carl"]


def make_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Bytes of UTF-8 as tokens, as many as the models have. A random model writes broken characters with it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    chosen = [*map(chr, range(97, 123)), "Ġ", *(letter for letter in letters if not letter.isascii())][:95]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *chosen])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        chat_template=TEMPLATE if chat else None,
        model_max_length=64,
    )


def make_base(family: str) -> Any:
    """A tiny model. The logits of a decoder are far apart, so that rounding changes no token."""
    model = build(family)
    if family == "llama":
        model.generation_config.eos_token_id = 1
        for name, parameter in model.named_parameters():
            parameter.data.mul_(1 if "norm" in name else 8)
    return model


def adapted(family: str, user: str, **options) -> PeftModel:
    """The adapter of a user, with a θ that changes the answers."""
    task = "CAUSAL_LM" if family == "llama" else "SEQ_CLS"
    targets = {} if "projection" in options else {"target_modules": "all-linear", "block_size": 8}
    config = IntrinsicConfig(**{"d": 20, "task_type": task, "head": "keep", "reinitialized": [], **targets, **options})
    model = get_peft_model(make_base(family), config).eval()
    generator = torch.Generator().manual_seed(sum(map(ord, user)))
    with torch.no_grad():
        weight = model.get_base_model().intrinsic.intrinsic_theta["default"].weight
        weight.normal_(std=1 if family == "llama" else 0.1, generator=generator)
    return model


def pack(model: PeftModel) -> bytes:
    return compress(model, levels=256)


@pytest.fixture(scope="module")
def packed() -> dict[str, bytes]:
    return {user: pack(adapted("llama", user)) for user in USERS}


@pytest.fixture(scope="module")
def alone(packed) -> dict[str | None, PeftModel]:
    """Each user's model without a server; None is the base model."""
    return {None: make_base("llama"), **{user: load_packed(make_base("llama"), packed[user]) for user in USERS}}


@pytest.fixture
def store(tmp_path, packed) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    for user, data in packed.items():
        (folder / f"{user}.pia").write_bytes(data)
    return folder


def expect(model: Any, prompt: str, count: int) -> str:
    """Greedy continuation by transformers and PEFT alone."""
    tokenizer = make_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=1
        )
    return tokenizer.decode(out[0], skip_special_tokens=True)[len(prompt) :]


@pytest.fixture
def client(store) -> Iterator[Any]:
    engine = Engine(make_base("llama"), make_tokenizer())
    with fastapi.TestClient(create_app(engine, open_store(str(store)), "base")) as client:
        yield client
    assert not engine.is_alive


def complete(client: Any, model: str, prompt: Any = "abc", **options) -> Any:
    options = {"max_tokens": 8, "temperature": 0, **options}
    return client.post("/v1/completions", json={"model": model, "prompt": prompt, **options})


def text_of(response: Any) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def error_of(response: Any, status: int = 400) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "code", "param"}
    return error["message"]


@contextmanager
def listen(engine: Engine, store: Path) -> Iterator[Any]:
    """Serve with uvicorn in a thread, and yield a client of OpenAI's package."""
    config = uvicorn.Config(create_app(engine, open_store(str(store)), "base"), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def engine() -> Engine:
    return Engine(make_base("llama"), make_tokenizer())


@pytest.fixture
def online(engine, store) -> Iterator[Any]:
    with listen(engine, store) as client:
        yield client


def ask_all(client: Any, users: Iterable[str], count: int) -> list[tuple[str, str]]:
    """Request a text for each user at once."""

    def ask(user: str) -> tuple[str, str]:
        answer = client.completions.create(model=user, prompt="abc", max_tokens=count, temperature=0)
        return user, answer.choices[0].text

    with ThreadPoolExecutor(64) as pool:
        return list(pool.map(ask, users))


def run_jobs(engine: Engine, jobs: list[Job]) -> list[tuple[str, str | None]]:
    """Texts of jobs that are submitted at once, and the reasons of their ends."""
    parts: list[list[Any]] = [[] for _ in jobs]
    ended = threading.Semaphore(0)
    for job, own in zip(jobs, parts, strict=True):
        job.deliver = lambda part, reason, own=own: (own.append((part, reason)), reason and ended.release())
    engine.submit(jobs)
    for _ in jobs:
        assert ended.acquire(timeout=60)
    assert not any(isinstance(part, Exception) for own in parts for part, _ in own), parts
    return [("".join(part for part, _ in own), own[-1][1]) for own in parts]


@pytest.fixture
def sizes(engine, monkeypatch) -> list[int]:
    """The sizes of all batches."""
    found: list[int] = []
    generate = engine._generate
    monkeypatch.setattr(engine, "_generate", lambda jobs: (found.append(len(jobs)), generate(jobs)))
    return found


def make_jobs(engine: Engine, packed: dict[str, bytes], count: int = 12, **options) -> list[tuple[Job, Any, str]]:
    """Jobs of every user, and of the base model, for prompts of several lengths."""
    return [
        (Job(engine.tokenizer(prompt)["input_ids"], user and engine.read(packed[user]), count, **options), user, prompt)
        for user in (None, *USERS)
        for prompt in PROMPTS
    ]


def test_users_of_one_batch_get_the_text_of_their_model_alone(engine, packed, alone, sizes):
    jobs = make_jobs(engine, packed)
    texts = run_jobs(engine, [job for job, _, _ in jobs])
    expected = [expect(alone[user], prompt, 12) for _, user, prompt in jobs]
    assert [text for text, _ in texts] == expected
    assert sizes == [16]
    assert len(set(expected)) > 12
    engine.close()


@pytest.mark.parametrize("wanted", [{"max_batch": 3}, {"SLICE": 2}, {"max_batch": 3, "SLICE": 2}], ids=str)
def test_requests_take_turns_without_a_change_of_their_text(wanted, engine, packed, alone, sizes, monkeypatch):
    engine.max_batch = wanted.get("max_batch", 16)
    monkeypatch.setattr("peft_intrinsic.serving.engine.SLICE", wanted.get("SLICE", 32))
    jobs = make_jobs(engine, packed)
    first, *others = [job for job, _, _ in jobs]
    texts = run_jobs(engine, [first]) + run_jobs(engine, others)
    assert [text for text, _ in texts] == [expect(alone[user], prompt, 12) for _, user, prompt in jobs]
    assert max(sizes[1:]) == min(engine.max_batch, 15)
    assert len(sizes) == 2 if wanted == {"SLICE": 2} else len(sizes) > 5
    engine.close()


def test_prompts_that_fill_the_context_are_batched_with_short_ones(engine, packed, alone, monkeypatch):
    """Beside the long one, the short one may take two more tokens only; the next batch continues it."""
    lengths: list[int] = []
    generate = engine._model.generate

    def record(**options) -> Any:
        lengths.append(options["input_ids"].shape[1] + options["max_new_tokens"])
        return generate(**options)

    monkeypatch.setattr(engine._model, "generate", record)
    adapter = engine.read(packed["ann"])
    jobs = [Job(engine.tokenizer("a" * n)["input_ids"], adapter, 64 - n) for n in (62, 3)]
    texts = run_jobs(engine, jobs)
    assert texts == [(expect(alone["ann"], "a" * n, 64 - n), "length") for n in (62, 3)]
    assert lengths == [64, 64]
    engine.close()


def test_32_users_at_once_get_their_own_text(store, alone):
    """And the base model that of no user."""
    users = [f"user{i}" for i in range(32)]
    expected = {"base": expect(alone[None], "abc", 10)}
    for seed in (0, 1):
        model = adapted("llama", "", seed=seed)
        theta = model.get_base_model().intrinsic.intrinsic_theta["default"].weight.data
        for user in users[seed::2]:
            theta.normal_()
            (store / f"{user}.pia").write_bytes(data := pack(model))
            theta.copy_(torch.from_numpy(read_packed(data).theta))
            expected[user] = expect(model, "abc", 10)
    assert len(set(expected.values())) > 28
    with listen(Engine(make_base("llama"), make_tokenizer()), store) as client:
        assert dict(ask_all(client, [*users, "base"] * 2, 10)) == expected
        assert {text for _, text in ask_all(client, ["base"] * 8, 10)} == {expected["base"]}


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 5, "top_p": 0.9}, {"temperature": 0, "stop": ["z"]}])
def test_a_stream_concatenates_to_the_whole_answer(options, online):
    for user in ("base", "ann"):
        for prompt in PROMPTS[:2]:
            create = online.completions.create
            whole = create(model=user, prompt=prompt, max_tokens=12, **options)
            parts = list(create(model=user, prompt=prompt, max_tokens=12, stream=True, **options))
            assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
            assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    messages = [{"role": "user", "content": "ab"}, {"role": "user", "content": [{"type": "text", "text": "c"}]}]
    create = online.chat.completions.create
    whole = create(model="ann", messages=messages, max_completion_tokens=12, **options)
    usage = {"stream_options": {"include_usage": True}}
    *parts, last = create(model="ann", messages=messages, max_tokens=12, stream=True, **usage, **options)
    assert "".join(part.choices[0].delta.content for part in parts) == whole.choices[0].message.content
    assert parts[0].choices[0].delta.role == "assistant"
    assert last.usage == whole.usage
    assert whole.usage.prompt_tokens == 3


def test_a_chat_has_the_text_of_its_template(client, alone):
    messages = [{"role": "user", "content": "hello "}, {"role": "user", "content": "world"}]
    response = client.post(
        "/v1/chat/completions", json={"model": "bob", "messages": messages, "max_tokens": 9, "temperature": 0}
    )
    assert response.json()["choices"][0]["message"]["content"] == expect(alone["bob"], "hello world", 9)


def test_each_request_has_its_own_limit_and_stops(engine, packed, alone):
    adapter = engine.read(packed["ann"])
    jobs, expected = [], []
    for prompt in PROMPTS:
        text = expect(alone["ann"], prompt, 20)
        stops = [text[i : i + n] for n in (1, 2, 3) for i in range(18) if "\ufffd" not in text[i : i + n]]
        assert len(stops) > 5
        for count, stop in ((5, []), (9, []), (20, ["not in it", stops[0]]), (20, stops[-1:]), (20, stops[2:])):
            jobs.append(Job(engine.tokenizer(prompt)["input_ids"], adapter, count, stop=stop))
            limited = expect(alone["ann"], prompt, count)
            ends = [text.index(each) for each in stop if each in text]
            expected.append((limited[: min(ends, default=None)], "stop" if ends else "length"))
    assert run_jobs(engine, jobs) == expected
    engine.close()


def test_an_answer_ends_at_the_end_of_sequence_token(engine, alone):
    ends = make_tokenizer()("o")["input_ids"]
    engine._ends = {*ends}
    (text,) = run_jobs(engine, [Job(engine.tokenizer("hello world")["input_ids"], None, 12)])
    whole = expect(alone[None], "hello world", 12)
    assert "o" in whole
    assert text == (whole.partition("o")[0], "stop")
    engine.close()


@pytest.mark.parametrize(("temperature", "top_p"), [(1, 1), (0.5, 1), (1.5, 0.7), (1, 0.01)])
def test_tokens_have_the_distribution_of_transformers_samplers(temperature, top_p):
    scores = torch.linspace(0, 3, 8)
    scores = scores[torch.randperm(8, generator=torch.Generator().manual_seed(0))]
    job = Job([1], None, 1, temperature, top_p, seed=0)
    count = 8000
    found = torch.bincount(torch.stack([job.choose(scores).argmax() for _ in range(count)]), minlength=8) / count
    wanted = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(float(temperature))(None, scores[None]))
    torch.testing.assert_close(found, wanted[0].softmax(-1), rtol=0, atol=5 / count**0.5 / 2)


def test_a_seed_gives_the_same_text_in_any_batch(engine, packed):
    jobs = make_jobs(engine, packed, temperature=1.0, seed=3)
    together = run_jobs(engine, [job for job, _, _ in jobs])
    one_by_one = [run_jobs(engine, [job])[0] for job, _, _ in make_jobs(engine, packed, temperature=1.0, seed=3)]
    assert together == one_by_one
    assert together != run_jobs(engine, [job for job, _, _ in make_jobs(engine, packed, temperature=1.0, seed=4)])
    assert run_jobs(engine, [jobs[0][0].__class__([5, 6], None, 40, 1.0) for _ in range(2)])[0] != together[0]
    engine.close()


def test_adapters_are_those_of_the_store_now(client, store, packed, alone):
    for user in ("ann", "bob", "ann"):
        (store / "ann.pia").write_bytes(packed[user])
        assert text_of(complete(client, "ann")) == expect(alone[user], "abc", 8)
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["base", *USERS]
    (store / "ann.pia").unlink()
    assert "There is no model 'ann'" in error_of(complete(client, "ann"), 404)
    assert text_of(complete(client, "base")) == expect(alone[None], "abc", 8)


PROJECTIONS: list[dict[str, Any]] = [
    {},
    {"projection": "value_bias"},
    {"projection": "value_lora"},
    {"said": True, "target_modules": "all"},
    {"seed": 1, "target_modules": "norms-and-biases"},
]


def test_adapters_of_several_projections_are_served_together(store, monkeypatch):
    """Packed and saved, and more than are attached at a time."""
    monkeypatch.setattr("peft_intrinsic.serving.mixture.MAX_KINDS", 2)
    expected = {"base": expect(make_base("llama"), "abc", 8)}
    for i, options in enumerate(PROJECTIONS):
        model = adapted("llama", "dora", **options)
        (store / f"packed{i}.pia").write_bytes(data := pack(model))
        expected[f"packed{i}"] = expect(load_packed(make_base("llama"), data), "abc", 8)
        model.save_pretrained(store / f"saved{i}")
        expected[f"saved{i}"] = expect(PeftModel.from_pretrained(make_base("llama"), store / f"saved{i}"), "abc", 8)
    assert len(set(expected.values())) > 4
    engine = Engine(make_base("llama"), make_tokenizer())
    with listen(engine, store) as client:
        for _ in range(2):
            assert dict(ask_all(client, expected, 8)) == expected
    assert len(engine._mixture._kinds) == 2


def test_attached_adapters_have_no_parameters_of_a_user(engine, packed, tmp_path):
    adapted("llama", "ann", init_weights=False).save_pretrained(tmp_path)
    for stored in (packed["ann"], tmp_path):
        run_jobs(engine, [Job([5, 6], engine.read(stored), 2)])
    vectors = engine._model.intrinsic.intrinsic_theta
    assert len(vectors) == 2
    assert not any(vector.weight.any() for vector in vectors.values())
    engine.close()


def bad_adapters(folder: Path, packed: bytes) -> dict[str, str]:
    """Write adapters that cannot be served, and return their names and errors."""
    other = make_base("llama")
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    options: dict[str, Any] = {"d": 30, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    files = {
        "damaged": packed[:-1] + bytes([packed[-1] ^ 1]),
        "short": packed[:20],
        "empty": b"",
        "foreign": pack(get_peft_model(other, IntrinsicConfig(**options))),
        "classifier": pack(adapted("bert", "ann")),
    }
    for name, data in files.items():
        (folder / f"{name}.pia").write_bytes(data)
    get_peft_model(make_base("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder / "lora")
    full = get_peft_model(make_base("llama"), IntrinsicConfig(**options, modules_to_save=["lm_head"]))
    full.save_pretrained(folder / "full")
    wide = build("qwen2")
    get_peft_model(wide, IntrinsicConfig(d=30, target_modules="all")).save_pretrained(folder / "other_shapes")
    adapted("llama", "ann").save_pretrained(folder / "flipped")
    weights = folder / "flipped/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    (folder / "no_config").mkdir()
    (folder / "no_config/adapter_config.json").write_text("{")
    return {
        "damaged": "damaged",
        "short": "damaged",
        "empty": "cannot be read",
        "foreign": "made for a base model with digest",
        "classifier": "has the task SEQ_CLS",
        "lora": "of the method",
        "full": "trains modules_to_save",
        "other_shapes": "cannot be used",
        "flipped": "checksum",
        "no_config": "cannot be read",
    }


def test_adapters_that_cannot_be_served_give_an_error_and_the_server_lives(client, store, packed, alone):
    for name, message in bad_adapters(store, packed["ann"]).items():
        assert message in error_of(complete(client, name)), name
        assert message in error_of(complete(client, name, stream=True)), name
        assert text_of(complete(client, "bob")) == expect(alone["bob"], "abc", 8)
        assert text_of(complete(client, "base")) == expect(alone[None], "abc", 8)
    assert client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("said", [False, True])
def test_an_adapter_of_other_shapes_fails_alone_in_its_batch(said, engine, tmp_path):
    model = adapted("llama", "ann", said=said)
    model.save_pretrained(tmp_path)
    config = {**json.loads((tmp_path / "adapter_config.json").read_text()), "checksum": None}
    state = load_file(tmp_path / "adapter_model.safetensors")
    key = next(key for key in state if "intrinsic_theta" in key)

    def read(values: dict[str, torch.Tensor]) -> Any:
        return engine.read(save(values, {"adapter_config": json.dumps(config)}))

    damaged = [{**state, key: state[key][:-1].clone()}, {**state, key: state[key].view(-1, 1).clone()}]
    if said:
        damaged.append({key: torch.ones(20)})  # d entries without λ
    prompt = engine.tokenizer("abc")["input_ids"]
    expected = [(expect(model, "abc", 8), "length")]
    assert run_jobs(engine, [Job(prompt, read(state), 8)]) == expected
    jobs = [Job(prompt, read(values), 8) for values in damaged]
    parts: list[Any] = []
    for job in jobs:
        job.deliver = lambda part, reason: parts.append(part)
    engine.submit(jobs)
    assert run_jobs(engine, [Job(prompt, read(state), 8)]) == expected
    assert [type(part) for part in parts] == [ValueError] * len(jobs)
    assert all("θ and λ have the shapes" in str(part) for part in parts)
    engine.close()


def test_an_adapter_that_is_infinite_in_float32_cannot_be_read(engine, tmp_path):
    adapted("llama", "ann").save_pretrained(tmp_path)
    config = {**json.loads((tmp_path / "adapter_config.json").read_text()), "checksum": None}
    state = load_file(tmp_path / "adapter_model.safetensors")
    stored = save(
        {key: values.double() * 1e300 for key, values in state.items()}, {"adapter_config": json.dumps(config)}
    )
    with pytest.raises(ValueError, match="infinite"):
        engine.read(stored)
    engine.close()


def test_a_store_that_cannot_be_reached_gives_an_error(client, monkeypatch):
    def fail(*args: Any) -> None:
        raise ConnectionError("The Hub failed.")

    monkeypatch.setattr("peft_intrinsic.serving.store.FolderStore.get", fail)
    assert error_of(complete(client, "ann"), 503) == "The Hub failed."
    assert complete(client, "base").status_code == 200


@pytest.mark.parametrize("name", ["../store/ann", "/etc/passwd", "a/b", ".ann", "", "ann\0", "x" * 129, "ann.pia/.."])
def test_names_that_are_paths_give_an_error(name, client):
    assert "is no name of an adapter" in error_of(complete(client, name))


def test_names_that_are_not_in_the_store_are_not_found(online):
    with pytest.raises(openai.NotFoundError, match="There is no model 'dora'") as raised:
        online.completions.create(model="dora", prompt="a")
    assert raised.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="Not Found"):
        online.embeddings.create(model="ann", input="a")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": None}, "prompt is invalid: Field required"),
        ({"prompt": []}, "prompt is invalid"),
        ({"prompt": [1, 2]}, "prompt.0 is invalid"),
        ({"prompt": ""}, "A prompt has 0 tokens"),
        ({"prompt": "a" * 64}, "A prompt has 64 tokens, and max_tokens is 8. Pass"),
        ({"max_tokens": 62}, "at most 64 tokens in all"),
        ({"max_tokens": 0}, "max_tokens is invalid"),
        ({"max_tokens": "8"}, "max_tokens is invalid"),
        ({"temperature": -1}, "temperature is invalid"),
        ({"temperature": 3}, "temperature is invalid"),
        ({"top_p": 0}, "top_p is invalid"),
        ({"seed": 2**63}, "seed is invalid"),
        ({"stop": ""}, "stop is invalid"),
        ({"stop": ["a", ""]}, "stop.1 is invalid"),
        ({"n": 2}, "n is invalid: Input should be 1"),
        ({"best_of": 2}, "best_of is invalid"),
        ({"echo": True}, "echo is invalid"),
        ({"presence_penalty": 0.5}, "presence_penalty is invalid"),
        ({"logprobs": 1}, "logprobs is not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias is not supported"),
        ({"min_p": 0.1, "top_k": 5}, "top_k is not supported"),
        ({"stream_options": {"x": 1}}, "stream_options.x is not supported"),
        ({"model": 5}, "model is invalid"),
    ],
    ids=str,
)
def test_fields_that_are_wrong_or_not_supported_are_named(body, message, client):
    assert message in error_of(complete(client, **{"model": "ann", **body}))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": []}, "messages is invalid"),
        ({"messages": [{"role": "user"}]}, "messages.0.content is invalid: Field required"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": []}]}, "messages.0.tool_calls is not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0"),
        ({"tools": [{}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"logprobs": True}, "logprobs is invalid"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "Pass one of them"),
    ],
    ids=str,
)
def test_fields_of_chats_that_are_wrong_or_not_supported_are_named(body, message, client):
    body = {"model": "ann", "messages": [{"role": "user", "content": "a"}], **body}
    assert message in error_of(client.post("/v1/chat/completions", json=body))


def test_bodies_that_are_no_json_object_give_an_error(client):
    for content in (b"{", b"[]", b"", b"5"):
        response = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert "The body is invalid" in error_of(response), content


def test_fields_without_effect_are_accepted(client, alone):
    neutral = {"n": 1, "best_of": 1, "echo": False, "logprobs": None, "presence_penalty": 0, "user": "x", "top_p": 1.0}
    assert text_of(complete(client, "ann", **neutral)) == expect(alone["ann"], "abc", 8)


def test_several_prompts_have_an_answer_each(client, alone):
    body = complete(client, "base", PROMPTS).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in body["choices"]] == [expect(alone[None], prompt, 8) for prompt in PROMPTS]
    assert body["usage"] == {"prompt_tokens": sum(map(len, PROMPTS)), "completion_tokens": 32, "total_tokens": 58}


def test_a_tokenizer_without_a_template_has_no_chats(store):
    engine = Engine(make_base("llama"), make_tokenizer(chat=False))
    with fastapi.TestClient(create_app(engine, open_store(str(store)), "base")) as client:
        body = {"model": "ann", "messages": [{"role": "user", "content": "a"}]}
        assert "has no chat template. Use /v1/completions" in error_of(client.post("/v1/chat/completions", json=body))
        assert "Use /v1/completions" in error_of(client.post("/classify", json={"model": "ann", "input": "a"}))


def test_a_failed_batch_gives_an_error_and_the_next_one_is_answered(client, alone, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("transformers.GenerationMixin.generate", lambda *args, **options: 1 / 0)
        assert "division by zero" in error_of(complete(client, "ann"), 500)
        error = complete(client, "ann", stream=True)
        assert "division by zero" in error_of(error, 500)
    assert text_of(complete(client, "ann")) == expect(alone["ann"], "abc", 8)


def test_a_client_that_disconnects_frees_its_row(engine, online, monkeypatch):
    jobs: list[Job] = []
    submit, push = engine.submit, Job.push
    monkeypatch.setattr(engine, "submit", lambda new: (jobs.extend(new), submit(new)))
    monkeypatch.setattr(Job, "push", lambda *args: (time.sleep(0.1), push(*args))[1])
    options = {"model": "base", "prompt": "abc", "max_tokens": 60, "temperature": 0}
    stream = online.completions.create(**options, stream=True)
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        online.completions.create(**options, timeout=0.5)
    assert len(jobs) == 2
    while not all(job.done for job in jobs):
        time.sleep(0.01)
    assert max(job.count for job in jobs) < 60
    assert online.completions.create(**{**options, "max_tokens": 2}).usage.completion_tokens == 2


def test_an_answer_may_begin_with_a_space():
    """Decoders of sentencepiece leave out the first space of all tokens that they get."""
    vocabulary = {word: i for i, word in enumerate(["?", "▁a", "▁b", "▁c", "d"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.decoder = decoders.Metaspace()
    parts: list[str] = []
    job = Job([1, 2], None, 3)
    job.deliver = lambda part, reason: parts.append(part)
    assert [job.push(token, PreTrainedTokenizerFast(tokenizer_object=tokenizer), set()) for token in (3, 4, 1)][-1]
    assert parts == [" c", "d", " a"]


def test_classes_are_those_of_each_users_model(tmp_path):
    tokenizer = make_tokenizer()
    texts = ["abc", "hello world", "x"]
    expected = {}
    for user, options in (("ann", {}), ("bob", {}), ("carl", {"target_modules": "norms-and-biases", "seed": 2})):
        data = pack(adapted("bert", user, **options))
        (tmp_path / f"{user}.pia").write_bytes(data)
        expected[user] = load_packed(make_base("bert"), data)
    saved = tmp_path / "saved"
    adapted("bert", "dora", seed=3).save_pretrained(saved)
    expected["dora"] = PeftModel.from_pretrained(make_base("bert"), saved).eval()
    metadata = {"adapter_config": (saved / "adapter_config.json").read_text()}
    (tmp_path / "dora.safetensors").write_bytes(save(load_file(saved / "adapter_model.safetensors"), metadata))
    expected["base"] = make_base("bert")
    cutting = make_tokenizer()
    cutting.backend_tokenizer.enable_truncation(8)
    cutting.backend_tokenizer.enable_padding(length=8)
    engine = Engine(make_base("bert"), cutting)
    assert cutting.backend_tokenizer.truncation is cutting.backend_tokenizer.padding is None
    with fastapi.TestClient(create_app(engine, open_store(str(tmp_path)), "base")) as client:
        found = []
        for user, model in expected.items():
            body = client.post("/classify", json={"model": user, "input": texts}).json()
            for text, row in zip(texts, body["data"], strict=True):
                with torch.no_grad():
                    wanted = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
                torch.testing.assert_close(torch.tensor(row["probs"]), wanted, **CLOSE)
                assert row["label"] == f"LABEL_{wanted.argmax()}"
            found.append(tuple(row["probs"]))
        assert len(set(found)) == len(found)
        assert "Use /classify" in error_of(complete(client, "ann"))
        error = error_of(client.post("/classify", json={"model": "ann", "input": "a" * 65}))
        assert "A text has 65 tokens, and the model takes 64" in error
        assert "input is invalid" in error_of(client.post("/classify", json={"model": "ann", "input": []}))


def test_models_that_cannot_be_served_raise():
    for family, message in (("t5", "an encoder and a decoder"), ("bert_mlm", "is no classifier")):
        with pytest.raises(ValueError, match=message):
            Engine(build(family), make_tokenizer())
    with pytest.raises(ValueError, match="max_batch=0 must be at least 1"):
        Engine(build("llama"), make_tokenizer(), max_batch=0)


def test_requests_at_the_end_of_the_engine_get_an_error(engine, packed, monkeypatch):
    jobs = [Job([5, 6], engine.read(packed["ann"]), 60) for _ in range(20)]
    errors: list[Any] = []
    started = threading.Event()
    for job in jobs:
        job.deliver = lambda part, reason: (started.set(), reason and errors.append(part))
    push = Job.push
    monkeypatch.setattr(Job, "push", lambda *args: (time.sleep(0.01), push(*args))[1])
    engine.submit(jobs)
    assert started.wait(60)
    engine.close()
    assert len(errors) == 20
    assert all("is shutting down" in str(error) for error in errors)


@pytest.mark.slow
def test_the_command_serves_again_after_it_was_killed(tmp_path, store, alone):
    make_base("llama").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "peft_intrinsic",
        "serve",
        "--model",
        "base",
        "--store",
        "store",
        "--port",
        str(port),
    ]
    before = sorted(tmp_path.rglob("*"))
    for end in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(command, cwd=tmp_path)
        try:
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=100) as client:
                assert ask_all(client, ["ann"], 8) == [("ann", expect(alone["ann"], "abc", 8))]
                stream = client.completions.create(model="bob", prompt="abc", max_tokens=60, stream=True)
                next(iter(stream))
                process.send_signal(end)
            assert process.wait(60) == (-signal.SIGKILL if end == signal.SIGKILL else 0)
        finally:
            process.kill()
            process.wait()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("family", "user", "options", "task", "name"),
    [
        ("llama", "ann", [], "CAUSAL_LM", "LlamaForCausalLM"),
        ("bert", "ann", [], "SEQ_CLS", "BertForSequenceClassification"),
        ("llama", None, [], None, "LlamaForCausalLM"),
        ("bert", None, [], None, "BertForSequenceClassification"),
        ("llama", None, ["--task", "classification"], None, "LlamaForSequenceClassification"),
    ],
)
def test_the_task_is_that_of_the_option_the_first_adapter_or_the_checkpoint(
    family, user, options, task, name, tmp_path, monkeypatch
):
    make_base(family).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "store").mkdir()
    if user:
        (tmp_path / "store/ann.pia").write_bytes(pack(adapted(family, user)))
    served: list[Any] = []
    monkeypatch.setattr("peft_intrinsic.serving.app.create_app", lambda engine, store, name: served.append(engine))
    monkeypatch.setattr("uvicorn.run", lambda *args, **options: served.append(options))
    main(["serve", "--model", str(tmp_path / "base"), "--store", str(tmp_path / "store"), *options])
    engine, network = served
    assert type(engine._model).__name__ == name
    assert network["host"] == "127.0.0.1"
    engine.close()


def test_missing_packages_are_reported_with_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "--model", "base", "--store", str(tmp_path)])
    assert "[serve]" in capsys.readouterr().err
