"""`art-mcp tools`: what servers offer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from art_mcp.cli import completion
from art_mcp.cli import options as o

if TYPE_CHECKING:
    from art_mcp.types import Tool
    from art_mcp.wiring.servers import Listing

HELP = "List the tools of a server, or of every server in config.json: what they do, what they take, what they change."
EXAMPLE = "Example: art-mcp tools calculator"

ServerOrNone = Annotated[
    str | None,
    typer.Argument(
        metavar="SERVER",
        help="A name in the config file, or file.py:server. Default: every server of the file.",
        autocompletion=completion.servers,
    ),
]


def command(server: ServerOrNone = None, config: o.ConfigFile = "config.json", json: o.Json = False) -> None:
    import anyio

    from art_mcp.wiring.servers import list_tools

    with o.waiting("asking for tools"):
        listings = anyio.run(lambda: list_tools(server, config))
    for listing in listings:
        show(listing)
    if json:
        o.write_json({"servers": [listing.to_json() for listing in listings]})
    if any(listing.failure for listing in listings):
        raise typer.Exit(o.FAILED)


def show(listing: Listing) -> None:
    """The tools on stdout, or on stderr why there are none to show."""
    if listing.failure:
        o.complain(listing.failure)
        return
    count = len(listing.tools)
    o.write(f"{listing.spec.name} ({listing.spec.transport}): {count} {'tool' if count == 1 else 'tools'}")
    for tool in listing.tools:
        o.write("\n".join(lines_of(tool)))


def lines_of(tool: Tool) -> list[str]:
    from art_mcp.cli.signature import first_line, parameter_lines

    mark = " (read-only)" if tool.read_only else " (changes things)" if tool.serial else ""
    about = first_line(tool.description)
    rest = o.harmless(f"{mark}: {about}" if about else mark)
    parameters = [f"    {o.harmless(line)}" for line in parameter_lines(tool.parameters)]
    return [f"  {o.coloured(o.harmless(tool.name), o.BOLD)}{rest}", *parameters]
