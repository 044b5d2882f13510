"""Several tool servers as one toolbox: which servers, which names, which tool is where. How one is spoken to is not here."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from art_mcp.core.names import suggest
from art_mcp.errors import ConfigError
from art_mcp.tools.config import is_target, load_config, pick, server_spec, target_spec
from art_mcp.tools.connect import Era
from art_mcp.tools.inprocess import ServerObject
from art_mcp.tools.link import Server, Waiting, name_of, open_links
from art_mcp.tools.results import TEXT_LIMIT
from art_mcp.tools.schemas import describe_tool
from art_mcp.types import ServerSpec, Tool, ToolCall, ToolResult

AnyServer: TypeAlias = str | Mapping[str, Any] | ServerSpec | ServerObject
"""A name in the config file, "file.py:server", a `mcpServers` entry ("name" is optional), a spec, or an MCP server object."""


class McpToolbox:
    """The tools of open servers; calls may run in parallel, and cancelling one leaves the others alone.

    `renamed` gives for each name that had to be prefixed the one that its server uses. `unrestricted` has also the tools
    that are not offered.
    """

    def __init__(self, tools: Sequence[Tool], unrestricted: AllTools) -> None:
        self.tools = tuple(tools)
        self.unrestricted = unrestricted
        self._routes = {tool.name: unrestricted.routes[tool.name] for tool in tools}
        self.renamed: Mapping[str, str] = {name: own for name, (_, own) in self._routes.items() if name != own}

    async def call(self, call: ToolCall) -> ToolResult:
        """Makes a call. What the model got wrong (an unknown tool, bad arguments) is a result with `is_error`.

        Raises ToolServerError when the server is gone (at once, if that is known), does not answer in time, or fails itself.
        """
        if call.name not in self._routes:
            return ToolResult(f"unknown tool {call.name!r}; {suggest(call.name, self._routes)}", is_error=True)
        return await self.unrestricted.call(call)

    def last_error(self, name: str) -> str:
        """As `Toolbox` has it; "" also where the tool is none of ours."""
        return self.unrestricted.last_error(name)

    @property
    def lost(self) -> bool:
        """Whether one of the servers is known to be gone."""
        return any(link.is_lost() for link, _ in self.unrestricted.routes.values())

    @property
    def separate(self) -> bool:
        return False

    @asynccontextmanager
    async def lend(self) -> AsyncGenerator[McpToolbox]:
        """Itself: all rollouts share it."""
        yield self


@dataclass(frozen=True, slots=True)
class AllTools:
    """Every tool of open servers, by the names under which a toolbox offers some of them: for rewards, not for models."""

    tools: tuple[Tool, ...]
    routes: Mapping[str, tuple[Server, str]]
    text_limit: int

    @property
    def unrestricted(self) -> AllTools:
        return self

    async def call(self, call: ToolCall) -> ToolResult:
        """As a toolbox does; but a tool that no server has is the caller's mistake: LookupError, with the names there are."""
        if call.name not in self.routes:
            raise LookupError(f"no server has a tool {call.name!r}; {suggest(call.name, self.routes)}")
        link, name = self.routes[call.name]
        return await link.call(name, call.arguments, limit=self.text_limit)

    def last_error(self, name: str) -> str:
        route = self.routes.get(name)
        return "" if route is None else route[0].last_error()


@asynccontextmanager
async def open_tools(
    servers: Sequence[AnyServer],
    *,
    config: str | Path = "config.json",
    folder: str | Path | None = None,
    only: Sequence[str] | None = None,
    mode: Era = "auto",
    connect_timeout: float = 30.0,
    call_timeout: float = 60.0,
    text_limit: int = TEXT_LIMIT,
    processes: int = 0,
) -> AsyncGenerator[McpToolbox]:
    """All `servers`, connected in parallel, as one toolbox that lives as long as the block.

    Relative paths of entries and "file.py:server" start at `folder` (default: the config file's). Tools of different servers
    with the same name become `<server>_<tool>`. `only` restricts what a policy is offered, and orders it; rewards may call the
    other tools too. Timeouts are in seconds (see `connect`), `text_limit` in characters of a result.

    `processes`: how many other processes hold the connections, and with them servers in the same process; 0: this one. A call
    takes half a millisecond of the process that makes it, and a rollout hardly more besides. Each has connections of its own,
    so more than one is for servers that keep nothing between calls, or that are reached by a url.

    Raises ConfigError for an unknown server or tool and for a broken config; ToolServerError when a server cannot be reached.
    """
    waiting = Waiting(mode, connect_timeout, call_timeout)
    found = find_servers(servers, Path(config), folder=folder)
    refuse_twice("servers", [name_of(server) for server in found])
    if processes:
        from art_mcp.tools.apart import open_links_apart

        opening: AbstractAsyncContextManager[Sequence[Server]] = open_links_apart(found, waiting, processes=processes)
    else:
        opening = open_links(found, waiting)
    async with opening as links:
        yield offer(links, only, text_limit=text_limit)


def find_servers(servers: Sequence[AnyServer], config: Path, *, folder: str | Path | None) -> list[ServerSpec | ServerObject]:
    root = config.parent if folder is None else Path(folder)
    known: Mapping[str, ServerSpec] = {}
    found: list[ServerSpec | ServerObject] = []
    for number, server in enumerate(servers, 1):
        if isinstance(server, Mapping):
            found.append(server_spec(str(server.get("name") or f"server{number}"), server, root))
        elif not isinstance(server, str):
            found.append(server)
        elif is_target(server):
            found.append(target_spec(server, root))
        else:
            known = known or load_config(config)
            found.append(pick(known, server, config))
    return found


def refuse_twice(what: str, names: Sequence[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ConfigError(f"{count} {what} are called {name!r}; rename all but one of them")


def offer(links: Sequence[Server], only: Sequence[str] | None, *, text_limit: int) -> McpToolbox:
    """A toolbox of what the links list, the names made unique."""
    counts = Counter(tool.name for link in links for tool in link.tools)
    listed = [
        (describe_tool(tool, tool.name if counts[tool.name] == 1 else f"{link.name}_{tool.name}"), link, tool.name)
        for link in links
        for tool in link.tools
    ]
    refuse_twice("tools", [tool.name for tool, _, _ in listed])
    tools = {tool.name: tool for tool, _, _ in listed}
    chosen = list(tools) if only is None else list(dict.fromkeys(only))
    for name in chosen:
        if name not in tools:
            raise ConfigError(f"no tool {name!r}; {suggest(name, tools)}")
    routes = {tool.name: (link, name) for tool, link, name in listed}
    return McpToolbox([tools[name] for name in chosen], AllTools(tuple(tools.values()), routes, text_limit))
