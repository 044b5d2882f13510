"""A calculator as an MCP server over stdio, SSE or streamable HTTP: the tools and how they are served, not the arithmetic."""

import argparse
import errno
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Final

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.transport_security import TransportSecuritySettings
from mcp.types import CallToolResult, TextContent, ToolAnnotations
from pydantic import BaseModel, WithJsonSchema

HERE: Final = str(Path(__file__).resolve().parent)
if HERE not in sys.path:  # loaded by path, or started with `python -I`: then Python does not add the folder itself
    sys.path.append(HERE)

import arithmetic  # noqa: E402
from expression import evaluate as value_of  # noqa: E402

JsonNumber = Annotated[object, WithJsonSchema({"type": "number"})]
"""Checked by `arithmetic.read` alone: pydantic would take true for 1 and "1" for 1.0."""
JsonInteger = Annotated[object, WithJsonSchema({"type": "integer"})]

INSTRUCTIONS: Final = (
    f"Whole numbers are exact up to {arithmetic.MAX_DIGITS} digits, decimals up to {arithmetic.EXACT_DIGITS}; "
    f"other results have {arithmetic.SHOWN_DIGITS} significant digits."
)
SAFE: Final = ToolAnnotations(read_only_hint=True, idempotent_hint=True, destructive_hint=False, open_world_hint=False)

KEPT_SECONDS: Final = 75
"""For an idle connection. Clients keep theirs for 5 s, and so would uvicorn: a request that crosses the close is lost."""

# WARNING: the SDK configures the root logger, also in a program that only imports this module.
server = MCPServer("calculator", instructions=INSTRUCTIONS, version="1.0.0", log_level="WARNING")


class Answer(BaseModel):  # the structured content of every result; a docstring would be sent with each tool's schema
    result: Annotated[int | float, WithJsonSchema({"type": "number"})]


Reply = Annotated[CallToolResult, Answer]


def reply(operation: Callable[..., arithmetic.Number], **given: object) -> CallToolResult:
    """The result of an operation on the numbers `given`, by their names in the tool's schema."""
    try:
        values = [arithmetic.read(value, name) for name, value in given.items()]
        text, result = arithmetic.display(operation(*values))
    except arithmetic.CalculationError as error:
        raise ToolError(str(error)) from error
    return CallToolResult(content=[TextContent(type="text", text=text)], structured_content={"result": result})


# Tools are `async def` because the SDK runs plain functions in threads, which takes twice as long.
# Their descriptions are short because every prompt carries them.


@server.tool(annotations=SAFE)
async def add(a: JsonNumber, b: JsonNumber) -> Reply:
    """Add two numbers."""
    return reply(arithmetic.add, a=a, b=b)


@server.tool(annotations=SAFE)
async def subtract(a: JsonNumber, b: JsonNumber) -> Reply:
    """Subtract b from a."""
    return reply(arithmetic.subtract, a=a, b=b)


@server.tool(annotations=SAFE)
async def multiply(a: JsonNumber, b: JsonNumber) -> Reply:
    """Multiply two numbers."""
    return reply(arithmetic.multiply, a=a, b=b)


@server.tool(annotations=SAFE)
async def divide(a: JsonNumber, b: JsonNumber) -> Reply:
    """Divide a by b."""
    return reply(arithmetic.divide, a=a, b=b)


@server.tool(annotations=SAFE)
async def modulo(a: JsonNumber, b: JsonNumber) -> Reply:
    """Remainder of a divided by b, with the sign of b."""
    return reply(arithmetic.modulo, a=a, b=b)


@server.tool(annotations=SAFE)
async def power(a: JsonNumber, b: JsonNumber) -> Reply:
    """Raise a to the power b."""
    return reply(arithmetic.power, a=a, b=b)


@server.tool(annotations=SAFE)
async def sqrt(a: JsonNumber) -> Reply:
    """Square root of a."""
    return reply(arithmetic.sqrt, a=a)


