"""Starts the odd server on any transport."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from art_mcp.child import launch_command
from art_mcp.tools import McpToolbox
from art_mcp.types import ServerSpec, ToolCall
from tests.ports import free_port

ODD = str(Path(__file__).with_name("odd_server.py"))


def odd_stdio(*args: str, **fields) -> ServerSpec:
    return ServerSpec("odd", "stdio", command=sys.executable, args=(ODD, *args), **fields)


@contextmanager
def odd_url(transport: str, *, script: str = ODD) -> Iterator[ServerSpec]:
    """The odd server, or another that takes the same arguments, behind a URL, once it listens."""
    port = free_port()
    command, args = launch_command(sys.executable, [script, transport, str(port)])
    with subprocess.Popen(
        [command, *args], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            wait_for_port(port, process)
            path = "sse" if transport == "sse" else "mcp"
            yield ServerSpec("odd", transport, url=f"http://127.0.0.1:{port}/{path}")
        finally:
            process.terminate()


def wait_for_port(port: int, process: subprocess.Popen) -> None:
    while process.poll() is None:
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.01)  # for the server needs the processor too
    raise AssertionError(f"the server ended: {process.stdout.read()}")


def odd_in_process() -> ServerSpec:
    return ServerSpec("odd", "in-process", target=f"{ODD}:server")


async def text_of(toolbox: McpToolbox, name: str, **arguments) -> str:
    return (await toolbox.call(ToolCall(name, arguments))).text
