"""One open session with one tool server, over any transport; what its tools are and how they are called is not here."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, TypeAlias

import anyio
from mcp import Client
from pydantic import ValidationError

from art_mcp.core.complaints import clip
from art_mcp.errors import describe
from art_mcp.tools.endpoint import FAILURES, Endpoint, Log, open_log
from art_mcp.tools.inprocess import ServerObject
from art_mcp.types import ServerSpec

Era: TypeAlias = Literal["auto", "legacy"]
"""auto: protocol 2026-07-28, or the 2025-11-25 handshake where the server does not know it; legacy: the handshake at once."""

CLOSE_SECONDS = 10.0
SDK_LOG = logging.getLogger("mcp")
STDIO_LOG = "mcp.client.stdio"


@dataclass(frozen=True, slots=True)
class Connection:
    """An open session: `client` speaks, `endpoint` says who the server is and words what goes wrong with it."""

    endpoint: Endpoint
    client: Client


LOG: ContextVar[Log | None] = ContextVar("LOG", default=None)
"""Whose server the SDK is at work for: its own tasks inherit it, and so does what a call starts in a server of this process."""


class Crashes(logging.Handler):
    """Notes in a server's log what the SDK alone is told: what its tools raise, where they are in this process, and what it
    printed among its messages."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.ERROR)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and LOG.get() is self._log:
            with suppress(OSError):  # a full disk takes no notes, which is no fault of the tool
                self._log.note(in_words(error.__cause__ or error, record.name))


def in_words(error: BaseException, logger: str) -> str:
    if logger == STDIO_LOG and isinstance(error, ValidationError):
        printed = str(error.errors(include_url=False)[0]["input"])
        return f"printed to stdout, where nothing but MCP messages belongs: {clip(printed)!r}"
    return f"{type(error).__name__}: {describe(error)}"


@contextmanager
def working_for(log: Log) -> Generator[None]:
    token = LOG.set(log)
    try:
        yield
    finally:
        LOG.reset(token)


@contextmanager
def crashes_noted(log: Log) -> Generator[None]:
    handler = Crashes(log)
    SDK_LOG.addHandler(handler)
    try:
        with working_for(log):
            yield
    finally:
        SDK_LOG.removeHandler(handler)


@asynccontextmanager
async def connect(
    server: ServerSpec | ServerObject, *, mode: Era = "auto", connect_timeout: float = 30.0, call_timeout: float = 60.0
) -> AsyncGenerator[Connection]:
    """A session with a server, which this block starts (stdio, in-process) and ends. Enter and leave it in the same task.

    Timeouts are in seconds; an "auto" connection gives up its first probe after 10 s and then shakes hands. Over stdio the
    server gets the SDK's few environment variables and the entry's own `env`, no more, and its stderr is kept for error
    messages. Limits of SSE alone: a result over 1 MiB (about 0.5 MB of text, which is sent twice) or arguments over 4 MiB end
    the session. In-process, a plain function runs in a thread, which no timeout can interrupt.

    Raises ConfigError when the spec cannot be resolved, ToolServerError when the server does not start, is not reached, does
    not answer in time, or when the connection breaks by itself. What the block raises leaves it unchanged, in no group.
    """
    failure: BaseException | None = None
    raised: BaseException | None = None
    client: Client | None = None
    if not SDK_LOG.handlers:  # else Python prints to stderr what the SDK logs of failures, which are raised here anyway
        SDK_LOG.addHandler(logging.NullHandler())
    with open_log() as log, crashes_noted(log):
        endpoint = Endpoint.of(server, log)
        try:
            with anyio.CancelScope(deadline=anyio.current_time() + connect_timeout) as scope:
                async with Client(endpoint.open(), mode=mode, read_timeout_seconds=call_timeout, cache=None) as client:
                    scope.deadline = math.inf
                    try:
                        yield Connection(endpoint, client)
                    except BaseException as error:
                        raised = error
                        raise
                    finally:
                        scope.deadline = anyio.current_time() + CLOSE_SECONDS
        except (BaseExceptionGroup, RuntimeError, *FAILURES) as error:
            failure = endpoint.explain(error, raised, connected=client is not None)
        failure = failure or raised
        if failure is None and client is None:
            failure = endpoint.failure(f"did not answer within {connect_timeout:g} s")
    if failure is not None:
        raise failure from failure.__cause__  # and not from the group that it was in
