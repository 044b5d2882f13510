"""A peer in a process of its own environment, asked line by line: our side. Its side is `benchmarks/peers/`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from art_mcp.child import launch_command

ROOT = Path(__file__).resolve().parent.parent
Ask: TypeAlias = Callable[..., Any]
"""`ask(what, **given)`: what the peer's process answers."""


def interpreter(name: str) -> Path:
    """The Python of a peer's environment, which is made where it is missing: minutes, and for vLLM some gigabytes."""
    done = subprocess.run(["make", "-s", f".peers/{name}/.made"], cwd=ROOT, stdout=sys.stderr, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the environment of {name} could not be made: see .venv/install.log, then `make .peers/{name}/.made`")
    return ROOT / ".peers" / name / "bin" / "python"


@contextmanager
def open_peer(name: str, module: str) -> Iterator[Ask]:
    """`module`, running in the peer's environment until the block ends."""
    command, args = launch_command(str(interpreter(name)), ["-m", module])
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [command, *args], cwd=ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:

        def ask(what: str, **given: Any) -> Any:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps([what, given]) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"the process of {name} ended with {process.wait()}; what it wrote to stderr is above")
            return json.loads(line)

        yield ask  # when the block ends, so does its stdin, and with that the process
