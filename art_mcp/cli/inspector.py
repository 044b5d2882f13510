"""`art-mcp inspect`: the MCP Inspector's web page on the servers of config.json."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from art_mcp.cli import completion
from art_mcp.cli import options as o
from art_mcp.errors import ConfigError

if TYPE_CHECKING:
    from art_mcp.wiring.inspector import Inspector

HELP = "Open the MCP Inspector, a web page that shows and calls the tools of the servers in config.json. Ctrl-C ends it."
EXAMPLE = "Example: art-mcp inspect calculator"

ServerOrNone = Annotated[
    str | None,
    typer.Argument(
        metavar="SERVER", help="The one to begin with. Default: all of the file.", autocompletion=completion.servers
    ),
]
Port = Annotated[int, typer.Option("--port", min=1, max=65535, help="The web page's port on this machine.")]
Print = Annotated[bool, typer.Option("--print", help="Print the command, and start nothing.")]


def command(
    server: ServerOrNone = None,
    config: o.ConfigFile = "config.json",
    port: Port = 6274,
    print_only: Print = False,
    json: o.Json = False,
) -> None:
    import anyio

    from art_mcp.wiring.inspector import run_inspector

    inspector = prepare(server, config, port=port, running=not (print_only or json))
    if print_only:
        o.write(inspector.line)
    if json:
        o.write_json(inspector.to_json())
    if not (print_only or json):
        anyio.run(run_inspector, inspector)


def prepare(server: str | None, config: str, *, port: int, running: bool) -> Inspector:
    """The command; where it will run, its port is checked, and servers that are still to be started are named on stderr."""
    from art_mcp.tools.config import load_config, pick
    from art_mcp.wiring.inspector import find_inspector, find_silent, free

    servers = load_config(config)
    shown = list(servers.values()) if server is None else [pick(servers, server, config)]
    inspector = find_inspector(Path(config), server, port=port)
    if running and not free("127.0.0.1", port):
        raise ConfigError(f"port {port} on 127.0.0.1 is in use; choose another with --port")
    for hint in find_silent(shown, servers):
        sys.stderr.write(f"hint: {hint}\n")
    return inspector
