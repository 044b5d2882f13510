"""What a client is told instead of an answer, in OpenAI's error shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from art_mcp.errors import ArtMcpError

UNREAD = frozenset({401, 403, 413, 421})
"""Statuses of requests whose bodies are not read to their ends."""


class Refusal(ArtMcpError):
    """A request that gets an error: its HTTP status, what to do in words, and the field it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    def response(self) -> JSONResponse:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error: dict[str, Any] = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        # a body that nobody reads to its end would keep the connection, and perhaps its sender, for ever
        closing = {"Connection": "close"} if self.status in UNREAD else {}
        return JSONResponse({"error": error}, self.status, {**closing, **self.headers})
