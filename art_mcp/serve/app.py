"""The routes of an endpoint. Sockets and lifetimes are `listen`'s business."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from secrets import token_hex
from typing import Any, TypeVar

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from art_mcp.agent.group import first_failure
from art_mcp.errors import EngineError
from art_mcp.serve.asked import Asked, read_asked
from art_mcp.serve.bodies import Body
from art_mcp.serve.guard import Guard
from art_mcp.serve.openapi import describe_api
from art_mcp.serve.refusal import Refusal
from art_mcp.serve.turn import Answer, Voice, answer

Result = TypeVar("Result")

BODY_LIMIT = 4 * 2**20
"""Bytes of a request."""
PATIENCE = 8
"""How many times as much is read, and thrown away, before a client is cut off."""
RETRY_AFTER = "5"
"""Seconds; the openai client waits so long, and asks again."""
GONE = Response(status_code=499)
"""For a client that no longer listens; nobody reads it."""


class Desk:
    """Answers for `voices`, models by name (one may stand there by several), which may change while it does; `close` refuses
    what is being sampled, and all that is asked from then on. `loading`: clients are asked to come back later, for as long as
    it is set."""

    def __init__(self, voices: Mapping[str, Voice], *, loading: bool = False, body_limit: int = BODY_LIMIT) -> None:
        self._voices, self.loading, self._body_limit = voices, loading, body_limit
        self._running: set[anyio.CancelScope] = set()
        self._closed = False
        self._since = int(time.time())

    @property
    def in_flight(self) -> int:
        """How many requests are being sampled for."""
        return len(self._running)

    def app(self, *, token: str, hosts: Collection[str]) -> Starlette:
        routes = [
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{model:path}", self.model, methods=["GET"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/openapi.json", self.openapi, methods=["GET"]),
        ]
        # starlette types them too narrowly
        handlers: Any = {Refusal: refused, EngineError: failed, HTTPException: unrouted, Exception: crashed}
        guard = Middleware(Guard, token=token, hosts=hosts)
        return Starlette(routes=routes, exception_handlers=handlers, middleware=[guard])

    def close(self) -> None:
        self._closed = True
        for scope in self._running:
            scope.cancel()

    async def models(self, request: Request) -> Response:
        self._check_open()
        return JSONResponse({"object": "list", "data": self._listed()})

    async def model(self, request: Request) -> Response:
        self._check_open()
        name = request.path_params["model"]
        self.voice(name)
        return JSONResponse(next(entry for entry in self._listed() if entry["id"] == name))

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(describe_api([entry["id"] for entry in self._listed()]))

    async def chat(self, request: Request) -> Response:
        self._check_open()
        asked = read_asked(await read_body(request, limit=self._body_limit))
        voice = self.voice(asked.model)
        answered = await self._unless_gone(request, lambda: answer(asked, voice))
        if answered is None:
            return GONE
        self._check_pinned(asked, answered)
        body = Body(answered, asked, voice.dialect, f"chatcmpl-{token_hex(12)}", int(time.time()))
        if asked.stream:  # every turn is complete: what may go wrong has gone wrong before the first chunk is sent
            sent = list(events(body))
            return StreamingResponse(sent, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        return JSONResponse(body.whole())

    def _check_open(self) -> None:
        if self._closed:
            raise closing()
        if self.loading:
            raise Refusal(503, "the model is still being loaded", code="loading", headers={"Retry-After": RETRY_AFTER})

    def voice(self, model: str) -> Voice:
        voice = self._voices.get(model)
        if voice is not None:
            return voice
        name, at, _ = model.rpartition("@")
        voice = self._voices.get(name) if at else None
        if voice is None or voice.sampler.policy.name != name:
            known = ", ".join(entry["id"] for entry in self._listed())
            raise Refusal(
                404, f"there is no model {model!r}; there is {known or 'none'}", param="model", code="model_not_found"
            )
        if str(voice.sampler.policy) != model:
            raise stale(model, str(voice.sampler.policy))
        return voice

    def _check_pinned(self, asked: Asked, answered: Answer) -> None:
        if asked.model not in self._voices and asked.model != str(answered.policy):
            raise stale(asked.model, str(answered.policy))

    def _listed(self) -> list[dict[str, Any]]:
        """Each model under its names, which are always the current policy, and under that policy's own."""
        voices = {**self._voices, **{str(voice.sampler.policy): voice for voice in self._voices.values()}}
        return [self._entry(name, voice) for name, voice in voices.items()]

    def _entry(self, name: str, voice: Voice) -> dict[str, Any]:
        entry = {"id": name, "object": "model", "created": self._since, "owned_by": "art_mcp"}
        return {**entry, "root": voice.sampler.policy.name, "max_model_len": voice.sampler.context_length}

    async def _unless_gone(self, request: Request, work: Callable[[], Awaitable[Result]]) -> Result | None:
        """What `work` gives, or None where the client hung up, which ends the work. Raises Refusal when this closes."""
        if self._closed:
            raise closing()
        result: Result | None = None
        with first_failure():
            async with anyio.create_task_group() as tasks:
                self._running.add(tasks.cancel_scope)

                async def watch() -> None:
                    while (await request.receive())["type"] != "http.disconnect":
                        pass
                    tasks.cancel_scope.cancel()

                tasks.start_soon(watch)
                try:
                    result = await work()
                finally:
                    self._running.discard(tasks.cancel_scope)
                tasks.cancel_scope.cancel()
        if result is None and self._closed:
            raise closing()
        return result


async def read_body(request: Request, *, limit: int) -> bytes:
    """The request's body. Raises Refusal (413) where it is longer than `limit`; not before it has ended, unless it goes on and
    on, because a client that is still sending would not read why it was cut off."""
    body = bytearray()
    length = 0
    try:
        async for part in request.stream():
            length += len(part)
            if length <= limit:
                body += part
            elif length > PATIENCE * limit:
                break
    except ClientDisconnect as error:
        raise Refusal(400, "the request ended in its middle") from error
    if length > limit:
        raise Refusal(413, f"the request is longer than {limit} bytes", code="request_too_large")
    return bytes(body)


def events(body: Body) -> Iterator[str]:
    for chunk in body.chunks():
        yield f"data: {json.dumps(chunk)}\n\n"
    yield "data: [DONE]\n\n"


def stale(model: str, current: str) -> Refusal:
    message = f"policy {model!r} is no longer served: the current one is {current!r}"
    return Refusal(404, message, param="model", code="policy_replaced")


def closing() -> Refusal:
    return Refusal(503, "the endpoint is closing", code="closing")


async def refused(request: Request, refusal: Refusal) -> Response:
    return refusal.response()


async def failed(request: Request, error: EngineError) -> Response:
    return await refused(request, Refusal(503, str(error), code="engine_failed"))


async def crashed(request: Request, error: Exception) -> Response:
    """For a bug here: starlette raises it again behind this answer, and the server logs it, once, with its traceback."""
    # the server hangs up after it
    closing = {"Connection": "close"}
    return Refusal(500, "a bug in this endpoint: its log says which", code="internal_error", headers=closing).response()


async def unrouted(request: Request, error: HTTPException) -> Response:
    detail = error.detail
    if error.status_code == 404:  # OpenAI's other APIs, or a base_url without its /v1
        detail = (
            f"nothing is at {request.url.path}: there are /v1/chat/completions and /v1/models, where base_url ends with /v1"
        )
    return Refusal(error.status_code, detail, headers=error.headers).response()
