"""An endpoint's life: a socket, a server on it in the running event loop, and its end."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from secrets import token_urlsafe
from types import TracebackType

import uvicorn

from art_mcp.errors import ConfigError, describe
from art_mcp.serve.app import Desk
from art_mcp.serve.guard import LOOPBACK, check_host, check_token
from art_mcp.serve.turn import Voice

KEEP_ALIVE_SECONDS = 75
BACKLOG = 512
GRACE_SECONDS = 5
"""How long a client may take to read what is being sent, when the endpoint ends."""


class Server(uvicorn.Server):
    """uvicorn's, without its claim to the process's signals."""

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


class Endpoint:
    """Listens from when it is made, inside a running event loop, until `close()`. `port` 0 is any free one.

    Raises ConfigError where the port is in use, and for a host beyond loopback without `hosts`, the names by which clients may
    call it: without them any web page could, in a browser on a machine that reaches it. `loading`: as the desk's.
    """

    def __init__(
        self,
        voices: Mapping[str, Voice],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        hosts: Sequence[str] = (),
        loading: bool = False,
    ) -> None:
        if host not in LOOPBACK and not hosts:
            raise ConfigError(f"host {host!r} is not loopback: name the hosts that clients may call it by")
        hosts = [check_host(name) for name in hosts]
        self._loop = running_loop()
        self.token = check_token(token) if token else token_urlsafe(24)
        self.desk = Desk(voices, loading=loading)
        self._socket = open_socket(host, port)
        self.port: int = self._socket.getsockname()[1]
        shown = host if host in LOOPBACK else hosts[0]
        shown = f"[{shown}]" if ":" in shown else shown
        self.base_url = f"http://{shown}:{self.port}/v1"
        app = self.desk.app(token=self.token, hosts={*LOOPBACK, *hosts})
        self._server = Server(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=GRACE_SECONDS,
            )
        )
        self._task = self._loop.create_task(self._server.serve([self._socket]))
        self._task.add_done_callback(lambda _: self._socket.close())

    @property
    def alive(self) -> bool:
        """Whether it serves in the event loop that runs now."""
        return self._loop is running_loop() and not self._task.done()

    @property
    def over(self) -> bool:
        """Whether it serves in no event loop any more."""
        return self._task.done() or self._loop.is_closed()

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def ended(self) -> None:
        """Returns when it no longer serves."""
        await asyncio.wait([self._task])

    async def close(self) -> None:
        """Refuses what is being sampled, sends what is being sent, and frees the port; from another event loop too, while its
        own one runs in another thread."""
        self._server.should_exit = True
        if self.alive:
            await self._end()
        elif self._loop is not running_loop() and self._loop.is_running():
            elsewhere = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._end(), self._loop))
            await asyncio.wait([elsewhere], timeout=2 * GRACE_SECONDS)  # that loop may stop meanwhile
        # else its loop has ended and taken it along, or it has ended already

    async def _end(self) -> None:
        self.desk.close()
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.result()


def running_loop() -> asyncio.AbstractEventLoop:
    try:
        return asyncio.get_running_loop()
    except RuntimeError as error:
        raise ConfigError("an endpoint is opened inside a running event loop, in which it then serves") from error


def open_socket(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} on {host} is in use: choose another, or 0 for any free one") from error
        raise ConfigError(f"cannot listen on {host}, port {port}: {describe(error)}") from error
