"""HTTP connections that the server closes as a request is on its way: at most that call is lost, never the session."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
from odd import text_of

from art_mcp.errors import ToolServerError
from art_mcp.tools import http_client, open_tools
from art_mcp.tools.link import ungrouped
from art_mcp.types import ServerSpec

pytestmark = pytest.mark.anyio


@dataclass
class Closing:
    """A way to a server on which the next `to_lose` requests on connections that were used before find them closing."""

    spec: ServerSpec
    to_lose: int = 0
    lost: int = 0

    async def relay(self, client: anyio.abc.SocketStream) -> None:
        """Serves one connection of the client's, which may end it whenever it wants to."""
        with suppress(anyio.BrokenResourceError), ungrouped():
            await self.pass_on(client)

    async def pass_on(self, client: anyio.abc.SocketStream) -> None:
        url = urlsplit(self.spec.url)
        async with client, await anyio.connect_tcp(url.hostname, url.port) as server, anyio.create_task_group() as group:
            answered = anyio.Event()

            async def answer() -> None:
                async for chunk in server:
                    answered.set()
                    await client.send(chunk)

            group.start_soon(answer)
            async for chunk in client:
                if answered.is_set() and self.lost < self.to_lose:
                    self.lost += 1
                    break
                await server.send(chunk)
            group.cancel_scope.cancel()


@asynccontextmanager
async def closing(spec: ServerSpec) -> AsyncGenerator[tuple[Closing, ServerSpec]]:
    way = Closing(spec)
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    async with listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, way.relay)
        yield way, replace(spec, url=urlsplit(spec.url)._replace(netloc=f"127.0.0.1:{port}").geturl())
        group.cancel_scope.cancel()


@pytest.fixture
def kept(monkeypatch):
    """Connections are used again however long it takes until they are."""
    monkeypatch.setattr(http_client, "IDLE_SECONDS", 1000.0)


@pytest.mark.usefixtures("kept")
async def test_a_call_that_may_be_repeated_is_not_lost(http):
    async with closing(http) as (way, spec), open_tools([spec]) as toolbox:
        answers: dict[int, str] = {}

        async def call(number: int) -> None:
            answers[number] = await text_of(toolbox, "add", a=number, b=1)

        for first in range(0, 30, 10):
            way.to_lose += 1
            async with anyio.create_task_group() as group:
                for number in range(first, first + 10):
                    group.start_soon(call, number)
        assert answers == {number: str(number + 1) for number in range(30)}
        assert way.lost == 3


@pytest.mark.usefixtures("kept")
async def test_any_other_call_is_lost_alone(http):
    async with closing(http) as (way, spec), open_tools([spec]) as toolbox:
        paused: list[str] = []

        async def pause() -> None:
            paused.append(await text_of(toolbox, "pause", seconds=0.3))

        async with anyio.create_task_group() as group:
            group.start_soon(pause)
            assert await text_of(toolbox, "rename", title="x") == "x"
            way.to_lose = 1
            with pytest.raises(ToolServerError, match=r"server 'odd' is lost at http://.*disconnected without sending"):
                await text_of(toolbox, "rename", title="x")
            assert await text_of(toolbox, "rename", title="x") == "x"
        assert paused == ["paused 0.3"]
        assert way.lost == 1


@pytest.mark.parametrize("transport", ["http", "sse"])
async def test_a_connection_that_was_idle_too_long_is_not_used_again(transport, request, monkeypatch):
    monkeypatch.setattr(http_client, "IDLE_SECONDS", 0.0)
    async with closing(request.getfixturevalue(transport)) as (way, spec), open_tools([spec]) as toolbox:
        way.to_lose = 100
        for _ in range(5):
            assert await text_of(toolbox, "rename", title="x") == "x"
        assert way.lost == 0
