"""Connections to servers in processes of their own, which leave this one its time; both ends, in JSON lines, are here. What a
connection does is `link`'s business."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import traceback
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import anyio
import mcp.types
from anyio.abc import Process, TaskGroup

from art_mcp.child import open_child, signal_name
from art_mcp.errors import ArtMcpError, ConfigError, ToolServerError, describe, rebuilt
from art_mcp.tools.inprocess import ServerObject
from art_mcp.tools.link import Link, Waiting, name_of, open_links, ungrouped
from art_mcp.types import ServerSpec, ToolResult

CLOSE_SECONDS = 10.0
"""How long a process may take to close its servers."""


@asynccontextmanager
async def open_links_apart(
    servers: Sequence[ServerSpec | ServerObject], waiting: Waiting, *, processes: int
) -> AsyncGenerator[list[FarLink]]:
    """All `servers`, connected by each of so many processes; a call is made by the one that has the fewest under way.

    Raises as `open_links` does, and ConfigError for a server object of this process.
    """
    if processes < 1:
        raise ConfigError(f"{processes} processes cannot hold connections to servers: ask for 1 or more, or 0 for this one")
    for server in servers:
        if not isinstance(server, ServerSpec):
            raise ConfigError(
                f"the server object {server.name!r} is in this process, and another one cannot have it: name its file, such as "
                '"server.py:server", or give a command'
            )
    specs = [server for server in servers if isinstance(server, ServerSpec)]
    sent = [{**asdict(spec), "cwd": spec.cwd and str(spec.cwd)} for spec in specs]
    with ungrouped():
        async with AsyncExitStack() as stack:
            tasks = await stack.enter_async_context(anyio.create_task_group())
            holders = [await stack.enter_async_context(open_holder(tasks)) for _ in range(processes)]
            told: dict[int, Mapping[str, Any]] = {}

            async def begin(place: int) -> None:
                told[place] = await holders[place].ask("servers", servers=sent, waiting=asdict(waiting))

            async with anyio.create_task_group() as starting:
                for place in range(processes):
                    starting.start_soon(begin, place)
            listed = [[mcp.types.Tool.model_validate(tool) for tool in tools] for tools in told[0]["tools"]]
            yield [FarLink(name_of(spec), place, holders, tuple(listed[place])) for place, spec in enumerate(specs)]


@asynccontextmanager
async def open_holder(tasks: TaskGroup) -> AsyncGenerator[Holder]:
    """A process that waits for its servers; it closes them when the block ends."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    async with open_child([sys.executable, "-m", "art_mcp.tools.apart"], env=environment) as process:
        holder = Holder(process)
        tasks.start_soon(holder.read)
        try:
            yield holder
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(CLOSE_SECONDS):
                assert process.stdin is not None
                await process.stdin.aclose()
                await process.wait()


@dataclass(slots=True, eq=False)
class Holder:
    """The near end of a process that holds connections: `waiting` has a future for each answer that it owes."""

    process: Process
    waiting: dict[int, asyncio.Future[dict[str, Any]]] = field(default_factory=dict[int, "asyncio.Future[dict[str, Any]]"])
    numbers: count[int] = field(default_factory=count)
    ended: str = ""

    async def ask(self, operation: str, **values: Any) -> dict[str, Any]:
        """Raises what was raised there; ToolServerError where the process has ended."""
        if self.ended:
            raise ToolServerError(self.ended)
        number = next(self.numbers)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.waiting[number] = future
        try:
            await self.tell(number, operation, **values)
            reply = await future
        except asyncio.CancelledError:
            if self.waiting.pop(number, None):
                with anyio.CancelScope(shield=True):
                    await self.tell(number, "cancel")
            raise
        if "error" in reply:
            raise rebuilt(reply["error"], reply["message"], trace=reply["trace"])
        return reply

    async def tell(self, number: int, operation: str, **values: Any) -> None:
        assert self.process.stdin is not None
        line = json.dumps({"id": number, "do": operation, **values}, separators=(",", ":"))
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):  # `read` tells all that wait how it ended
            await self.process.stdin.send(line.encode() + b"\n")

    async def read(self) -> None:
        """Hands on what the process answers, until it ends."""
        assert self.process.stdout is not None
        rest = b""
        async for chunk in self.process.stdout:
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                reply = json.loads(line)
                future = self.waiting.pop(reply["id"], None)
                if future is not None and not future.done():
                    future.set_result(reply)
        code = await self.process.wait()
        how = f"exit code {code}" if code >= 0 else f"killed by {signal_name(-code)}"
        self.ended = f"the process {self.process.pid} that held the connections to the servers has ended ({how})"
        waiting, self.waiting = self.waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(ToolServerError(self.ended))


