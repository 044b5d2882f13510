"""Tool servers for people: what their tools are, and one call of one of them. No model and no environment is opened."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import anyio

from art_mcp.core.arguments import validate
from art_mcp.core.names import suggest
from art_mcp.errors import ConfigError, ToolServerError
from art_mcp.tools.config import is_target, load_config, pick, target_spec
from art_mcp.types import JsonObject, ServerSpec, Tool, ToolCall, ToolResult

START_SECONDS = 30.0
"""For a server to start and to list its tools; a program that npx fetches first takes its time."""


@dataclass(frozen=True, slots=True)
class Listing:
    """The tools of one server, or the `failure` that kept it from telling them."""

    spec: ServerSpec
    tools: tuple[Tool, ...] = ()
    failure: str = ""

    def to_json(self) -> dict[str, Any]:
        about = {"name": self.spec.name, "transport": self.spec.transport}
        return {**about, "error": self.failure} if self.failure else {**about, "tools": [tool_json(one) for one in self.tools]}


def tool_json(tool: Tool) -> dict[str, Any]:
    told = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {**told, "read_only": tool.read_only, "serial": tool.serial}


def find_specs(server: str | None, config: str) -> list[ServerSpec]:
    """The server `server` (a name in the config file, or "file.py:server" from here), or all servers of the file. Raises
    ConfigError for a broken file and for a name that is not in it."""
    if server is None:
        return list(load_config(config).values())
    return [target_spec(server) if is_target(server) else pick(load_config(config), server, config)]


async def list_tools(server: str | None, config: str) -> list[Listing]:
    """What `server`, or each server of the config file, offers, in the file's order. All are asked at once, and the failure of
    one stands in its listing. Raises ConfigError as `find_specs` does."""
    specs = find_specs(server, config)
    listings: dict[str, Listing] = {}

    async def ask(spec: ServerSpec) -> None:
        listings[spec.name] = await list_one(spec)

    async with anyio.create_task_group() as group:
        for spec in specs:
            group.start_soon(ask, spec)
    return [listings[spec.name] for spec in specs]


async def list_one(spec: ServerSpec) -> Listing:
    from art_mcp.tools import open_tools

    try:
        async with open_tools([spec]) as toolbox:
            return Listing(spec, toolbox.tools)
    except (ConfigError, ToolServerError) as error:
        return Listing(spec, failure=str(error))


async def call_tool(server: str, tool: str, arguments: JsonObject, *, config: str, timeout: float) -> tuple[ToolResult, str]:
    """The result of one call, uncut, and where it is an error, the one that the server wrote meanwhile, if any; `timeout` is
    how many seconds it may take, once the server has listed its tools.

    Raises ConfigError for a tool that is not there and for arguments that do not fit its schema, before anything is called;
    ToolServerError where the server does not start, ends, or does not answer in time.
    """
    from art_mcp.tools import open_tools

    specs = find_specs(server, config)
    async with open_tools(specs, call_timeout=timeout + START_SECONDS, text_limit=sys.maxsize) as toolbox:
        known = {one.name: one for one in toolbox.tools}
        if tool not in known:
            raise ConfigError(f"server {specs[0].name!r} has no tool {tool!r}; {suggest(tool, known)}")
        complaint = validate(arguments, known[tool])
        if complaint is not None:
            raise ConfigError(f"{tool} was not called: {complaint}")
        with anyio.move_on_after(timeout):
            result = await toolbox.call(ToolCall(tool, arguments))
            return result, toolbox.last_error(tool) if result.is_error else ""
        raise ToolServerError(f"server {specs[0].name!r} did not answer {tool!r} within {timeout:g} s")
