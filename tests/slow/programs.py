"""Programs that the slow tests start, each in a group of its own that ends with its block; what they are is not here."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from art_mcp.child import launch_command
from art_mcp.wiring.inspector import NODE, version_of

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = ROOT / ".peers" / "inspector" / "node_modules"


@dataclass(frozen=True)
class Clone:
    """A clone with the Inspector installed in it, and the environment of a shell there: nothing else of ours is in it."""

    folder: Path
    environ: Mapping[str, str]

    @contextmanager
    def starts(
        self, *command: str, place: str = ".", stderr: int | IO[bytes] = subprocess.STDOUT
    ) -> Iterator[subprocess.Popen]:
        """A program with a pipe for its stdout; it and all that it started have ended when the block has."""
        name, args = launch_command(command[0], command[1:])
        cwd = self.folder / place
        with subprocess.Popen(
            [name, *args],
            cwd=cwd,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                yield process
            finally:
                end(process)

    def runs(self, *command: str, place: str = ".") -> tuple[int, str, str]:
        """The exit code, stdout and stderr of a program that must end within a minute and a half."""
        with self.starts(*command, place=place, stderr=subprocess.PIPE) as process:
            out, err = process.communicate(timeout=90)
        return process.returncode, out, err


def end(process: subprocess.Popen) -> None:
    """SIGTERM to the whole group, ten seconds, SIGKILL."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()


def line_with(text: str, process: subprocess.Popen) -> str:
    """The first line of stdout with this text in it; fails with all that was said where the program ends without one."""
    said = []
    for line in process.stdout:
        said.append(line)
        if text in line:
            return line.strip()
    raise AssertionError(f"no {text!r} in:\n{''.join(said)}")


def servers_of(place: str = ".") -> dict[str, dict]:
    """The entries of a config.json, by name."""
    return json.loads((ROOT / place / "config.json").read_text())["mcpServers"]


def answers(port: int) -> bool:
    """Whether something listens there on this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def node_folder() -> Path | None:
    """Where a node is that is new enough for the Inspector: on PATH, or installed beside the Inspector."""
    candidates = [shutil.which("node"), shutil.which("node", path=str(INSTALLED / "node" / "bin"))]
    return next((Path(node).parent for node in candidates if node and version_of(node) >= NODE), None)
