"""HTTP to tool servers: idle connections are left before servers close them, and a request that fails, fails alone."""

from __future__ import annotations

from typing import Any

import httpx2
from mcp.types import CONNECTION_CLOSED

from art_mcp.errors import describe

IDLE_SECONDS = 1.0
"""How long an idle connection is used again. Servers close theirs after 5 s (uvicorn, node) or 2 s (gunicorn), and a request
that crosses such a close is lost: nobody can tell whether it was executed. The clients' usual 5 s meet uvicorn's head on."""


def sse_http_client(
    headers: dict[str, str] | None = None, timeout: httpx2.Timeout | None = None, auth: httpx2.Auth | None = None
) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(headers=headers, timeout=timeout, auth=auth, limits=limits())


def limits() -> httpx2.Limits:
    return httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=IDLE_SECONDS)


class PostClient(httpx2.AsyncClient):
    """For streamable HTTP, where one request that breaks would end the SDK's session and every other call in it.

    Once the server has answered anything, a request that gets no answer is answered here, with a JSON-RPC error of code
    CONNECTION_CLOSED, which the SDK hands to the one call that it concerns. Before, it raises: there is no session yet.
    """

    def __init__(self, headers: dict[str, str], timeout: httpx2.Timeout) -> None:
        super().__init__(headers=headers, timeout=timeout, limits=limits())
        self.answered = False

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        try:
            response = await super().send(request, **options)
            if response.headers.get("content-type", "").startswith("application/json"):
                await response.aread()  # the SDK reads it anyway, where nobody would catch that it breaks off
        except httpx2.RequestError as error:
            if not self.answered:
                raise
            failure = {"code": CONNECTION_CLOSED, "message": describe(error)}
            return httpx2.Response(502, json={"jsonrpc": "2.0", "id": None, "error": failure}, request=request)
        self.answered = True
        return response
