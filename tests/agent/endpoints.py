"""A chat endpoint on loopback that answers, and breaks, as a test wants it to: real sockets, bytes as they are given."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.clocks import skip

HANG = b"hang"
"""An answer that never comes: the loop's clock goes on by HANGS seconds meanwhile."""
HANGS = 60.0


def http(status: int, body: str | bytes, **headers: str) -> bytes:
    """A whole HTTP answer."""
    data = body.encode() if isinstance(body, str) else body
    given = {"content-type": "application/json", "content-length": str(len(data)), "connection": "close"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"HTTP/1.1 {status} Status\r\n{head}\r\n".encode() + data


def called(name: str, arguments: Any, id: str | None = "id1") -> dict[str, Any]:
    """A tool call as endpoints write it."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": id, "type": "function", "function": {"name": name, "arguments": text}}


def said(content: str | None, *tool_calls: Any, finish: str | None = None, usage: Any = None, **more: Any) -> bytes:
    """A chat completion."""
    message = {"role": "assistant", "content": content, "refusal": None, **more}
    if tool_calls:
        message["tool_calls"] = list(tool_calls)
    finish = finish or ("tool_calls" if tool_calls else "stop")
    body = {"id": "c", "object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": finish}]}
    return http(200, json.dumps(body | ({"usage": usage} if usage else {})))


def refused(status: int, message: str = "no", **fields: Any) -> bytes:
    """An error, without a wait before the next try."""
    return http(status, json.dumps({"error": {"message": message, **fields}}), retry_after="0")


@dataclass
class Seen:
    """What an endpoint was asked: bodies as JSON, and the headers."""

    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    base_url: str = ""


Answer = Callable[[dict[str, Any]], bytes | Awaitable[bytes]]


def in_turn(*answers: bytes) -> Answer:
    """The answers one after the other; the last of them again and again."""
    left = list(answers)
    return lambda body: left.pop(0) if len(left) > 1 else left[0]


@asynccontextmanager
async def endpoint(answer: Answer | Sequence[bytes]) -> AsyncGenerator[Seen]:
    """An endpoint that gives `answer(body)` to each request. An empty answer closes the connection without a word."""
    seen = Seen()
    answer_to = answer if callable(answer) else in_turn(*answer)
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            headers = dict(line.lower().split(": ", 1) for line in head.splitlines()[1:] if ": " in line)
            text = await reader.readexactly(int(headers.get("content-length", 0)))
            seen.headers.append(headers)
            seen.bodies.append(json.loads(text) if text else {"path": head.split()[1]})
            answered = answer_to(seen.bodies[-1])
            given = await answered if inspect.isawaitable(answered) else answered
            if given == HANG:
                skip(HANGS)
                await ended.wait()
            writer.write(given)
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):  # the client hung up
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    seen.base_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield seen
    finally:
        ended.set()
        server.close()
        await server.wait_closed()
