"""The little HTTP that a busy client of one server on this machine needs; what is asked and answered is not its business.

A general client costs about 1 ms of CPU a request here, this one a fifteenth: with hundreds of short turns a second that
is the difference between a full engine and a full core of ours.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from typing import Any

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


class Connections:
    """Keep-alive connections (HTTP/1.1, RFC 9112) to 127.0.0.1:`port`, as many as there are requests in flight.

    Only answers that give their length are understood, which is what uvicorn sends for JSON.
    """

    def __init__(self, port: int, key: str) -> None:
        self.port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._common = f"Host: 127.0.0.1:{port}\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n".encode()

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body. Raises OSError when the connection fails or ends before the answer does."""
        return await self._request(b"GET", path, b"")

    async def post(self, path: str, values: Mapping[str, Any]) -> tuple[int, bytes]:
        """As `get`, sending `values` as JSON. The connection is closed when the caller is cancelled, which tells the server."""
        return await self._request(b"POST", path, json.dumps(values, separators=(",", ":")).encode())

    def close(self) -> None:
        """Closes what is idle; requests in flight keep theirs."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()

    async def _request(self, method: bytes, path: str, body: bytes) -> tuple[int, bytes]:
        head = b"%b %b HTTP/1.1\r\n%bContent-Length: %d\r\n\r\n" % (method, path.encode(), self._common, len(body))
        reader, writer = await self._connect()
        answered = False
        try:
            writer.write(head + body)
            status, answer = await read_answer(reader)
            answered = True
        except asyncio.IncompleteReadError as error:
            raise ConnectionResetError("the connection ended before the answer did") from error
        finally:
            if answered:
                self._idle.append((reader, writer))
            else:
                writer.close()
        return status, answer

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof() and not writer.is_closing():
                return reader, writer
            writer.close()
        return await asyncio.open_connection("127.0.0.1", self.port)


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = LENGTH.search(head)
    if length is None:
        raise ConnectionError(f"an answer without its length: {head[:80]!r}")
    return int(head.split(b" ", 2)[1]), await reader.readexactly(int(length[1]))
