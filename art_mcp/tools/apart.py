"""Connections to servers in processes of their own, which leave this one its time. Their end of it is in `holder`; what a
connection does is `link`'s business."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from itertools import count
from math import inf
from typing import Any

import anyio
import mcp.types
from anyio.abc import Process, TaskGroup
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from art_mcp.agent.group import first_failure
from art_mcp.child import ending, module_command, open_child
from art_mcp.errors import ConfigError, ToolServerError, describe, rebuilt
from art_mcp.tools.holder import OWN_PATH, line_of
from art_mcp.tools.inprocess import ServerObject
from art_mcp.tools.link import Waiting, name_of, ungrouped
from art_mcp.types import ServerSpec, ToolResult

CLOSE_SECONDS = 10.0
"""How long a process may take to close its servers."""
START_SECONDS, SLACK_SECONDS = 60.0, 5.0
"""How much longer than its servers a process may take to start, and than a call to answer it."""
REPLY = re.compile(rb'\{"id":(\d+),')


@asynccontextmanager
async def open_links_apart(
    servers: Sequence[ServerSpec | ServerObject], waiting: Waiting, *, processes: int
) -> AsyncGenerator[list[FarLink]]:
    """All `servers`, connected by each of so many processes; a call is made by the one that has the fewest under way.

    Raises as `open_links` does, and ConfigError for a server object of this process.
    """
    if processes < 1:
        raise ConfigError(f"{processes} processes cannot hold connections to servers: ask for 1 or more, or 0 for this one")
    specs = [spec_of(server) for server in servers]
    sent, patience = [as_values(spec) for spec in specs], waiting.connect_timeout + START_SECONDS
    with ungrouped():
        async with AsyncExitStack() as stack:
            tasks = await stack.enter_async_context(anyio.create_task_group())
            holders = [await stack.enter_async_context(open_holder(tasks)) for _ in range(processes)]
            told: dict[int, Mapping[str, Any]] = {}

            async def begin(place: int) -> None:
                told[place] = await holders[place].ask("servers", patience, servers=sent, waiting=asdict(waiting))

            with first_failure():
                async with anyio.create_task_group() as starting:
                    for place in range(processes):
                        starting.start_soon(begin, place)
            listed = [[mcp.types.Tool.model_validate(tool) for tool in tools] for tools in told[0]["tools"]]
            try:
                yield [
                    FarLink(name_of(spec), place, holders, tuple(listed[place]), waiting.call_timeout + SLACK_SECONDS)
                    for place, spec in enumerate(specs)
                ]
            finally:
                for holder in holders:  # all at once: each then ends by itself
                    holder.hang_up()


def spec_of(server: ServerSpec | ServerObject) -> ServerSpec:
    if isinstance(server, ServerSpec):
        return server
    raise ConfigError(
        f"the server object {server.name!r} is in this process, and another one cannot have it: name its file, such as "
        '"server.py:server", or give a command'
    )


def as_values(spec: ServerSpec) -> dict[str, Any]:
    """A spec as JSON has it."""
    values = {one.name: getattr(spec, one.name) for one in fields(spec)}
    return values | {"env": dict(spec.env), "headers": dict(spec.headers), "cwd": spec.cwd and str(spec.cwd)}


@asynccontextmanager
async def open_holder(tasks: TaskGroup) -> AsyncGenerator[Holder]:
    """A process that waits for its servers; it closes them when the block ends."""
    argv, needed = module_command("art_mcp.tools.holder")
    own = {OWN_PATH: os.environ.get("PYTHONPATH", "")}
    async with open_child(argv, env={**os.environ, **needed, **own}) as process:
        outbox, lines = anyio.create_memory_object_stream[bytes](inf)
        holder = Holder(process, outbox)
        tasks.start_soon(holder.write, lines)
        tasks.start_soon(holder.read)
        try:
            yield holder
        finally:
            holder.hang_up()
            with anyio.CancelScope(shield=True), anyio.move_on_after(CLOSE_SECONDS):
                await process.wait()


@dataclass(slots=True, eq=False)
class Holder:
    """The near end of a process that holds connections: `waiting` has a future for each line that it owes."""

    process: Process
    outbox: MemoryObjectSendStream[bytes]
    waiting: dict[int, asyncio.Future[bytes]] = field(default_factory=dict[int, "asyncio.Future[bytes]"])
    numbers: count[int] = field(default_factory=count)
    ended: str = ""

    async def ask(self, operation: str, patience: float, **values: Any) -> dict[str, Any]:
        """Raises what was raised there; ToolServerError where the process has ended, or does not answer for so many seconds."""
        if self.ended:
            raise ToolServerError(self.ended)
        number = next(self.numbers)
        line = line_of(number, {"do": operation, **values})
        self.waiting[number] = future = asyncio.get_running_loop().create_future()
        self.post(line)
        try:
            with anyio.move_on_after(patience):
                return self.reply_of(await future)
        finally:
            if self.waiting.pop(number, None):
                self.post(line_of(number, {"do": "cancel"}))
        raise ToolServerError(f"the process {self.process.pid} that holds the connections has not answered for {patience:g} s")

    def reply_of(self, line: bytes) -> dict[str, Any]:
        try:
            reply: dict[str, Any] = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ToolServerError(f"what a server answered cannot be handed on between processes: {describe(error)}") from error
        if "error" in reply:
            raise rebuilt(reply["error"], reply["message"], trace=reply["trace"])
        return reply

    def post(self, line: bytes) -> None:
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):  # `read` tells all that wait how it ended
            self.outbox.send_nowait(line)

    def hang_up(self) -> None:
        """The process is to end: it gets what was posted, and then the end of its stdin."""
        self.ended = self.ended or "the servers are closed: the block that opened them is over"
        self.outbox.close()

    async def write(self, lines: MemoryObjectReceiveStream[bytes]) -> None:
        """Posts what there is, until the outbox is closed."""
        assert self.process.stdin is not None
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            async with self.process.stdin, lines:
                async for line in lines:
                    several = [line]
                    with suppress(anyio.WouldBlock, anyio.EndOfStream):
                        while True:
                            several.append(lines.receive_nowait())
                    await self.process.stdin.send(b"".join(several))

    async def read(self) -> None:
        """Hands on what the process answers, until it ends."""
        assert self.process.stdout is not None
        parts: list[bytes] = []
        try:
            with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                async for chunk in self.process.stdout:
                    *lines, rest = chunk.split(b"\n")
                    if lines:
                        self.hand_on(b"".join([*parts, lines[0]]))
                        for line in lines[1:]:
                            self.hand_on(line)
                        parts.clear()
                    parts.append(rest)
            how = ending(await self.process.wait())
            gone = f"the process {self.process.pid} that held the connections to the servers has ended ({how})"
            self.ended = self.ended or gone
        finally:
            self.ended = self.ended or "the servers are closed: the block that opened them was cancelled"
            waiting, self.waiting = self.waiting, {}
            for future in waiting.values():
                if not future.done():
                    future.set_exception(ToolServerError(self.ended))

    def hand_on(self, line: bytes) -> None:
        found = REPLY.match(line)
        if found is None:  # some import printed it, before replies had the pipe for themselves
            sys.stderr.write(line.decode(errors="replace") + "\n")
            return
        future = self.waiting.pop(int(found[1]), None)
        if future is not None and not future.done():
            future.set_result(line)


@dataclass(slots=True, eq=False)
class FarLink:
    """A server, the one at this `place`, as the holders have it; for a toolbox it is as a Link. `lost`: those that know it to
    be gone."""

    name: str
    place: int
    holders: Sequence[Holder]
    tools: tuple[mcp.types.Tool, ...]
    patience: float
    lost: set[Holder] = field(default_factory=set[Holder])
    blamed: str = ""

    async def call(self, tool: str, arguments: Mapping[str, Any], *, limit: int) -> ToolResult:
        """As `Link.call`; ToolServerError also where no process is left."""
        alive = [holder for holder in self.holders if not holder.ended]
        fit = [holder for holder in alive if holder not in self.lost] or alive or self.holders
        holder = min(fit, key=lambda one: len(one.waiting))
        values = {"place": self.place, "tool": tool, "arguments": dict(arguments), "limit": limit}
        reply = await holder.ask("call", self.patience, **values)
        if reply["lost"]:
            self.lost.add(holder)
        if "failure" in reply:
            raise ToolServerError(reply["failure"])
        result = ToolResult(**reply["result"])
        if result.is_error:
            self.blamed = reply["wrote"]
        return result

    def is_lost(self) -> bool:
        return all(holder.ended or holder in self.lost for holder in self.holders)

    def last_error(self) -> str:
        return self.blamed
