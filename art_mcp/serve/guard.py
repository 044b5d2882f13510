"""Who may ask: the host and origin that a request names, the token that it brings. What is asked is not looked at."""

from __future__ import annotations

import re
from collections.abc import Collection
from ipaddress import IPv6Address
from secrets import compare_digest
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from art_mcp.errors import ConfigError
from art_mcp.serve.refusal import Refusal

NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", re.IGNORECASE)
TOKEN = re.compile(r"[!-~]+")
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class Guard:
    """Lets through what names one of `hosts` (and comes from a page of one of them, if from a page at all: a browser on this
    machine may be led to us under a foreign name) and brings the token."""

    def __init__(self, app: ASGIApp, *, token: str, hosts: Collection[str]) -> None:
        self._app, self._token = app, f"bearer {token}".encode()
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(Headers(scope=scope))
        except Refusal as refusal:
            await refusal.response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _check(self, headers: Headers) -> None:
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or host_of(f"//{hosts[0]}") not in self._hosts:
            raise Refusal(421, f"this endpoint is not {', '.join(hosts) or 'without a Host header'}", code="foreign_host")
        if any(host_of(origin) not in self._hosts for origin in origins):
            raise Refusal(403, f"pages of {', '.join(origins)} may not ask here", code="foreign_origin")
        kind, _, token = headers.get("authorization", "").partition(" ")
        given = f"{kind.lower()} {token.strip()}".encode("latin-1")  # as it came
        if not compare_digest(given, self._token):
            asks = {"WWW-Authenticate": "Bearer"}
            raise Refusal(401, "the API key is missing or wrong", code="invalid_api_key", headers=asks)


def check_host(name: str) -> str:
    """A name by which clients may call, as a Host header is compared with it. Raises ConfigError for what is none."""
    bare = name.removeprefix("[").removesuffix("]")
    if NAME.fullmatch(name) or is_ipv6(bare):
        return bare
    try:
        host = urlsplit(name.strip() if "//" in name else f"//{name.strip()}").hostname or ""
    except ValueError:
        host = ""
    advice = f": write {host}" if NAME.fullmatch(host) else ""
    raise ConfigError(f"{name!r} is no plain host name, such as box.example, without scheme, port and path{advice}")


def check_token(token: str) -> str:
    """The API key. Raises ConfigError for one that cannot stand in a header as it is."""
    if not TOKEN.fullmatch(token):
        raise ConfigError("an API key is of printable ASCII characters without spaces, because it is sent in a header")
    return token


def is_ipv6(name: str) -> bool:
    try:
        return IPv6Address(name).scope_id is None
    except ValueError:
        return False


def host_of(address: str) -> str | None:
    """The host's name in `scheme://host:port` or `//host:port`; None where it is nothing of the kind."""
    try:
        parts = urlsplit(address)
        _ = parts.port  # raises where it is no number
        plain = not (parts.path or parts.query or parts.fragment or parts.username is not None)
        return parts.hostname if plain else None
    except ValueError:
        return None
