"""Keep-alive connections: used again, closed for the requests that are given up, and errors where a server goes away."""

import asyncio
import json
from contextlib import asynccontextmanager

import anyio
import pytest

from art_mcp.sampling.vllm_http import Connections

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def served(answer):
    """A server on a free port; `answer(reader, writer)` has each of its connections, which are counted."""
    connections = []

    async def serve(reader, writer):
        connections.append(writer)
        try:
            await answer(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = Connections(server.sockets[0].getsockname()[1], "key")
    yield client, connections
    client.close()
    server.close()


async def read_request(reader):
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    length = next(int(line.partition(":")[2]) for line in lines if line.startswith("content-length"))
    return lines, await reader.readexactly(length)


async def echo(reader, writer):
    """Answers every request with what was asked."""
    while not reader.at_eof():
        try:
            lines, body = await read_request(reader)
        except asyncio.IncompleteReadError:
            return
        asked = json.loads(body) if body else None
        answer = json.dumps({"line": lines[0], "key": "authorization: bearer key" in lines, "body": asked}).encode()
        head = f"HTTP/1.1 200 OK\r\nServer: x\r\nContent-Length: {len(answer)}\r\nContent-Type: application/json\r\n\r\n"
        writer.write(head.encode() + answer)


async def test_requests_carry_the_key_and_one_connection_serves_many():
    async with served(echo) as (client, connections):
        for number in range(3):
            status, answer = await client.post("/v1/x", {"n": number})
            assert status == 200
            assert json.loads(answer) == {"line": "post /v1/x http/1.1", "key": True, "body": {"n": number}}
        assert json.loads((await client.get("/y"))[1])["line"] == "get /y http/1.1"
        assert len(connections) == 1


async def test_requests_in_flight_have_a_connection_each():
    async with served(echo) as (client, connections):
        answers = await asyncio.gather(*(client.post("/", {"n": number}) for number in range(20)))
        assert [json.loads(answer)["body"]["n"] for _, answer in answers] == list(range(20))
        assert 1 < len(connections) <= 20
        await asyncio.gather(*(client.get("/") for _ in range(20)))
        assert len(connections) <= 20


async def test_a_request_that_is_given_up_closes_its_connection():
    closed = asyncio.Event()

    async def wait(reader, writer):
        await read_request(reader)
        assert await reader.read() == b""
        closed.set()

    async with served(wait) as (client, _):
        task = asyncio.create_task(client.post("/", {}))
        await asyncio.sleep(0)
        await until(lambda: client_connected(task))
        task.cancel()
        await asyncio.wait_for(closed.wait(), 60)


async def until(happened):
    """Returns when `happened()` is true."""
    with anyio.fail_after(60):
        while True:
            if happened():
                return
            await anyio.sleep(0.01)


def client_connected(task):
    """Whether the request has got as far as waiting for its answer."""
    return any("read_answer" in str(frame) for frame in stack(task.get_coro()))


def stack(awaited):
    while awaited is not None:
        yield awaited
        awaited = getattr(awaited, "cr_await", None)


async def test_an_idle_connection_that_the_server_closed_is_not_used_again():
    async def once(reader, writer):
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        await writer.drain()

    async with served(once) as (client, connections):
        await client.get("/")
        await until(client._idle[0][0].at_eof)
        assert await client.get("/") == (200, b"{}")
        assert len(connections) == 2


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\nconte", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}"])
async def test_an_answer_that_is_cut_short_is_an_error(said):
    async def cut(reader, writer):
        await read_request(reader)
        writer.write(said)
        await writer.drain()

    async with served(cut) as (client, _):
        with pytest.raises(ConnectionError, match="ended before the answer did"):
            await client.get("/")


async def test_an_answer_without_its_length_is_an_error():
    async def chunked(reader, writer):
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        await writer.drain()

    async with served(chunked) as (client, _):
        with pytest.raises(ConnectionError, match="without its length"):
            await client.get("/")


async def test_a_server_that_is_not_there_is_an_error():
    async with served(echo) as (client, _):
        pass
    with pytest.raises(OSError, match="Connect call failed"):
        await client.get("/")
