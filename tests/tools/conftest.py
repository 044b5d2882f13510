"""The odd server on each transport, as fixtures."""

import pytest
from odd import odd_in_process, odd_stdio, odd_url

from art_mcp.types import ServerSpec


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="session")
def sse():
    with odd_url("sse") as spec:
        yield spec


@pytest.fixture(scope="session")
def http():
    with odd_url("streamable-http") as spec:
        yield spec


@pytest.fixture(params=["stdio", "sse", "streamable-http", "in-process"])
def odd(request) -> ServerSpec:
    """The odd server over each transport in turn."""
    match request.param:
        case "stdio":
            return odd_stdio()
        case "sse":
            return request.getfixturevalue("sse")
        case "streamable-http":
            return request.getfixturevalue("http")
        case _:
            return odd_in_process()
