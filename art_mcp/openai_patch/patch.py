"""`record`: one rollout on one client of the `openai` package. The instance is patched while it lasts, never the library."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from threading import Lock
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from art_mcp.openai_patch.exchange import Exchange
from art_mcp.openai_patch.recording import Recording
from art_mcp.openai_patch.wire import Terms
from art_mcp.types import Scenario

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

HERE: ContextVar[Mapping[Any, Recording]] = ContextVar("recordings", default=MappingProxyType({}))
"""The recording of each client (by the HTTP client that it and its copies share) for whoever runs in this context."""

OPEN: dict[Any, tuple[int, Any]] = {}
"""How many recordings each HTTP client has, and its own `send` where it had one of the instance's."""

GUARD = Lock()
ENCODED = ("content-length", "content-encoding", "transfer-encoding")
OTHER_CALLS = ("/responses", "/completions", "/messages")
"""What an agent may generate with, too, that is not recorded."""


@contextmanager
def record(
    client: AsyncOpenAI | OpenAI,
    scenario: Scenario | None = None,
    *,
    rollout_id: str = "",
    model: str = "",
    temperature: float | None = None,
    key: tuple[object, ...] | None = None,
    ready: Callable[[], Awaitable[None]] | None = None,
) -> Generator[Recording]:
    """Records every chat completion that is asked for on `client`, or a copy of it (`with_options`), inside the block: by this
    task or thread, and by the tasks that it starts. Recordings of other tasks on the same client stay apart.

    Each call is sent with a wish for token ids and logprobs, which the agent sees only if it asked for them itself, and to
    the version of the policy that answered first. `model`: the name that calls go to, whatever the agent says.
    `temperature`: for every call, from the whole distribution, as a trainer assumes it. `key`: makes the seed of the n-th call
    `seed_of(*key, n)`, where the agent gives none. `ready`: awaited before each call of an asynchronous client is sent.
    """
    http = client._client  # pyright: ignore[reportPrivateUsage]  # all of a client's resources and copies send through it
    recording = Recording(scenario, rollout_id or uuid4().hex, Terms(model, temperature, key), ready)
    outer = HERE.get().get(http)
    watch(http)
    HERE.set(MappingProxyType({**HERE.get(), http: recording}))
    try:
        yield recording
    finally:
        rest = {other: one for other, one in HERE.get().items() if other is not http}
        HERE.set(MappingProxyType(rest if outer is None else {**rest, http: outer}))
        recording.close()
        unwatch(http)


def watch(http: Any) -> None:
    with GUARD:
        count, own = OPEN.get(http, (0, http.__dict__.get("send")))
        if not count:
            http.send = (watched_async if hasattr(http, "aclose") else watched)(http, http.send)
        OPEN[http] = (count + 1, own)


def unwatch(http: Any) -> None:
    with GUARD:
        count, own = OPEN.pop(http)
        if count > 1:
            OPEN[http] = (count - 1, own)
        elif own is None:
            del http.send
        else:
            http.send = own


def watched(http: Any, send: Callable[..., Any]) -> Callable[..., Any]:
    """`send` of an HTTP client, recording what is to be recorded."""

    def send_and_record(request: Any, **options: Any) -> Any:
        exchange = begin(http, request)
        if exchange is None:
            return send(request, **options)
        response = send(with_body(http, request, exchange.sent), **options)
        if response.is_error:
            return response
        if is_stream(response):
            return with_stream(http, response, request, sync_stream(http, response, exchange))
        return with_content(http, response, request, exchange.whole(response.read()))

    return send_and_record


def watched_async(http: Any, send: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """The same of an asynchronous one."""

    async def send_and_record(request: Any, **options: Any) -> Any:
        exchange = begin(http, request)
        if exchange is None:
            return await send(request, **options)
        await exchange.ready()
        response = await send(with_body(http, request, exchange.sent), **options)
        if response.is_error:
            return response
        if is_stream(response):
            return with_stream(http, response, request, async_stream(http, response, exchange))
        return with_content(http, response, request, exchange.whole(await response.aread()))

    return send_and_record


def begin(http: Any, request: Any) -> Exchange | None:
    """The exchange that a request begins, if it is to be recorded."""
    recording = HERE.get().get(http)
    if recording is None or recording.closed or request.method != "POST":
        return None
    if request.url.path.endswith("/chat/completions"):
        return Exchange(recording, json.loads(request.content))
    if request.url.path.endswith(OTHER_CALLS):
        recording.drop(f"only chat completions are recorded, and this went to {request.url.path}")
    return None


def library(http: Any) -> Any:
    """httpx2, or the httpx of old: whichever this HTTP client is of."""
    roots = [kind.__module__.partition(".")[0] for kind in type(http).__mro__]
    return import_module("httpx2" if "httpx2" in roots else "httpx")


def with_body(http: Any, request: Any, body: bytes) -> Any:
    headers = [(name, value) for name, value in request.headers.multi_items() if name.lower() not in ENCODED]
    return library(http).Request(request.method, request.url, headers=headers, content=body, extensions=request.extensions)


def is_stream(response: Any) -> bool:
    return str(response.headers.get("content-type", "")).startswith("text/event-stream")


def with_content(http: Any, response: Any, request: Any, content: bytes) -> Any:
    seen = library(http).Response(response.status_code, content=content, **kept(response, request))
    seen.elapsed = response.elapsed
    return seen


def with_stream(http: Any, response: Any, request: Any, stream: Any) -> Any:
    return library(http).Response(response.status_code, stream=stream, **kept(response, request))


def kept(response: Any, request: Any) -> dict[str, Any]:
    """What stays of a response whose body is another; its request is the agent's own."""
    headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in ENCODED]
    return {"headers": headers, "request": request, "extensions": response.extensions}


def sync_stream(http: Any, response: Any, exchange: Exchange) -> Any:
    exchange.begin_stream()

    class Recorded(library(http).SyncByteStream):
        """The stream as the agent is to see it."""

        def __iter__(self) -> Iterator[bytes]:
            for data in response.iter_bytes():
                yield exchange.passed(data)
            yield exchange.rest()
            exchange.end()

        def close(self) -> None:
            exchange.end()
            response.close()

    return Recorded()


def async_stream(http: Any, response: Any, exchange: Exchange) -> Any:
    exchange.begin_stream()

    class Recorded(library(http).AsyncByteStream):
        """The stream as the agent is to see it."""

        async def __aiter__(self) -> AsyncIterator[bytes]:
            async for data in response.aiter_bytes():
                yield exchange.passed(data)
            yield exchange.rest()
            exchange.end()

        async def aclose(self) -> None:
            exchange.end()
            await response.aclose()

    return Recorded()
