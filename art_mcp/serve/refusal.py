"""What a client is told instead of an answer, in OpenAI's error shape."""

from __future__ import annotations

from typing import Any

from art_mcp.errors import ArtMcpError


class Refusal(ArtMcpError):
    """A request that gets an error: its HTTP status, what to do in words, and the field it is about."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
