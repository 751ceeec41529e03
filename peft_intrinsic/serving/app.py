"""The HTTP interface of an engine, in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .bodies import ApiError, Chat, Classification, Completion, Generation, explain
from .engine import Engine, Job
from .mixture import Adapter
from .store import AdapterStore

MAX_TOKENS = 16
"""Default of `max_tokens` for completions, that of OpenAI. For chats it is the rest of the model's context."""

POLL = 0.5
"""Seconds without a token after which the server checks whether the client is connected, as it does at every token."""


def create_app(engine: Engine, store: AdapterStore, name: str) -> FastAPI:
    """Create the application.

    Args:
        engine: answers the requests. It is closed with the application.
        store: the adapters, whose names are names of models.
        name: name of the base model.
    """
    started = int(time.time())
    tokenizer: Any = engine.tokenizer

    @asynccontextmanager
    async def run(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.close)

    app = FastAPI(title="peft_intrinsic", lifespan=run)
    _add_error_handlers(app)

    def find(model: str) -> Adapter | None:
        """Read an adapter from the store; None is the base model."""
        if model == name:
            return None
        try:
            stored = store.get(model)
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_model") from None
        except ConnectionError as error:
            raise ApiError(503, str(error), "store_unavailable") from None
        if stored is None:
            message = f"There is no model {model!r}. Use {name!r}, or an adapter of the store: see /v1/models."
            raise ApiError(404, message, "model_not_found")
        try:
            return engine.read(stored)
        except Exception as error:  # whatever a file causes
            raise ApiError(400, f"The adapter {model!r} cannot be read. {error}", "invalid_adapter") from None

    def check_task(generates: bool) -> None:
        if engine.generates != generates:
            use = "/v1/completions" if engine.generates else "/classify"
            raise ApiError(400, f"{name!r} does not serve this endpoint. Use {use}.")

    def make_jobs(body: Generation, prompts: Sequence[list[int]], limit: int | None, default: int) -> list[Job]:
        adapter = find(body.model)
        stop = [body.stop] if isinstance(body.stop, str) else body.stop
        jobs = []
        for tokens in prompts:
            new = limit or max(1, min(default, engine.context - len(tokens)))
            if not tokens or len(tokens) + new > engine.context:
                raise ApiError(
                    400,
                    f"A prompt has {len(tokens)} tokens, and max_tokens is {new}. Pass a prompt that is not empty, and "
                    f"at most {engine.context} tokens in all.",
                    "context_length_exceeded",
                )
            jobs.append(Job(tokens, adapter, new, body.temperature, body.top_p, body.seed, stop))
        return jobs

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"}) if engine.is_alive else ApiError(503, "The engine ended.").respond()

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        head = {"object": "model", "created": started, "owned_by": "peft_intrinsic"}
        return {"object": "list", "data": [{"id": each, **head} for each in (name, *store.names())]}

    @app.post("/v1/completions")
    async def complete(body: Completion, request: Request) -> Response:
        def make() -> list[Job]:
            texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
            prompts = [tokenizer(text)["input_ids"] for text in texts]
            return make_jobs(body, prompts, body.max_tokens, MAX_TOKENS)

        check_task(generates=True)
        return await _respond(request, body, await run_in_threadpool(make), "text_completion")

    @app.post("/v1/chat/completions")
    async def chat(body: Chat, request: Request) -> Response:
        def make() -> list[Job]:
            if not getattr(tokenizer, "chat_template", None):
                raise ApiError(400, f"The tokenizer of {name!r} has no chat template. Use /v1/completions.")
            if body.max_tokens and body.max_completion_tokens:
                raise ApiError(400, "max_tokens and max_completion_tokens mean the same. Pass one of them.")
            messages = [message.as_text() for message in body.messages]
            try:
                encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            except Exception as error:  # whatever a template raises
                raise ApiError(400, f"messages do not fit the chat template of {name!r}: {error}") from None
            limit = body.max_tokens or body.max_completion_tokens
            return make_jobs(body, [encoded["input_ids"]], limit, engine.context)

        check_task(generates=True)
        return await _respond(request, body, await run_in_threadpool(make), "chat.completion")

    @app.post("/classify")
    async def classify(body: Classification, request: Request) -> Response:
        def make() -> list[Job]:
            texts = [body.input] if isinstance(body.input, str) else body.input
            encoded = [tokenizer(text)["input_ids"] for text in texts]
            if (longest := max(map(len, encoded))) > engine.context:
                message = f"A text has {longest} tokens, and the model takes {engine.context}. Pass a shorter one."
                raise ApiError(400, message, "context_length_exceeded")
            adapter = find(body.model)
            return [Job(tokens, adapter) for tokens in encoded]

        check_task(generates=False)
        jobs = await run_in_threadpool(make)
        data: list[Any] = [None] * len(jobs)
        async for index, values, _ in _answer(engine, request, jobs):
            label = engine.labels[max(range(len(values)), key=values.__getitem__)]
            data[index] = {"index": index, "label": label, "probs": values, "num_classes": len(values)}
        return JSONResponse({**_head("list", body.model), "data": data, "usage": _count(jobs)})

    async def _respond(request: Request, body: Generation, jobs: list[Job], kind: str) -> Response:
        parts = _answer(engine, request, jobs)
        if body.stream:
            first = await anext(parts)  # before the status is sent
            return StreamingResponse(_stream(body, jobs, first, parts, kind), media_type="text/event-stream")
        texts, reasons = [""] * len(jobs), [""] * len(jobs)
        async for index, text, reason in parts:
            texts[index] += text
            reasons[index] = reason or ""
        chat = kind == "chat.completion"
        said = [{"message": {"role": "assistant", "content": text}} if chat else {"text": text} for text in texts]
        choices = [_choice(index, each, end) for index, (each, end) in enumerate(zip(said, reasons, strict=True))]
        return JSONResponse({**_head(kind, body.model), "choices": choices, "usage": _count(jobs)})

    return app


