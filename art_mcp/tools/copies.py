"""An environment's servers for its rollouts: one set for all of them, or copies, each lent to one at a time and started anew
where nothing else brings it back. How a set is opened is the toolbox's business."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import anyio
from anyio.abc import TaskGroup

from art_mcp.environment import Environment
from art_mcp.errors import ArtMcpError, ConfigError, ToolServerError
from art_mcp.ports import Toolbox, Toolboxes
from art_mcp.tools.link import ungrouped
from art_mcp.tools.toolbox import McpToolbox, open_tools
from art_mcp.types import Tool, ToolCall, ToolResult

STARTS = max(8, os.cpu_count() or 1)
"""How many sets start at the same time: each takes a second of a core, and gives up where it has to wait long for one."""

Open: TypeAlias = Callable[[], AbstractAsyncContextManager[McpToolbox]]


@asynccontextmanager
async def open_servers(
    environment: Environment,
    *,
    config: str | Path = "config.json",
    folder: str | Path | None = None,
    processes: int = 0,
) -> AsyncGenerator[Toolboxes]:
    """The servers of an environment as what its rollouts are played on, for as long as the block lasts: one set for all, or up
    to `environment.copies` sets. `config`, `folder`, `processes` and what is raised: as for `open_tools`; ConfigError also for
    `processes` where each rollout has servers of its own."""
    if processes and environment.copies:
        raise ConfigError(
            f"each rollout of environment {environment.name!r} has servers of its own (copies={environment.copies}), whose "
            "connections are held by this process: leave processes (--tool-processes) out"
        )

    def open_set() -> AbstractAsyncContextManager[McpToolbox]:
        return open_tools(environment.servers, config=config, folder=folder, only=environment.tools, processes=processes)

    if not environment.copies:
        async with open_set() as toolbox:
            yield toolbox
        return
    async with open_copies(open_set, most=environment.copies, reuse=environment.reset is not None) as copies:
        yield copies


@asynccontextmanager
async def open_copies(open_set: Open, *, most: int, reuse: bool) -> AsyncGenerator[Copies]:
    """At most so many sets of servers at a time, the first of which is started at once and tells what the tools are. With
    `reuse`, a set that was lent goes to the next rollout as it is, for that one to reset."""
    with ungrouped():
        async with anyio.create_task_group() as tasks:
            copies = Copies(open_set, reuse, tasks, anyio.Semaphore(most), anyio.CapacityLimiter(STARTS))
            try:
                first = await copies.take()
                assert first.toolbox is not None
                copies.tools = first.toolbox.tools
                copies.put_back(first)
                yield copies
            finally:
                copies.close()


@dataclass(slots=True, eq=False)
class Copy:
    """One set of servers, open in a task of its own until it is `over`; `failure` says why it did not open."""

    toolbox: McpToolbox | None = None
    failure: ArtMcpError | None = None
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    ready: anyio.Event = field(default_factory=anyio.Event)
    over: anyio.Event = field(default_factory=anyio.Event)

    def is_usable(self) -> bool:
        return self.toolbox is not None and not self.toolbox.lost


@dataclass(slots=True)
class Copies:
    """Sets of servers of which each rollout in flight has one for itself. A set has one of the `places` while it is starting,
    lent or ending; idle ones are there for whoever takes a place. `starts` bounds how many start at once."""

    open_set: Open
    reuse: bool
    tasks: TaskGroup
    places: anyio.Semaphore
    starts: anyio.CapacityLimiter
    tools: tuple[Tool, ...] = ()
    idle: list[Copy] = field(default_factory=list[Copy])
    closed: bool = False
    separate: bool = True

    @asynccontextmanager
    async def lend(self) -> AsyncGenerator[Toolbox]:
        """A set that nobody else has, in the order in which it was asked for; waits where all are lent. One in which a call was
        given up, or anything else failed, is not lent again. Raises ToolServerError where a set does not start, and once these
        are closed."""
        if self.closed:
            raise ToolServerError("the servers are closed: the block that opened them is over")
        copy = await self.take()
        assert copy.toolbox is not None
        loan = Loan()
        try:
            yield Lent(copy.toolbox, loan)
        except BaseException:
            loan.clean = False
            raise
        finally:
            loan.over = True
            if self.reuse and loan.clean and not self.closed and copy.is_usable():
                self.put_back(copy)
            else:
                copy.over.set()

    async def take(self) -> Copy:
        while True:
            await self.places.acquire()
            copy = self.idle.pop() if self.idle else self.start()
            try:
                await copy.ready.wait()
            except BaseException:
                copy.scope.cancel()
                raise
            if copy.failure is not None:
                raise copy.failure
            if copy.is_usable():
                return copy
            copy.over.set()  # it died while it was idle

    def put_back(self, copy: Copy) -> None:
        self.idle.append(copy)
        self.places.release()

    def start(self) -> Copy:
        copy = Copy()
        self.tasks.start_soon(self.keep, copy)
        return copy

    async def keep(self, copy: Copy) -> None:
        try:
            with copy.scope:
                async with AsyncExitStack() as stack:
                    async with self.starts:
                        copy.toolbox = await stack.enter_async_context(self.open_set())
                    copy.ready.set()
                    await copy.over.wait()
        except ArtMcpError as error:
            copy.failure = error
            if copy.ready.is_set():
                raise
        finally:
            copy.ready.set()
            self.places.release()

    def close(self) -> None:
        """Ends the idle sets; those that are lent end with their loans."""
        self.closed = True
        while self.idle:
            self.idle.pop().over.set()


@dataclass(slots=True)
class Loan:
    """Whether it is `over`, and whether it left nothing under way."""

    clean: bool = True
    over: bool = False


@dataclass(frozen=True, slots=True)
class Lent:
    """A toolbox for as long as it is lent."""

    toolbox: Toolbox
    loan: Loan

    @property
    def tools(self) -> tuple[Tool, ...]:
        return self.toolbox.tools

    @property
    def unrestricted(self) -> Lent:
        return replace(self, toolbox=self.toolbox.unrestricted)

    async def call(self, call: ToolCall) -> ToolResult:
        """As the toolbox does. Raises RuntimeError once the rollout that it was lent to is over."""
        if self.loan.over:
            raise RuntimeError(f"{call.name!r} is called on servers that were lent to a rollout which is over")
        try:
            return await self.toolbox.call(call)
        except BaseException:
            self.loan.clean = False  # what was asked for may still be under way
            raise

    def last_error(self, name: str) -> str:
        return self.toolbox.last_error(name)
