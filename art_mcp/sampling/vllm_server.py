"""One vLLM server process: starting it, knowing when it answers and why it ended. What it is asked lives in `vllm_engine`."""

from __future__ import annotations

import asyncio
import re
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import anyio

from art_mcp.child import launch_command, signal_name
from art_mcp.errors import ConfigError, EngineError, boundary
from art_mcp.sampling.vllm_args import (
    FIND,
    Memory,
    Served,
    VllmSettings,
    again,
    cache_folder,
    complaint_about,
    gpu_memory,
    list_options,
    records_every_step,
    vllm_command,
    vllm_environment,
)
from art_mcp.sampling.vllm_http import Connections

Made = TypeVar("Made")

POLL_SECONDS = 0.25
"""Between two looks at whether a server that starts answers."""
MOMENT_SECONDS = 0.25
"""For a process to end, whose connections broke."""
PATIENCE_SECONDS = 2.0
"""How long a start may take before it is told."""
START_SECONDS = 1200.0
END_SECONDS = 10.0
REFUSED = 2
"""The exit code of Python's argument parsers."""
TAIL_BYTES = 20_000
LONGEST_REASON = 400
"""Characters."""
PREFIX = re.compile(r"^(\(.*? pid=\d+\) )?((INFO|WARNING|ERROR|DEBUG) [\d:. -]+\[[^\]]+\] )?")
"""What vLLM puts before each line of its log."""


