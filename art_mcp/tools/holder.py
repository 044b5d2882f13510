"""A process that holds connections to servers for another one, which asks it in JSON lines: `python -m art_mcp.tools.holder`.
The end of who asks is in `apart`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import mcp.types
from anyio.abc import TaskGroup
from pydantic_core import to_jsonable_python

from art_mcp.errors import ArtMcpError, ToolServerError, describe
from art_mcp.tools.link import Link, Waiting, open_links
from art_mcp.types import ServerSpec

OWN_PATH = "ART_MCP_OWN_PYTHONPATH"
"""What PYTHONPATH is for servers, where a holder has all of our sys.path in it."""


def line_of(number: int, values: Mapping[str, Any]) -> bytes:
    """A message, or the answer to one. What JSON has no word for is written as pydantic does."""
    return json.dumps({"id": number, **values}, separators=(",", ":"), default=to_jsonable_python).encode() + b"\n"


@dataclass(slots=True, eq=False)
class Far:
    """The far end: opens links, makes the calls that it is asked for, and writes what came of each."""

    output: Any
    tasks: TaskGroup
    closing: anyio.Event = field(default_factory=anyio.Event)
    links: list[Link] = field(default_factory=list[Link])
    scopes: dict[int, anyio.CancelScope] = field(default_factory=dict[int, anyio.CancelScope])

    async def serve(self, requests: Any) -> None:
        """Until the requests end, and with them the interest in whatever is under way."""
        reader = asyncio.StreamReader(limit=2**30)
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), requests)
        while line := await reader.readline():
            message = json.loads(line)
            if message["do"] != "cancel":
                self.scopes[message["id"]] = anyio.CancelScope()
                self.tasks.start_soon(self.answer, message)
            elif message["id"] in self.scopes:
                self.scopes[message["id"]].cancel()
        self.closing.set()
        for scope in self.scopes.values():
            scope.cancel()
        if not self.links:  # they are still being opened
            self.tasks.cancel_scope.cancel()

    async def answer(self, message: dict[str, Any]) -> None:
        number: int = message["id"]
        try:
            with self.scopes[number]:
                await anyio.lowlevel.checkpoint_if_cancelled()
                self.write(await self.line(message))
        finally:
            del self.scopes[number]

    async def line(self, message: dict[str, Any]) -> bytes:
        try:
            return line_of(message["id"], await getattr(self, message["do"])(message))
        except Exception as error:  # noqa: BLE001  handed on to the parent, which raises it there
            told = {"error": type(error).__name__, "message": describe(error), "trace": traceback.format_exc()}
            return line_of(message["id"], told)

    def write(self, line: bytes) -> None:
        try:
            self.output.write(line)
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
        return {"tools": [list(map(listed, link.tools)) for link in self.links]}

    async def call(self, message: dict[str, Any]) -> dict[str, Any]:
        place: int = message["place"]
        link = self.links[place]
        try:
            result = await link.call(message["tool"], message["arguments"], limit=message["limit"])
        except ToolServerError as error:
            return {"failure": str(error), "lost": link.is_lost()}
        return {"result": asdict(result), "wrote": link.last_error() if result.is_error else "", "lost": False}


def listed(tool: mcp.types.Tool) -> dict[str, Any]:
    return tool.model_dump(mode="json", by_alias=True, exclude_none=True)


async def serve(requests: Any, output: Any) -> None:
    async with anyio.create_task_group() as tasks:
        await Far(output, tasks).serve(requests)


def main() -> None:
    # a server's own children must not read requests, nor what it prints be among the replies
    requests, output = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    own = os.environ.pop(OWN_PATH, "")
    if own:
        os.environ["PYTHONPATH"] = own
    else:
        os.environ.pop("PYTHONPATH", None)
    sys.set_int_max_str_digits(0)
    anyio.run(serve, requests, output)


if __name__ == "__main__":
    main()
