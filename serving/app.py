"""The web application: completions and chat as the OpenAI clients want them, health, models, metrics.

Errors are `{"error": {"message", "type"}}` with a status that says whose fault it is. A client that hangs up, streaming
or not, frees what its request held.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from serving.admission import Busy, Refused
from serving.answers import CHAT, COMPLETION, Answer, Form
from serving.api import Asked, Body, ChatBody, CompletionBody, chat, completion
from serving.backend import Backend, EngineFailed
from serving.calls import Delta
from serving.guard import Guard, ServerSettings, error_body
from serving.metrics import Metrics

HUNG_UP = 499


def create_app(backend: Backend, settings: ServerSettings) -> FastAPI:
    """An application over a backend, which it starts and stops."""
    metrics = Metrics(backend)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await backend.start()
        yield
        await backend.stop()

    app = FastAPI(title="dualpipe serving", lifespan=lifespan)
    _add_errors(app)
    app.add_middleware(Guard, settings=settings, metrics=metrics)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await answer(body, request, completion(body, backend.tokenizer, backend.max_length), COMPLETION)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        return await answer(body, request, chat(body, backend.tokenizer, backend.max_length), CHAT)

    async def answer(body: Body, request: Request, asked: Asked, form: Form) -> Response:
        if body.model != settings.name:
            raise HTTPException(404, f"there is no model {body.model!r} here, only {settings.name!r}")
        deltas = backend.submit(asked.requests, asked.stop)
        made = Answer(form, settings.name, asked.prompt_tokens, len(asked.requests))
        ids = [r.id for r in asked.requests]
        if body.stream:
            chunks = _stream(backend, ids, deltas, made, body.wants_usage)
            return StreamingResponse(chunks, media_type="text/event-stream")
        return await _whole(backend, ids, deltas, made, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": settings.name, "object": "model", "created": 0, "owned_by": "local"}]}

    @app.get("/health")
    async def health() -> Response:
        if backend.failed is not None:
            return JSONResponse({"status": "failed", "reason": backend.failed}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    return app


async def _stream(
    backend: Backend, ids: Sequence[str], deltas: asyncio.Queue[Delta], made: Answer, wants_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events. The framework cancels this when the client hangs up."""
    try:
        for chunk in made.opening():
            yield _event(chunk)
        while not made.complete:
            delta = await deltas.get()
            if delta.error is not None:
                yield _event(error_body(500, delta.error))
                return
            made.add(delta)
            if delta.text or delta.finish is not None:
                yield _event(made.chunk(delta))
        if wants_usage:
            yield _event(made.usage_chunk())
        yield "data: [DONE]\n\n"
    finally:
        backend.cancel(ids)


async def _whole(
    backend: Backend, ids: Sequence[str], deltas: asyncio.Queue[Delta], made: Answer, request: Request
) -> Response:
    """Everything at once; given up when the client hangs up."""

    async def collect() -> None:
        while not made.complete:
            delta = await deltas.get()
            if delta.error is not None:
                raise EngineFailed(delta.error)
            made.add(delta)

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(collect()), asyncio.create_task(hang_up())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
            return JSONResponse(made.whole())
        return Response(status_code=HUNG_UP)
    finally:
        for task in tasks:
            task.cancel()
        backend.cancel(ids)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _add_errors(app: FastAPI) -> None:
    """Every exception that means something as a response with its reason."""
    statuses: dict[type[Exception], int] = {Refused: 400, Busy: 429, EngineFailed: 503}

    async def by_status(_: Request, error: Exception) -> Response:
        return JSONResponse(error_body(statuses[type(error)], str(error)), statuses[type(error)])

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code)

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return JSONResponse(error_body(400, f"{where}: {first['msg']}" if where else str(first["msg"])), 400)

    for kind in statuses:
        app.add_exception_handler(kind, by_status)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