def say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def started(work: Coroutine[Any, Any, Made]) -> asyncio.Task[Made]:
    """A task whose failure belongs to those who wait for it: where nobody does, nobody needs it."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda task: task.cancelled() or task.exception())
    return task


async def in_thread(make: Callable[[], Made]) -> Made:
    """What `make` makes in a thread. A cancellation waits for its end, so that what was made can be ended too."""
    making = asyncio.ensure_future(asyncio.to_thread(make))
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        with anyio.CancelScope(shield=True):
            await asyncio.wait([making])
        raise


class VllmServer:
    """`python -m vllm.entrypoints.openai.api_server` on loopback, under a key of its own, ended with this process however
    that ends. It may be started again after its end; the port stays."""

    def __init__(self, settings: VllmSettings, *, tell: Callable[[str], None] = say) -> None:
        self._settings, self._tell = settings, tell
        self._key = secrets.token_urlsafe(24)
        self._reserved = reserve_port()
        self.connections = Connections(self._reserved.getsockname()[1], self._key)
        self._process: subprocess.Popen[bytes] | None = None
        self.command: list[str] = []
        self.gpu = False
        self._memory: Memory | None = None
        self.log = new_log()

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def base_url(self) -> str:
        """Where clients of OpenAI's API find it."""
        return f"http://127.0.0.1:{self.connections.port}/v1"

    @property
    def key(self) -> str:
        return self._key

    async def start(self, served: Served) -> None:
        """Returns when it has answered a request for a token. Raises EngineError with its last words when it ends before, and
        ConfigError when it refuses an argument of the user's."""
        began = monotonic()
        told = False
        async with AsyncExitStack() as unfinished:
            unfinished.push_async_callback(self.end)
            await in_thread(partial(self._launch, served))
            with anyio.move_on_after(START_SECONDS) as limit:
                while not await self._answers(served.name):
                    if not self.alive:
                        raise await asyncio.to_thread(self._why_not)
                    if not told and monotonic() - began > PATIENCE_SECONDS:
                        told = True
                        self._tell(f"vLLM is starting, which takes a minute or two (its log: {self.log})")
                    await anyio.sleep(POLL_SECONDS)
            if limit.cancelled_caught:
                raise EngineError(f"vLLM did not answer within {START_SECONDS:.0f} s: {self.last_words()}")
            unfinished.pop_all()
        if told:
            self._tell(f"vLLM answers after {monotonic() - began:.0f} s")

    async def healthy(self) -> bool:
        """Whether the process lives and its engine does."""
        if not self.alive:
            return False
        with anyio.move_on_after(5.0):
            try:
                return (await self.connections.get("/health"))[0] == 200
            except OSError:
                return False
        return False

    async def ask(self, path: str, values: Mapping[str, Any]) -> tuple[int, bytes]:
        """Status and body of a request. Raises EngineError with the server's last words when the connection breaks."""
        try:
            return await self.connections.post(path, values)
        except OSError as error:
            if self.alive:
                # it refuses connections or dropped this one: the process may need a moment to end
                await anyio.sleep(MOMENT_SECONDS)
            raise EngineError(f"vLLM {self.ending()}: {self.last_words()}") from error

    async def end(self) -> None:
        """SIGTERM, patience, SIGKILL, even when the caller is being cancelled."""
        self.connections.close()
        process = self._process
        if process is None:
            return
        with anyio.CancelScope(shield=True):
            process.terminate()
            try:
                await asyncio.to_thread(process.wait, END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                await asyncio.to_thread(process.wait)

    async def close(self) -> None:
        """Ends it for good; its log is removed."""
        await self.end()
        self._reserved.close()
        self.log.unlink(missing_ok=True)

    def ending(self) -> str:
        """How it ended, as the predicate of a sentence."""
        code = None if self._process is None else self._process.poll()
        if code is None:
            return "does not answer"
        return f"ended with exit code {code}" if code >= 0 else f"was killed by {signal_name(-code)}"

    def last_words(self) -> str:
        """The errors among the last lines of its log, or the last lines where there are none; and where the log is."""
        if not self.log.exists():
            return "it was closed"
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - TAIL_BYTES))
            lines = [PREFIX.sub("", line) for line in log.read().decode(errors="replace").splitlines()]
        said = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
        return f"{' | '.join(errors_among(lines)[-3:] or said[-3:]) or 'it said nothing'} (its log: {self.log})"

    def _launch(self, served: Served) -> None:
        cache = cache_folder()
        with boundary(EngineError, f"making vLLM's cache folder {cache}"):
            cache.mkdir(parents=True, exist_ok=True)
        memory = gpu_memory()
        self.gpu = memory is not None
        if memory is not None:
            memory = again(self._memory, memory, self._settings) if self._memory is not None else memory
            self._memory = self._memory or memory
        known = list_options(self._settings, FIND)
        self.command = vllm_command(served, self._settings, port=self.connections.port, memory=memory, known=known)
        environment = vllm_environment(
            key=self._key,
            cache=cache,
            full_weights=served.lora_rank is None,
            gpu=self.gpu,
            every_step=records_every_step(served, self._settings, gpu=self.gpu, known=known),
        )
        command, args = launch_command(self.command[0], self.command[1:])
        with self.log.open("wb") as log:
            # in a session of its own: Ctrl-C reaches us alone, and the server lives until the last checkpoint is written
            self._process = subprocess.Popen(
                [command, *args], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    async def _answers(self, name: str) -> bool:
        """Whether a token can be had: the first one may take long, since kernels are made for it."""
        try:
            if (await self.connections.get("/health"))[0] != 200:
                return False
            status, answer = await self.connections.post("/v1/completions", {"model": name, "prompt": [0], "max_tokens": 1})
        except OSError:
            return False
        if 400 <= status < 500:
            raise EngineError(f"vLLM refuses to sample: {answer[:500].decode(errors='replace')}")
        return status == 200

    def _why_not(self) -> Exception:
        """The error for a server that ended before it answered."""
        assert self._process is not None
        words = self.last_words()
        refusals = re.findall(r"error: ((?:unrecognized arguments|argument|ambiguous option)[^\n|]*)", words)
        if self._process.returncode == REFUSED and refusals and self._settings.args:
            return ConfigError(complaint_about(self._settings.args, refusals[-1].split(" (its log")[0], self._settings))
        return EngineError(f"vLLM {self.ending()} before it answered: {words}")


def reserve_port() -> socket.socket:
    """A socket that holds a free port of loopback while vLLM, which shares ports as this one does, listens there: nobody else
    gets it between our asking and its listening, which is half a minute later."""
    reserved = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


def errors_among(lines: Sequence[str]) -> list[str]:
    """The errors that a log names, each once, with the indented line after it if there is one: after pydantic's "1 validation
    error for ModelConfig" that line says what is wrong."""
    found: list[str] = []
    for line, after in pairwise([*lines, ""]):
        if re.match(r"[\w.]*(Error|Exception|error)\b", line.strip()):
            told = after.startswith("  ") and not after.strip().startswith("File ")
            found.append(f"{line.strip()}: {after.strip()[:LONGEST_REASON]}" if told else line.strip())
    return list(dict.fromkeys(found))


def new_log() -> Path:
    with tempfile.NamedTemporaryFile(prefix="art-mcp-vllm-", suffix=".log", delete=False) as log:
        return Path(log.name)
