"""Where one server is: its transport, what it wrote to stderr, and how its failures are worded. Sessions are not here."""

from __future__ import annotations

import fcntl
import math
import os
import re
import shutil
import tempfile
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

import anyio
import httpx2
from mcp import MCPError, StdioServerParameters, stdio_client
from mcp.client.sse import sse_client
from mcp.client.streamable_http import streamable_http_client
from mcp.types import CONNECTION_CLOSED, INTERNAL_ERROR, METHOD_NOT_FOUND

from art_mcp.child import TOLD, launch_command, signal_name
from art_mcp.core.address import without_login
from art_mcp.errors import ArtMcpError, ToolServerError, boundary, describe, sole_cause
from art_mcp.tools.config import resolve
from art_mcp.tools.http_client import PostClient, sse_http_client
from art_mcp.tools.inprocess import ServerObject, load_server
from art_mcp.tools.results import whole
from art_mcp.types import ServerSpec

if TYPE_CHECKING:
    from mcp.client import Transport
    from mcp.client._transport import TransportStreams

FAILURES = (
    MCPError,
    OSError,
    ValueError,
    httpx2.HTTPError,
    httpx2.InvalidURL,
    anyio.ClosedResourceError,
    anyio.BrokenResourceError,
    anyio.EndOfStream,
)
"""What the SDK and its HTTP client raise when the other side, or its address, is the problem."""

HTTP_SECONDS = 30.0
STATUS_SECONDS = 1.0
LAST_LINES = 3
BOX = " \t\r│╭╮╰╯─❱"
LOG_BYTES, TAIL_BYTES = 1 << 20, 1 << 14
ERROR = re.compile(r"(?:Uncaught )?[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Timeout|Exit)\b: \S")
WRAPPED = "UnexpectedToolError"
"""How the SDK names what a tool raised, which it keeps from the client."""
SHORTEST_SECRET = 4


