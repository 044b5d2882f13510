"""`art-mcp call`: one call of one tool, as a policy would make it."""

from __future__ import annotations

import sys
from typing import Annotated, Any, cast

import typer

from art_mcp.cli import completion
from art_mcp.cli import options as o
from art_mcp.errors import ConfigError, boundary, explained

HELP = "Call one tool and print its result. Its own error is one line on stderr and exit code 1."
EXAMPLE = """Example: art-mcp call calculator add '{"a": 2, "b": 40}'"""
SAMPLE = """'{"a": 2}'"""
WANTED = f"the arguments of the call must be a JSON object, such as {SAMPLE}"

Server = Annotated[
    str,
    typer.Argument(metavar="SERVER", help="A name in the config file, or file.py:server.", autocompletion=completion.servers),
]
ToolName = Annotated[str, typer.Argument(metavar="TOOL", help="One of those that `art-mcp tools SERVER` lists.")]
Arguments = Annotated[
    str, typer.Argument(metavar="JSON", help="Its arguments as a JSON object; - reads them from stdin.", show_default=True)
]
Timeout = Annotated[float, o.number("--timeout", min=0.1, help="Seconds to wait for the result.")]


def command(
    server: Server,
    tool: ToolName,
    arguments: Arguments = "{}",
    config: o.ConfigFile = "config.json",
    timeout: Timeout = 60.0,
    json: o.Json = False,
) -> None:
    import anyio

    from art_mcp.wiring.servers import call_tool

    values = read_arguments(arguments)
    with o.waiting(f"calling {tool}"):
        result, wrote = anyio.run(lambda: call_tool(server, tool, values, config=config, timeout=timeout))
    if result.is_error:
        o.complain(explained(result.text, wrote))
    else:
        o.write(o.harmless(result.text) if sys.stdout.isatty() else result.text)
    if json:
        o.write_json({"text": result.text, "is_error": result.is_error, "structured": result.structured, "server_wrote": wrote})
    if result.is_error:
        raise typer.Exit(1)


def read_arguments(text: str) -> dict[str, Any]:
    """The object that `text`, or stdin where it is "-", holds. Raises ConfigError with where the JSON breaks."""
    from art_mcp.core.complaints import clip
    from art_mcp.core.json_scan import NotJson, quote, read_whole

    written = read_stdin() if text == "-" else text
    try:
        value = read_whole(written.strip() or "{}")
    except NotJson as error:
        if not written.lstrip().startswith("{"):
            raise ConfigError(f"{WANTED}, not {clip(quote(written.strip()))}") from None
        lost = f", so write it in single quotes, such as {SAMPLE}" if '"' not in text else ""  # the shell took the double ones
        arrived = "" if text == "-" else f"; what arrived is {clip(text)}{lost}"
        raise ConfigError(f"the arguments of the call: {error}{arrived}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{WANTED}, not {quote(value)}")
    return cast("dict[str, Any]", value)


def read_stdin() -> str:
    with boundary(ConfigError, "reading the arguments from stdin", OSError, UnicodeDecodeError):
        return sys.stdin.read()
