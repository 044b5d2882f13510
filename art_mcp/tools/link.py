"""One server of a toolbox, kept open in a task of its own: listing, calling, and telling whose fault a failed call is."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import anyio
import mcp.types
from mcp import Client, MCPError
from mcp.types import CONNECTION_CLOSED, INTERNAL_ERROR, INVALID_REQUEST, PARSE_ERROR, REQUEST_TIMEOUT

from art_mcp.errors import ToolServerError, boundary, describe, explained, sole_cause
from art_mcp.tools.connect import Connection, Era, connect, working_for
from art_mcp.tools.endpoint import FAILURES, Endpoint
from art_mcp.tools.inprocess import ServerObject
from art_mcp.tools.results import read_result, whole
from art_mcp.types import ServerSpec, ToolResult

SERVER_FAULTS = frozenset({INTERNAL_ERROR, INVALID_REQUEST, PARSE_ERROR})
LOOK_SECONDS = 0.5
NO_REQUEST = "art_mcp-none"


@dataclass(frozen=True, slots=True)
class Waiting:
    """How long to wait, in seconds, and in which protocol era."""

    mode: Era
    connect_timeout: float
    call_timeout: float


class Server(Protocol):
    """A server as its toolbox sees it."""

    @property
    def name(self) -> str: ...

    @property
    def tools(self) -> tuple[mcp.types.Tool, ...]: ...

    async def call(self, tool: str, arguments: Mapping[str, Any], *, limit: int) -> ToolResult:
        """Raises ToolServerError, at once where the server is known to be gone."""
        ...

    def is_lost(self) -> bool:
        """Whether it is known to be gone, also where no call has met that yet."""
        ...

    def last_error(self) -> str:
        """What the server wrote while it last answered a call with an error, as far as that names one; "" if nothing."""
        ...


@dataclass(slots=True)
class Link:
    """A server as its toolbox sees it; `failure` says since when, and why, it cannot be called. `blamed`: between which sizes
    of its log it last answered a call with an error; `flying`: how many calls wait for their answers."""

    name: str
    server: ServerSpec | ServerObject
    waiting: Waiting
    ready: anyio.Event = field(default_factory=anyio.Event)
    connection: Connection | None = None
    tools: tuple[mcp.types.Tool, ...] = ()
    repeatable: frozenset[str] = frozenset()
    failure: ToolServerError | None = None
    blamed: tuple[int, int] = (0, 0)
    flying: int = 0

    async def serve(self, closing: anyio.Event) -> None:
        """Connects, lists the tools, and stays until `closing`. Raises ToolServerError only before it is ready: what breaks
        later concerns the calls to this server, not its neighbours."""
        waiting = self.waiting
        try:
            async with connect(
                self.server,
                mode=waiting.mode,
                connect_timeout=waiting.connect_timeout,
                call_timeout=waiting.call_timeout,
            ) as connection:
                self.connection = connection
                with boundary(ToolServerError, f"listing the tools of server {self.name!r}", *FAILURES):
                    self.tools = await list_tools(connection.client)
                self.repeatable = frozenset(tool.name for tool in self.tools if is_repeatable(tool))
                self.ready.set()
                await self.stay(connection, closing)
        except ToolServerError as error:
            self.failure = error
            if not self.ready.is_set():
                raise
        finally:
            self.failure = self.failure or ToolServerError(f"server {self.name!r} is closed")

    async def stay(self, connection: Connection, closing: anyio.Event) -> None:
        """Looks after the connection until `closing`."""
        while not closing.is_set():
            with anyio.move_on_after(LOOK_SECONDS):
                await closing.wait()
            connection.endpoint.log.trim()
            if self.flying and over_stdio(connection) and not closing.is_set():
                with anyio.move_on_after(LOOK_SECONDS):
                    await nudge(connection.client)

    async def call(self, tool: str, arguments: Mapping[str, Any], *, limit: int) -> ToolResult:
        """Raises ToolServerError at once where the server is known to be gone."""
        connection = self.connection
        if self.failure is not None or connection is None:
            raise ToolServerError(str(self.failure))
        log = connection.endpoint.log
        before = log.size()
        self.flying += 1
        try:
            with working_for(log):
                result = await self.request(connection, tool, dict(arguments))
        except MCPError as error:
            if error.code == CONNECTION_CLOSED and over_stdio(connection):
                await log.status_told()
            return self.judge(error, tool, endpoint=connection.endpoint, before=before)
        except SystemExit as error:  # of a tool in this process, which it would end
            raise connection.endpoint.failure(f"called sys.exit({error.code!r}) in {tool!r}") from error
        except (RuntimeError, *FAILURES) as error:  # RuntimeError: structured content against the tool's own schema
            raise connection.endpoint.failure(f"answered {tool!r} wrongly: {describe(error)}") from error
        finally:
            self.flying -= 1
        if result.is_error:
            self.blamed = (before, log.size())
        return read_result(result, limit=limit)

    def is_lost(self) -> bool:
        """Whether it is known to be gone, also where no call has met that yet."""
        connection = self.connection
        return self.failure is not None or connection is None or connection.endpoint.log.status() is not None

    def last_error(self) -> str:
        """What the server wrote while it last answered a call with an error, as far as that names one; "" if nothing."""
        return "" if self.connection is None else self.connection.endpoint.error_within(*self.blamed)

    async def request(self, connection: Connection, tool: str, arguments: dict[str, Any]) -> mcp.types.CallToolResult:
        """Over HTTP, a call whose own connection closed is made once more, where the server says that calling its tool twice is
        the same as calling it once; elsewhere nobody can tell whether it was executed."""
        client = connection.client
        try:
            return await client.call_tool(tool, arguments)
        except MCPError as error:
            over_http = connection.endpoint.spec.transport == "streamable-http"
            if error.code != CONNECTION_CLOSED or not over_http or tool not in self.repeatable:
                raise
        return await client.call_tool(tool, arguments)

    def judge(self, error: MCPError, tool: str, *, endpoint: Endpoint, before: int) -> ToolResult:
        """The result that a protocol error is where the call was at fault; ToolServerError where the server or the way was.
        `before`: how long the server's log was when it was called."""
        if error.code == REQUEST_TIMEOUT:
            raise endpoint.failure(f"did not answer {tool!r} within {self.waiting.call_timeout:g} s") from error
        if error.code == CONNECTION_CLOSED:
            failure = endpoint.lost(error)
            # Over streamable HTTP every call has a connection of its own, and only that one is known to be closed.
            if endpoint.spec.transport != "streamable-http":
                self.failure = self.failure or failure
            raise failure from error
        if error.code in SERVER_FAULTS:
            wrote = endpoint.error_within(before, endpoint.log.size())
            raise endpoint.failure(f"failed at {tool!r}: {explained(error.message, wrote)}") from error
        return ToolResult(whole(error.message), is_error=True)