@dataclass(frozen=True, slots=True)
class Log:
    """A stdio server's stderr, in a file without a name: a pipe would have to be emptied all the time."""

    file: TextIO

    def last_lines(self) -> str:
        """The last few lines with a word in them, as one. Lines that only underline others say nothing, and of those that a
        traceback draws in a box, its error says it."""
        told: list[str] = []
        for line in self.tail(0, self.size()).split("\n"):
            plain = line.strip(BOX)
            if re.search(r"\w", plain) and not line.startswith(TOLD) and (plain == line.strip() or ERROR.match(plain)):
                told.append(plain)
        return " / ".join(told[-LAST_LINES:])

    def status(self) -> int | None:
        """How the server's process ended, as its launcher tells it: an exit code, or the number of a signal, negative. Notes of
        what the server printed may follow."""
        told = [line for line in self.tail(0, self.size()).split("\n") if line.startswith(TOLD)]
        return os.waitstatus_to_exitcode(int(told[-1].removeprefix(TOLD))) if told else None

    async def status_told(self) -> None:
        """Waits until the launcher has told how the server ended, which follows the end of its streams; not for long, because
        one that only closed them goes on."""
        with anyio.move_on_after(STATUS_SECONDS):
            while self.status() is None:  # noqa: ASYNC110 (what is awaited is a line in a file)
                await anyio.sleep(STATUS_SECONDS / 100)

    def size(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    def error_within(self, first: int, last: int) -> str:
        """What went wrong, as far as a line between these two sizes of the log says it as Python does (and others do), on one
        line; "" else. What the SDK makes of it, which says less, does not count."""
        lines = [line.strip() for line in self.tail(first, last).splitlines()]
        starts = [place for place, line in enumerate(lines) if ERROR.match(line) and WRAPPED not in line.partition(":")[0]]
        if not starts:
            return ""
        # where a log is wrapped to a width, a message goes on until a blank line
        told = [line.rstrip() for line in takewhile(bool, lines[starts[-1] :][:LAST_LINES])]
        return " ".join(takewhile(lambda line: not line.startswith(("at ", "Traceback ")), told))

    def tail(self, first: int, last: int) -> str:
        """What was written between these two sizes, at most the end of it."""
        first = max(first, last - TAIL_BYTES)
        return os.pread(self.file.fileno(), max(0, last - first), first).decode(errors="replace")

    def note(self, line: str) -> None:
        self.file.write(f"{line}\n\n")
        self.file.flush()

    def trim(self) -> None:
        """Empties a long log."""
        if self.size() > LOG_BYTES:
            os.ftruncate(self.file.fileno(), 0)


@contextmanager
def open_log() -> Generator[Log]:
    """Raises ToolServerError where no file can be made, such as on a full disk."""
    with ExitStack() as stack:
        with boundary(ToolServerError, "no file can be made for what a server writes to stderr"):
            file = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))
        # The server shares our position in the file; appending, it goes on at the new end after a trim.
        fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_APPEND)
        yield Log(cast("TextIO", file))


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server: `spec` as it was given, references and all, for messages; `resolved` and `secrets` for nobody's eyes."""

    spec: ServerSpec
    log: Log = field(repr=False)
    resolved: ServerSpec = field(repr=False)
    secrets: frozenset[str] = field(repr=False)
    server: ServerObject | None = None

    @classmethod
    def of(cls, server: ServerSpec | ServerObject, log: Log) -> Endpoint:
        """Raises ConfigError when a reference in the spec cannot be resolved."""
        if isinstance(server, ServerSpec):
            return cls(server, log, *resolve(server))
        spec = ServerSpec(server.name, "in-process")
        return cls(spec, log, spec, frozenset(), server)

    def open(self) -> Transport | ServerObject:
        """What `mcp.Client` connects to. Raises ToolServerError when the command to start cannot be found."""
        spec = self.resolved
        match spec.transport:
            case "stdio":
                self.find_command()
                command, args = launch_command(spec.command, spec.args, tell=True)
                started = StdioServerParameters(command=command, args=args, env=dict(spec.env), cwd=spec.cwd)
                return stdio_client(started, errlog=self.log.file)
            case "sse":
                return sse_client(
                    spec.url, dict(spec.headers), HTTP_SECONDS, sse_read_timeout=math.inf, httpx_client_factory=sse_http_client
                )
            case "streamable-http":
                return http_transport(spec.url, spec.headers)
            case "in-process":
                return self.server or load_server(spec.target)

    def find_command(self) -> None:
        """The launcher would report a missing command too, but only after a process has been started."""
        spec = self.resolved
        place = spec.cwd or Path.cwd()
        if not place.is_dir():
            raise self.failure(f"cannot start: its working folder {spec.cwd} does not exist")
        command = str(place / spec.command) if os.sep in spec.command else spec.command
        if shutil.which(command, path=spec.env.get("PATH")) is None:
            remedy = "install it, or put its path into the config"
            if " " in self.spec.command.strip():
                remedy = 'what follows the program\'s name belongs into "args", a list'
            raise self.failure(f"cannot start: no command {self.spec.command!r}; {remedy}")

    def failure(self, what: str) -> ToolServerError:
        """A ToolServerError that names the server, without its secrets."""
        return ToolServerError(f"server {self.spec.name!r} {self.masked(whole(what))}")

    def error_within(self, first: int, last: int) -> str:
        """As the log has it, without secrets."""
        return self.masked(whole(self.log.error_within(first, last)))

    def masked(self, text: str) -> str:
        for secret in sorted(self.secrets, key=len, reverse=True):
            if len(secret) >= SHORTEST_SECRET:
                text = text.replace(secret, "***")
        return text

    def explain(self, error: BaseException, raised: BaseException | None, *, connected: bool) -> BaseException:
        """What to raise for an error that came out of a session: what its block `raised`, if that is in it; a ToolServerError
        for what the other side does; a bug as it is. Never a group of one."""
        causes = list(leaves(error))
        for cause in causes:
            if cause is raised or isinstance(cause, ArtMcpError):
                return cause
        kinds = FAILURES if connected else (*FAILURES, RuntimeError)  # RuntimeError: no protocol version in common
        if not all(isinstance(cause, kinds) for cause in causes):
            return sole_cause(error)
        failure = self.lost(causes[0]) if connected else self.unreached(causes[0])
        if not any(self.masked(text) != text for text in map(str, causes)):  # an HTTP error quotes its whole url
            failure.__cause__ = error
        return failure

    def lost(self, error: BaseException) -> ToolServerError:
        """The connection broke while it was open."""
        if self.spec.transport == "stdio":
            return self.failure(f"{self.ending()}: {self.last_words()}")
        limit = " (a result over 1 MiB does that too, over SSE)" if self.spec.transport == "sse" else ""
        return self.failure(f"is lost{at(self.spec.url)}: {describe(error)}{limit}")

    def ending(self) -> str:
        """How a stdio server ended, as far as that is known."""
        status = self.log.status()
        if status is None:
            return "closed its streams"
        return f"ended with exit code {status}" if status >= 0 else f"was ended by {signal_name(-status)}"

    def last_words(self) -> str:
        return self.log.last_lines() or "it wrote nothing to stderr"

    def unreached(self, error: BaseException) -> ToolServerError:
        """The connection did not come about."""
        if self.spec.transport == "stdio" and isinstance(error, MCPError) and error.code == CONNECTION_CLOSED:
            return self.failure(f"{self.ending()} before it was ready: {self.last_words()}")
        if isinstance(error, httpx2.ConnectError):
            return self.failure(f"is not there: nothing listens{at(self.spec.url)}; start it, or correct its url")
        status = http_status(error)
        if status and self.spec.url:
            return self.failure(f"answered {status}{at(self.spec.url)}: {URL_HINTS[self.spec.transport]}")
        return self.failure(f"cannot be reached{at(self.spec.url)}: {describe(error)}")


URL_HINTS = {
    "sse": 'its type is "sse", for which the path is usually /sse; for /mcp the type is "streamable-http"',
    "streamable-http": 'its type is "streamable-http", for which the path is usually /mcp; for /sse the type is "sse"',
}


def at(url: str) -> str:
    """The address without what may be secret in it: user and query."""
    return f" at {without_login(url).partition('?')[0]}" if url else ""


def http_status(error: BaseException) -> str:
    """An HTTP status that refused a session, also where the SDK has made an MCPError of it; "" if there is none."""
    if isinstance(error, httpx2.HTTPStatusError):
        return f"{error.response.status_code} {error.response.reason_phrase}"
    if isinstance(error, MCPError) and (error.code, error.message) == (METHOD_NOT_FOUND, "Not Found"):
        return "404 Not Found"
    if isinstance(error, MCPError) and (error.code, error.message) == (INTERNAL_ERROR, "Server returned an error response"):
        return "with an HTTP error"
    return ""


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The exceptions in nested groups."""
    if isinstance(error, BaseExceptionGroup):
        for member in cast("BaseExceptionGroup[BaseException]", error).exceptions:
            yield from leaves(member)
    else:
        yield error


@asynccontextmanager
async def http_transport(url: str, headers: Mapping[str, str]) -> AsyncGenerator[TransportStreams]:
    """Streamable HTTP without the SDK's limits: any size of event, any number of calls at once, any wait for a result (the
    session's own timeout ends it)."""
    async with (
        PostClient(dict(headers), httpx2.Timeout(HTTP_SECONDS, read=None)) as client,
        streamable_http_client(url, http_client=client, max_sse_event_size=None) as streams,
    ):
        yield streams
