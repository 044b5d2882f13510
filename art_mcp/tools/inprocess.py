"""Loads the server object of "file.py:attribute" to be run in this process; how it is spoken to is not here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any, TypeAlias

from mcp.server import MCPServer, Server

from art_mcp.errors import ConfigError, boundary

ServerObject: TypeAlias = MCPServer | Server[Any]


def load_server(target: str) -> ServerObject:
    """The server of an absolute "file.py:attribute". The file runs anew each time, so that no two sessions share its state.

    Raises ConfigError when the file is missing, cannot be run, or has no MCP server of that name.
    """
    file, _, attribute = target.rpartition(":")
    path = Path(file)
    name = f"art_mcp_server_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"no Python file at {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic and dataclasses look their module up while the file runs
    with boundary(ConfigError, f"loading {path}", Exception):
        spec.loader.exec_module(module)
    found: object = getattr(module, attribute, None)
    if not isinstance(found, MCPServer | Server):
        known = [key for key, value in vars(module).items() if isinstance(value, MCPServer | Server)]
        raise ConfigError(f"{path} has no MCP server named {attribute!r}; it has {', '.join(known) or 'none'}")
    return found  # pyright: ignore[reportUnknownVariableType]  # Server's lifespan type cannot be seen at run time
