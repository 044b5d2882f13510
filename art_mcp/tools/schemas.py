"""Turns a server's tool listing into what the model is told; no server is spoken to here."""

from __future__ import annotations

import inspect

import mcp.types

from art_mcp.core.parameters import parameters_of
from art_mcp.types import Tool


def describe_tool(tool: mcp.types.Tool, name: str) -> Tool:
    """The tool under `name`: its description trimmed, its parameters without the titles that only repeat a name."""
    hints = tool.annotations or mcp.types.ToolAnnotations()
    return Tool(
        name,
        inspect.cleandoc(tool.description or tool.title or ""),
        parameters_of(tool.input_schema),
        read_only=hints.read_only_hint is True,
        serial=hints.read_only_hint is False or hints.destructive_hint is True,
    )
