"""The calculator server through its real doors: in process, over stdio, over SSE and over streamable HTTP."""

from __future__ import annotations

import http.client
import importlib.util
import json
import math
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest
from mcp import Client, StdioServerParameters
from mcp.client.sse import sse_client
from mcp.types import CallToolResult, Tool

SERVER = Path(__file__).parents[2] / "servers" / "calculator" / "server.py"
NUMBER = {"type": "number"}
PARAMETERS = {
    "add": {"a": NUMBER, "b": NUMBER},
    "subtract": {"a": NUMBER, "b": NUMBER},
    "multiply": {"a": NUMBER, "b": NUMBER},
    "divide": {"a": NUMBER, "b": NUMBER},
    "modulo": {"a": NUMBER, "b": NUMBER},
    "power": {"a": NUMBER, "b": NUMBER},
    "sqrt": {"a": NUMBER},
    "absolute": {"a": NUMBER},
    "round_to": {"a": NUMBER, "decimals": {"type": "integer"}},
    "evaluate": {"expression": {"type": "string"}},
}

spec = importlib.util.spec_from_file_location("calculator_server", SERVER)
assert spec is not None
assert spec.loader is not None
calculator = importlib.util.module_from_spec(spec)  # not in sys.modules: schemas must not depend on it
spec.loader.exec_module(calculator)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def ask(client: Client, tool: str, **arguments: Any) -> CallToolResult:
    result = await client.call_tool(tool, arguments)
    assert isinstance(result, CallToolResult)
    return result


def text_of(result: CallToolResult) -> str:
    [content] = result.content
    assert content.type == "text"
    return content.text


async def check_that_it_serves(client: Client) -> None:
    assert [tool.name for tool in (await client.list_tools()).tools] == list(PARAMETERS)
    added = await ask(client, "add", a=0.1, b=0.2)
    assert (text_of(added), added.structured_content, added.is_error) == ("0.3", {"result": 0.3}, False)
    refused = await ask(client, "divide", a=1, b=0)
    assert (text_of(refused), refused.is_error) == ("Error executing tool divide: division by zero", True)


@pytest.mark.anyio
@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_it_serves_in_process(mode: Literal["auto", "legacy"]):
    async with Client(calculator.server, mode=mode) as client:
        await check_that_it_serves(client)


@pytest.mark.anyio
@pytest.mark.parametrize("mode", ["auto", "legacy"])
@pytest.mark.parametrize(
    ("tool", "arguments", "text", "result"),
    [
        ("add", {"a": 2, "b": 40}, "42", 42),
        ("add", {"a": 10**998, "b": 1}, "1" + "0" * 997 + "1", 10**998 + 1),
        ("subtract", {"a": 1, "b": 0.9}, "0.1", 0.1),
        ("multiply", {"a": 2.5, "b": 2}, "5", 5),
        ("divide", {"a": 10, "b": 4}, "2.5", 2.5),
        ("divide", {"a": 10, "b": 3}, "3.33333333333333", 3.33333333333333),
        ("modulo", {"a": 7, "b": -3}, "-2", -2),
        ("power", {"a": 2, "b": -2}, "0.25", 0.25),
        ("sqrt", {"a": 2.25}, "1.5", 1.5),
        ("absolute", {"a": -3}, "3", 3),
        ("round_to", {"a": 2.675, "decimals": 2}, "2.68", 2.68),
        ("evaluate", {"expression": "2 * (3 + 4) ** 2"}, "98", 98),
    ],
)
async def test_results_are_plain_text_and_a_typed_number(
    tool: str, arguments: dict[str, Any], text: str, result: float, *, mode: Literal["auto", "legacy"]
):
    async with Client(calculator.server, mode=mode) as client:
        answer = await ask(client, tool, **arguments)
    assert not answer.is_error
    assert text_of(answer) == text
    assert answer.structured_content == {"result": result}
    assert type(answer.structured_content["result"]) is type(result)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("tool", "arguments", "part"),
    [
        ("add", {"a": True, "b": 1}, "a must be a number, not true or false"),
        ("add", {"a": 1, "b": "2"}, "b must be a number, not text"),
        ("add", {"a": 1, "b": None}, "b must be a number, not null"),
        ("sqrt", {"a": -4}, "negative number"),
        ("power", {"a": 10, "b": 10**10}, "more than 1000 digits"),
        ("round_to", {"a": 1, "decimals": 0.5}, "decimals must be a whole number"),
        ("evaluate", {"expression": "9**9**9"}, "more than 1000 digits"),
        ("evaluate", {"expression": "("}, "expected a number before the end at position 2"),
        ("evaluate", {"expression": "(" * 50 + "2" + ")" * 50 + "/0"}, "division by zero"),
        ("evaluate", {"expression": "7" * 3_000_000}, "3000000 characters"),
    ],
    ids=lambda case: str(case)[:40],
)
async def test_a_mistake_comes_back_as_one_short_line(tool: str, arguments: dict[str, Any], part: str):
    async with Client(calculator.server, mode="legacy") as client:
        answer = await ask(client, tool, **arguments)
    assert answer.is_error
    assert part in text_of(answer)
    assert len(text_of(answer)) < 150
    assert "\n" not in text_of(answer)


@pytest.mark.anyio
@pytest.mark.parametrize(("number", "part"), [(math.nan, "number"), (math.inf, "number"), (10**5000, "1000 digits")], ids=type)
async def test_a_number_that_json_cannot_carry_is_refused(number: float, part: str):
    async with Client(calculator.server) as client:
        answer = await ask(client, "add", a=number, b=1)
    assert answer.is_error
    assert part in text_of(answer)