@dataclass(slots=True, eq=False)
class FarLink:
    """A server, the one at this `place`, as the holders have it; for a toolbox it is as a Link."""

    name: str
    place: int
    holders: Sequence[Holder]
    tools: tuple[mcp.types.Tool, ...]
    blamed: str = ""

    async def call(self, tool: str, arguments: Mapping[str, Any], *, limit: int) -> ToolResult:
        """As `Link.call`; ToolServerError also where no process is left."""
        alive = [holder for holder in self.holders if not holder.ended] or self.holders[:1]
        holder = min(alive, key=lambda one: len(one.waiting))
        reply = await holder.ask("call", place=self.place, tool=tool, arguments=arguments, limit=limit)
        result = ToolResult(**reply["result"])
        if result.is_error:
            self.blamed = reply["wrote"]
        return result

    def is_lost(self) -> bool:
        return all(holder.ended for holder in self.holders)

    def last_error(self) -> str:
        return self.blamed


@dataclass(slots=True, eq=False)
class Far:
    """The far end: opens links, makes the calls that it is asked for, and writes what came of each."""

    output: Any
    tasks: TaskGroup
    closing: anyio.Event = field(default_factory=anyio.Event)
    links: list[Link] = field(default_factory=list[Link])
    scopes: dict[int, anyio.CancelScope] = field(default_factory=dict[int, anyio.CancelScope])

    async def serve(self) -> None:
        """Until stdin ends, and with it the interest in whatever is under way."""
        reader = asyncio.StreamReader(limit=2**30)
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            message = json.loads(line)
            if message["do"] == "cancel":
                if message["id"] in self.scopes:
                    self.scopes[message["id"]].cancel()
            else:
                self.tasks.start_soon(self.answer, message)
        self.closing.set()
        for scope in self.scopes.values():
            scope.cancel()
        if not self.links:  # they are still being opened
            self.tasks.cancel_scope.cancel()

    async def answer(self, message: dict[str, Any]) -> None:
        with anyio.CancelScope() as scope:
            self.scopes[message["id"]] = scope
            try:
                reply = await getattr(self, message["do"])(message)
            except Exception as error:  # noqa: BLE001  handed on to the parent, which raises it there
                reply = {"error": type(error).__name__, "message": describe(error), "trace": traceback.format_exc()}
            finally:
                del self.scopes[message["id"]]
            try:
                self.output.write(json.dumps({"id": message["id"], **reply}).encode() + b"\n")
                self.output.flush()
            except BrokenPipeError:
                os._exit(1)  # the parent is dead: nobody is left to tell

    async def servers(self, message: dict[str, Any]) -> dict[str, Any]:
        given = [spec | {"cwd": spec["cwd"] and Path(spec["cwd"]), "args": tuple(spec["args"])} for spec in message["servers"]]
        opened, failed = anyio.Event(), list[ArtMcpError]()

        async def keep() -> None:
            try:
                async with open_links([ServerSpec(**spec) for spec in given], Waiting(**message["waiting"])) as links:
                    self.links = links
                    opened.set()
                    await self.closing.wait()
            except ArtMcpError as error:
                failed.append(error)
                opened.set()

        self.tasks.start_soon(keep)
        await opened.wait()
        if failed:
            raise failed[0]
        return {
            "tools": [
                [tool.model_dump(mode="json", by_alias=True, exclude_none=True) for tool in link.tools] for link in self.links
            ]
        }

    async def call(self, message: dict[str, Any]) -> dict[str, Any]:
        place: int = message["place"]
        link = self.links[place]
        result = await link.call(message["tool"], message["arguments"], limit=message["limit"])
        return {"result": asdict(result), "wrote": link.last_error() if result.is_error else ""}


async def serve(output: Any) -> None:
    async with anyio.create_task_group() as tasks:
        await Far(output, tasks).serve()


def main() -> None:
    # what a server prints to stdout must not end up among the replies
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    anyio.run(serve, output)


if __name__ == "__main__":
    main()