@asynccontextmanager
async def open_links(servers: Sequence[ServerSpec | ServerObject], waiting: Waiting) -> AsyncGenerator[list[Link]]:
    """All `servers`, connected in parallel, for as long as the block lasts. Raises ToolServerError when one cannot be reached,
    ConfigError for what its spec says."""
    links = [Link(name_of(server), server, waiting) for server in servers]
    closing = anyio.Event()
    with ungrouped():
        async with anyio.create_task_group() as group:
            for link in links:
                group.start_soon(link.serve, closing)
            for link in links:
                await link.ready.wait()
            try:
                yield links
            finally:
                closing.set()


def name_of(server: ServerSpec | ServerObject) -> str:
    """A server's name as a tool's may begin with it."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", server.name)


@contextmanager
def ungrouped() -> Generator[None]:
    """Frees what leaves a task group from the group."""
    failure: BaseException | None = None
    try:
        yield
    except BaseExceptionGroup as group:
        failure = sole_cause(group)
    if failure is not None:
        raise failure from failure.__cause__  # and not from the group that it was in


def over_stdio(connection: Connection) -> bool:
    return connection.endpoint.spec.transport == "stdio"


async def nudge(client: Client) -> None:
    """Sends a line that asks for nothing: the cancellation of a request that there is not, which a server must ignore.

    A Python server whose tool calls sys.exit() has closed down all but the thread that reads its stdin, and ends when that has
    read something (mcp 1 and 2): without this, a call would wait for its whole time limit.
    """
    params = mcp.types.CancelledNotificationParams(request_id=NO_REQUEST)
    await client.session.send_notification(mcp.types.CancelledNotification(params=params))


async def list_tools(client: Client) -> tuple[mcp.types.Tool, ...]:
    """All pages of the server's listing."""
    page = await client.list_tools()
    tools = page.tools
    while page.next_cursor is not None:
        page = await client.list_tools(cursor=page.next_cursor)
        tools = [*tools, *page.tools]
    return tuple(tools)


def is_repeatable(tool: mcp.types.Tool) -> bool:
    hints = tool.annotations
    return hints is not None and (hints.read_only_hint is True or hints.idempotent_hint is True)
