"""Loads the server object of "file.py:attribute" to be run in this process; how it is spoken to is not here."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from mcp.server import MCPServer, Server
from rich.logging import RichHandler

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
    with without_sdk_handler(), boundary(ConfigError, f"loading {path}", Exception):
        spec.loader.exec_module(module)
    found: object = getattr(module, attribute, None)
    if not isinstance(found, MCPServer | Server):
        known = [key for key, value in vars(module).items() if isinstance(value, MCPServer | Server)]
        raise ConfigError(f"{path} has no MCP server named {attribute!r}; it has {', '.join(known) or 'none'}")
    return found  # pyright: ignore[reportUnknownVariableType]  # Server's lifespan type cannot be seen at run time


@contextmanager
def without_sdk_handler() -> Generator[None]:
    """The root logger without the RichHandler that the SDK's MCPServer gives it where it has none, and at its level: this
    program's stderr is no server's log, and each tool that raises would print a traceback of some hundred lines there. What
    the file itself configures stays."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    try:
        yield
    finally:
        added = [handler for handler in root.handlers if handler not in handlers and isinstance(handler, RichHandler)]
        for handler in added:
            root.removeHandler(handler)
        if added:
            root.setLevel(level)