@server.tool(annotations=SAFE)
async def absolute(a: JsonNumber) -> Reply:
    """Absolute value of a."""
    return reply(arithmetic.absolute, a=a)


@server.tool(annotations=SAFE)
async def round_to(a: JsonNumber, decimals: JsonInteger) -> Reply:
    """Round a to a number of decimals, halves away from zero."""
    return reply(arithmetic.round_to, a=a, decimals=decimals)


@server.tool(annotations=SAFE)
async def evaluate(expression: str) -> Reply:
    """Evaluate an expression with + - * / // % ** ( ) sqrt abs round min max pi e."""
    return reply(lambda: value_of(expression))


def security(host: str, extra: Sequence[str]) -> TransportSecuritySettings:
    """Host and Origin checks (DNS rebinding) for any `host`, 0.0.0.0 included: loopback names, the host itself, this
    machine's name and the `extra` ones, on any port."""
    machine = socket.gethostname()
    names = ["127.0.0.1", "localhost", "[::1]", bracketed(host), machine, machine.lower(), *map(bracketed, extra)]
    hosts = [form for name in dict.fromkeys(names) for form in (name, f"{name}:*")]
    origins = [f"{scheme}://{name}" for scheme in ("http", "https") for name in hosts]
    return TransportSecuritySettings(enable_dns_rebinding_protection=True, allowed_hosts=hosts, allowed_origins=origins)


def bracketed(host: str) -> str:
    """A host as it stands in a URL."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, so that clients can connect as soon as its address is known. Raises OSError."""
    address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listening = socket.create_server(address[4][:2], family=address[0], backlog=128)
    # Connections inherit it. asyncio sets it only where a socket says that it is TCP, which those of create_server do not, and
    # then the end of each answer waits 40 ms for the client's acknowledgement of its beginning.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def explain(error: OSError, host: str, *, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use; choose another with --port"
    return f"cannot listen on {host}:{port}: {error.strerror or error}"


def serve_http(transport: str, *, listening: socket.socket, host: str, extra_hosts: Sequence[str]) -> None:
    """Serves /sse or /mcp on a listening socket until a signal."""
    import uvicorn

    protection = security(host, extra_hosts)
    sse = transport == "sse"
    app = server.sse_app(transport_security=protection) if sse else server.streamable_http_app(transport_security=protection)
    url = f"http://{bracketed(host)}:{listening.getsockname()[1]}{'/sse' if sse else '/mcp'}"
    sys.stderr.write(f"calculator: serving {url} (Ctrl-C ends)\n")
    # The SDK raises after it has refused a request or ended a stream, and uvicorn would log that with a traceback; what a
    # tool raises, the SDK logs. Without the time limit, a client's open stream would outlast Ctrl-C.
    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1, timeout_keep_alive=KEPT_SECONDS)
    uvicorn.Server(config).run(sockets=[listening])


def port_number(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is not a port (0 to 65535)")
    return port


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="server.py", description="A calculator as an MCP server. " + INSTRUCTIONS)
    parser.add_argument(
        "--transport",
        choices=["stdio", "sse", "streamable-http"],
        default="stdio",
        help="stdio (default), sse at /sse, or streamable-http at /mcp",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    parser.add_argument("--port", type=port_number, default=8001, help="port (default: 8001; 0 for any free one)")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="also accept requests for this host name or address; may be repeated. Without it: loopback names, --host and "
        "this machine's name",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until the client leaves (stdio) or a signal comes. Returns the exit code: 2 when the address cannot be had."""
    options = arguments(argv)
    if options.transport == "stdio":
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler waits for the thread that reads stdin
        server.run()
        return 0
    try:
        listening = listen(options.host, options.port)
    except OSError as error:
        sys.stderr.write(f"calculator: {explain(error, options.host, port=options.port)}\n")
        return 2
    with listening, suppress(KeyboardInterrupt):
        serve_http(options.transport, listening=listening, host=options.host, extra_hosts=options.allow_host)
    return 0


if __name__ == "__main__":
    sys.exit(main())