def _add_error_handlers(app: FastAPI) -> None:
    """Give all errors OpenAI's form."""

    def handle(kind: type[Exception], respond: Any) -> None:
        async def handler(request: Request, error: Any) -> Response:
            return respond(error)

        app.add_exception_handler(kind, handler)

    handle(ApiError, ApiError.respond)
    handle(RequestValidationError, lambda error: ApiError(400, explain(error.errors())).respond())
    handle(HTTPException, lambda error: ApiError(error.status_code, f"{error.detail}.").respond())
    handle(ClientDisconnect, lambda error: Response(status_code=499))
    handle(Exception, lambda error: ApiError(500, "The server failed. Its log has the error.").respond())


async def _answer(engine: Engine, request: Request, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, Any, str | None]]:
    """Yield the index, part and reason of the end of all answers. They are canceled if the client disconnects."""
    loop = asyncio.get_running_loop()
    parts: asyncio.Queue[tuple[int, Any, str | None]] = asyncio.Queue()

    def put(index: int, part: Any, reason: str | None) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(parts.put_nowait, (index, part, reason))

    for index, job in enumerate(jobs):
        job.deliver = partial(put, index)
    engine.submit(jobs)
    left = len(jobs)
    try:
        while left:
            if await request.is_disconnected():
                raise ClientDisconnect
            try:
                index, part, reason = await asyncio.wait_for(parts.get(), POLL)
            except asyncio.TimeoutError:
                continue
            if isinstance(part, ValueError):
                raise ApiError(400, f"The adapter cannot be used. {part}", "invalid_adapter")
            if isinstance(part, Exception):
                raise ApiError(500, str(part))
            left -= reason is not None
            yield index, part, reason
    finally:
        for job in jobs:
            job.done = True


async def _stream(body: Generation, jobs: list[Job], first: Any, parts: Any, kind: str) -> AsyncIterator[str]:
    """Write the parts of answers as server-sent events."""
    chat = kind == "chat.completion"
    head = _head(f"{kind}.chunk" if chat else kind, body.model)

    def write(index: int, text: str, reason: str | None, **more: str) -> str:
        said = {"delta": {**more, "content": text}} if chat else {"text": text}
        return _event({**head, "choices": [_choice(index, said, reason)]})

    try:
        if chat:
            yield write(0, "", None, role="assistant")
        yield write(*first)
        async for part in parts:
            yield write(*part)
        if body.stream_options.include_usage:
            yield _event({**head, "choices": [], "usage": _count(jobs)})
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body)
    finally:
        await parts.aclose()


def _event(data: Any) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"{kind}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _choice(index: int, said: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": index, **said, "finish_reason": reason, "logprobs": None}


def _count(jobs: Sequence[Job]) -> dict[str, int]:
    prompt, new = sum(job.prompt for job in jobs), sum(job.count for job in jobs)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
