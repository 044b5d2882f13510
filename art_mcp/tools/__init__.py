"""Tool servers: the mcpServers file, connections and the toolbox. The only room that speaks MCP; agents see a port.

The file can be read without the protocol: what needs mcp is loaded when it is named.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from art_mcp.tools.config import load_config

if TYPE_CHECKING:
    from art_mcp.tools.copies import open_servers
    from art_mcp.tools.toolbox import McpToolbox, open_tools

__all__ = ["McpToolbox", "load_config", "open_servers", "open_tools"]
LAZY = {"McpToolbox": "toolbox", "open_servers": "copies", "open_tools": "toolbox"}


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(import_module(f"art_mcp.tools.{LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