def without_titles(properties: dict[str, Any]) -> dict[str, Any]:
    return {name: {key: value for key, value in schema.items() if key != "title"} for name, schema in properties.items()}


async def offered() -> dict[str, Tool]:
    async with Client(calculator.server) as client:
        return {tool.name: tool for tool in (await client.list_tools()).tools}


@pytest.mark.anyio
async def test_the_schemas_of_the_tools_are_plain():
    tools = await offered()
    assert {name: without_titles(tool.input_schema["properties"]) for name, tool in tools.items()} == PARAMETERS
    assert all(tool.input_schema["required"] == list(PARAMETERS[name]) for name, tool in tools.items())
    for tool in tools.values():
        assert tool.output_schema is not None
        assert without_titles(tool.output_schema["properties"]) == {"result": NUMBER}
        assert tool.output_schema["required"] == ["result"]


@pytest.mark.anyio
async def test_every_tool_says_that_it_is_safe_in_few_words():
    for tool in (await offered()).values():
        assert tool.annotations is not None
        hints = tool.annotations
        assert (hints.read_only_hint, hints.idempotent_hint, hints.open_world_hint) == (True, True, False)
        assert tool.description is not None
        assert 0 < len(tool.description) <= 80


@pytest.mark.anyio
async def test_it_serves_over_stdio_from_any_folder(tmp_path: Path):
    async with Client(StdioServerParameters(command=sys.executable, args=[str(SERVER)], cwd=tmp_path)) as client:
        await check_that_it_serves(client)


@contextmanager
def running(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process on a free port, with its URL as reached from this machine."""
    command = [sys.executable, str(SERVER), "--port", "0", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            first = process.stderr.readline()
            assert "serving http://" in first, first
            yield process, first.split()[2].replace("0.0.0.0", "127.0.0.1")
        finally:
            process.kill()


@pytest.fixture(
    scope="module",
    params=[
        ("sse", "127.0.0.1"),
        ("sse", "0.0.0.0"),
        ("streamable-http", "127.0.0.1"),
        ("streamable-http", "0.0.0.0"),
    ],
    ids="-".join,
)
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    transport, host = request.param
    with running("--transport", transport, "--host", host, "--allow-host", "calculator.example") as (_, address):
        yield address


@pytest.mark.anyio
async def test_it_serves_over_http(url: str):
    async with Client(sse_client(url) if url.endswith("/sse") else url) as client:
        await check_that_it_serves(client)


def status(url: str, **headers: str) -> int:
    """The status of an `initialize` request that carries `headers`, as a browser or a proxy would send it."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    hello = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello})
    accepted = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}
    try:
        if parts.path == "/sse":
            connection.request("GET", parts.path, headers={**accepted, **headers})
        else:
            connection.request("POST", parts.path, body, {**accepted, **headers})
        return connection.getresponse().status
    finally:
        connection.close()


def test_requests_for_another_host_or_from_another_origin_are_refused(url: str):
    port = urlsplit(url).port
    assert status(url, Host="evil.example") == 421
    assert status(url, Host=f"evil.example:{port}") == 421
    assert status(url, Host=f"localhost.evil.example:{port}") == 421
    assert status(url, Origin="http://evil.example") == 403
    assert status(url, Origin=f"http://evil.example:{port}") == 403
    assert status(url, Origin="null") == 403


def test_requests_for_this_machine_and_the_allowed_hosts_are_answered(url: str):
    port = urlsplit(url).port
    for name in ("127.0.0.1", "localhost", "[::1]", socket.gethostname(), "calculator.example"):
        assert status(url, Host=f"{name}:{port}", Origin=f"http://{name}:6274") == 200
    assert status(url, Host="localhost") == 200


def test_what_it_answers_over_http_is_sent_at_once():
    with calculator.listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_port_in_use_is_one_line_and_exit_code_2():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags = ["--transport", "sse", "--port", str(port)]
        ended = subprocess.run([sys.executable, str(SERVER), *flags], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == f"calculator: port {port} on 127.0.0.1 is in use; choose another with --port\n"


def test_an_unknown_address_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]):
    assert calculator.main(["--transport", "sse", "--host", "not an address"]) == 2
    assert capsys.readouterr().err.startswith("calculator: cannot listen on not an address:8001: ")


@pytest.mark.parametrize("flags", [["--port", "65536"], ["--port", "http"], ["--transport", "carrier-pigeon"]], ids=" ".join)
def test_a_wrong_flag_is_explained(flags: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        calculator.main(flags)
    assert ended.value.code == 2
    assert flags[1] in capsys.readouterr().err


def test_control_c_ends_an_http_server_with_a_client_connected_and_prints_nothing_more():
    with running("--transport", "sse") as (process, url):
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
        connection.request("GET", parts.path)
        with connection.getresponse() as stream:
            assert stream.readline() == b"event: endpoint\r\n"
            process.send_signal(signal.SIGINT)
            assert process.wait() == 0
        connection.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_control_c_ends_a_stdio_server_that_waits_for_input_and_prints_nothing():
    command = [sys.executable, str(SERVER)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write('{"jsonrpc": "2.0", "id": 1, "method": "ping"}\n')
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["id"] == 1
        process.send_signal(signal.SIGINT)
        assert process.wait() == -signal.SIGINT
        assert process.stderr.read() == ""
