"""Finds the MCP Inspector, and runs its web page on a config file; what the servers offer is not looked at here."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from art_mcp.child import end_child, launch_command
from art_mcp.errors import ArtMcpError, ConfigError, boundary
from art_mcp.types import ServerSpec

PACKAGE = "@modelcontextprotocol/inspector@2.12.0"
NODE = (22, 19)
"""What that version needs; on an older node npm installs an old Inspector and says nothing."""
LOCAL = Path(".peers") / "inspector"
HERE = f"npm install --prefix {LOCAL} {PACKAGE} node@22"
"""Puts the Inspector, and a node that is new enough, where `find_inspector` looks first."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
GRACE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Inspector:
    """A command to run in `folder`, with some environment variables changed."""

    argv: tuple[str, ...]
    environ: Mapping[str, str]
    folder: Path

    @property
    def line(self) -> str:
        """The command for a shell."""
        changes = [f"{name}={shlex.quote(value)}" for name, value in self.environ.items() if name != "PATH"]
        path = self.environ["PATH"].removesuffix(os.environ.get("PATH", os.defpath))
        begin = [] if self.folder == Path.cwd() else ["cd", shlex.quote(str(self.folder)), "&&"]
        return " ".join([*begin, f'PATH={shlex.quote(path)}"$PATH"', *changes, shlex.join(self.argv)])

    def to_json(self) -> dict[str, Any]:
        return {"command": self.argv, "env": dict(self.environ), "cwd": str(self.folder)}


def find_inspector(config: Path, server: str | None, *, port: int) -> Inspector:
    """The Inspector's web page on `config`, from .peers/inspector where there is one, else from npx.

    It runs in the file's folder, and finds this Python first where an entry's command is "python", as we do.
    Raises ConfigError where node is missing or too old.
    """
    local = LOCAL.absolute() / "node_modules"
    script, own_node = local / ".bin" / "mcp-inspector", local / "node" / "bin" / "node"
    own = str(own_node) if own_node.is_file() else None
    node = find_node(own)
    start = [node, str(script)] if script.is_file() else [find_npx(), "--yes", PACKAGE]
    chosen = [] if server is None else ["--server", server]
    first = [str(Path(program).parent) for program in (sys.executable, own) if program]
    environ = {"PATH": os.pathsep.join([*first, os.environ.get("PATH", os.defpath)]), "CLIENT_PORT": str(port)}
    return Inspector((*start, "--config", str(config.absolute()), *chosen), environ, config.absolute().parent)


def find_node(own: str | None) -> str:
    """A node that the Inspector runs on. Raises ConfigError where there is none."""
    node = own or shutil.which("node")
    needs = f"the MCP Inspector needs node {NODE[0]}.{NODE[1]} or newer"
    if node is None:
        raise ConfigError(f"{needs}, and there is none: install it (https://nodejs.org)")
    found = version_of(node)
    if found < NODE:
        remedy = f"install a newer one, or have one here: {HERE}"
        raise ConfigError(f"{needs}, and {node} is {'.'.join(map(str, found)) or 'none that says its version'}: {remedy}")
    return node


def version_of(node: str) -> tuple[int, ...]:
    command, args = launch_command(node, ["--version"])
    with boundary(ConfigError, f"asking {node} for its version", OSError, subprocess.SubprocessError):
        said = subprocess.run([command, *args], capture_output=True, text=True, timeout=30, check=False).stdout
    return tuple(map(int, re.findall(r"\d+", said)[:3]))


def find_npx() -> str:
    npx = shutil.which("npx")
    if npx is None:
        raise ConfigError("npx is missing, which fetches the MCP Inspector: install npm, with which it comes")
    return npx


def find_silent(shown: Sequence[ServerSpec], servers: Mapping[str, ServerSpec]) -> list[str]:
    """A line for each address on this machine where one of `shown` should listen and nothing does."""
    names: dict[str, list[ServerSpec]] = {}
    for spec in shown:
        if spec.url and "${" not in spec.url:
            names.setdefault(spec.url, []).append(spec)
    return [silence(specs, servers) for specs in names.values() if is_silent(specs[0])]


def is_silent(spec: ServerSpec) -> bool:
    with boundary(ConfigError, f"server {spec.name!r}: its url", ValueError):
        host, port = urlsplit(spec.url).hostname, urlsplit(spec.url).port
    return host in LOOPBACK and port is not None and free(host, port)


def silence(specs: Sequence[ServerSpec], servers: Mapping[str, ServerSpec]) -> str:
    address = urlsplit(specs[0].url)
    program = start_of(specs[0], servers)
    such = f", such as: {program} --transport {specs[0].transport} --port {address.port}" if program else ""
    names = ", ".join(spec.name for spec in specs)
    return f"{names}: nothing listens on {address.hostname}:{address.port} yet, so start a server in another terminal{such}"


def start_of(spec: ServerSpec, servers: Mapping[str, ServerSpec]) -> str:
    """`python FILE` of the stdio entry that is most likely the same server: its name begins this one's, or it is the only
    one in Python."""
    programs = {other.name: file for other in servers.values() if (file := python_file(other))}
    named = [file for name, file in programs.items() if spec.name.startswith(name)]
    file = named[0] if named else next(iter(programs.values())) if len(programs) == 1 else ""
    return file and f"python {shlex.quote(file)}"


def python_file(spec: ServerSpec) -> str:
    return next((argument for argument in spec.args[:1] if spec.command == sys.executable and argument.endswith(".py")), "")


def free(host: str, port: int) -> bool:
    """Whether nothing listens there."""
    import socket

    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return True
    return False


async def run_inspector(inspector: Inspector) -> None:
    """Runs it until it ends; however this block is left, all that it started ends too. Raises ArtMcpError where it fails."""
    import anyio

    command, args = launch_command(inspector.argv[0], inspector.argv[1:])
    environ = {**os.environ, **inspector.environ}
    process = await anyio.open_process(
        [command, *args],
        stdin=subprocess.DEVNULL,
        stdout=None,
        stderr=None,
        env=environ,
        cwd=inspector.folder,
        start_new_session=True,  # Ctrl-C comes to us alone, and ends it below
    )
    try:
        code = await process.wait()
    finally:
        with anyio.CancelScope(shield=True):
            await end_child(process, GRACE_SECONDS)
    if code:
        raise ArtMcpError(f"the MCP Inspector ended with exit code {code}")
