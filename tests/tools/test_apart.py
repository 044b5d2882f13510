"""Connections held by other processes: the same toolbox, the same failures, and nothing left when they end."""

import os
import signal
from datetime import UTC, datetime
from types import MappingProxyType

import anyio
import psutil
import pytest
from mcp.server import MCPServer
from odd import odd_in_process, odd_stdio, text_of

from art_mcp.environment import Environment
from art_mcp.errors import ConfigError, ToolServerError
from art_mcp.tools import apart, open_servers, open_tools
from art_mcp.types import ServerSpec, ToolCall, ToolResult
from tests.processes import commands, remaining

pytestmark = pytest.mark.anyio
IN_PROCESS = odd_in_process()


def holders() -> list[psutil.Process]:
    """The processes under this one that hold connections; each has a launcher, whose command is in its own line too."""
    found = commands(psutil.Process().children(recursive=True))
    return [one for one, line in found if "art_mcp.tools.holder" in line and "-S" not in line]


ODDER = """
import subprocess, sys, time
import anyio
from mcp.server import MCPServer

server = MCPServer("odder", log_level="CRITICAL")
began, ended = [], []

@server.tool()
async def crash() -> str:
    raise KeyError("lost")

@server.tool()
async def linger(number: int) -> str:
    began.append(number)
    try:
        await anyio.sleep_forever()
    finally:
        ended.append(number)

@server.tool()
async def told() -> list[list[int]]:
    return [began, ended]

@server.tool(structured_output=False)
async def huge() -> int:
    return 10**5000

@server.tool()
async def large() -> int:
    return 10**5000

@server.tool()
async def reads() -> str:
    code = "import sys; sys.stdout.write(repr(sys.stdin.read()))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

@server.tool()
async def echo(text: str) -> str:
    return text
"""


@pytest.fixture
def odder(tmp_path):
    (tmp_path / "odder.py").write_text(ODDER)
    return f"{tmp_path / 'odder.py'}:server"


async def test_a_toolbox_whose_connections_are_elsewhere_lists_calls_and_reports_errors_as_one_here(odd):
    async with open_tools([odd]) as here, open_tools([odd], processes=1) as apart:
        assert apart.tools == here.tools
        assert apart.unrestricted.tools == here.unrestricted.tools
        for call in (
            ToolCall("add", {"a": 2, "b": 3}),
            ToolCall("add", {"a": "x", "b": 1}),
            ToolCall("ad", {}),
            ToolCall("refuse", {}),
            ToolCall("long_text", {"length": 100_000}),
            ToolCall("exhibits", {}),
        ):
            assert await apart.call(call) == await here.call(call)
            assert apart.last_error(call.name) == here.last_error(call.name)
        with pytest.raises(LookupError, match="no server has a tool 'ad'"):
            await apart.unrestricted.call(ToolCall("ad", {}))


async def test_what_a_server_keeps_from_its_client_is_told_from_there_too(odder):
    async with open_tools([odder], processes=1) as toolbox:
        assert "lost" not in (await toolbox.call(ToolCall("crash", {}))).text
        assert toolbox.last_error("crash") == "KeyError: 'lost'"


async def test_a_call_that_is_given_up_is_given_up_there_and_one_that_had_not_begun_never_begins(odder):
    async with open_tools([odder], processes=1) as toolbox:

        async def told() -> list[list[int]]:
            return (await toolbox.call(ToolCall("told", {}))).structured["result"]

        async with anyio.create_task_group() as group:
            group.start_soon(toolbox.call, ToolCall("linger", {"number": 1}))
            while (await told())[0] != [1]:
                pass
            group.cancel_scope.cancel()
        while (await told())[1] != [1]:
            pass
        (holder,) = holders()
        holder.send_signal(signal.SIGSTOP)
        async with anyio.create_task_group() as group:
            for number in range(2, 22):
                group.start_soon(toolbox.call, ToolCall("linger", {"number": number}))
            await anyio.wait_all_tasks_blocked()  # each is on its way
            group.cancel_scope.cancel()
        holder.send_signal(signal.SIGCONT)
        assert await told() == [[1], [1]]


async def test_a_result_that_cannot_cross_fails_its_call_alone(odder):
    async with open_tools([odder], processes=1) as toolbox:
        with pytest.raises(ToolServerError, match="what a server answered cannot be handed on between processes: "):
            await toolbox.call(ToolCall("large", {}))
        assert len((await toolbox.call(ToolCall("huge", {}))).text) > 4300
        long = await toolbox.call(ToolCall("echo", {"text": "x" * 3_000_000}))
        assert long.structured == {"result": "x" * 3_000_000}


async def test_what_a_tool_starts_does_not_read_the_calls_of_others(odder):
    async with open_tools([odder], processes=1) as toolbox:
        answers: list[str] = []

        async def echo() -> None:
            answers.append(await text_of(toolbox, "echo", text="mine"))

        async with anyio.create_task_group() as group:
            group.start_soon(echo)
            assert await text_of(toolbox, "reads") == "''"
            for _ in range(20):
                group.start_soon(echo)
        assert answers == ["mine"] * 21


async def test_a_holder_that_stops_answering_fails_calls_in_time_and_can_be_left(monkeypatch):
    monkeypatch.setattr(apart, "SLACK_SECONDS", 0.2)
    monkeypatch.setattr(apart, "CLOSE_SECONDS", 0.2)
    async with open_tools([IN_PROCESS], processes=1, call_timeout=0.5) as toolbox:
        (holder,) = holders()
        holder.send_signal(signal.SIGSTOP)
        with pytest.raises(ToolServerError, match=r"that holds the connections has not answered for 0.7 s"):
            await text_of(toolbox, "long_text", length=1)
        with anyio.move_on_after(0.1) as scope:  # more than a pipe takes
            await text_of(toolbox, "add", a="x" * 2_000_000, b=1)
        assert scope.cancelled_caught
    assert remaining([holder]) == []


async def test_a_toolbox_whose_block_is_over_fails_calls_at_once():
    async with open_tools([IN_PROCESS], processes=1) as toolbox:
        pass
    with pytest.raises(ToolServerError, match="the servers are closed"):
        await text_of(toolbox, "add", a=1, b=1)
    with anyio.CancelScope() as scope:
        async with open_tools([IN_PROCESS], processes=1) as toolbox:
            scope.cancel()
            await anyio.sleep_forever()
    with pytest.raises(ToolServerError, match="the servers are closed"):
        await text_of(toolbox, "add", a=1, b=1)


async def test_calls_go_to_the_holder_whose_server_is_still_there():
    async with open_tools([odd_stdio()], processes=2) as toolbox:
        os.kill(int(await text_of(toolbox, "pid")), signal.SIGKILL)
        with pytest.raises(ToolServerError, match="server 'odd' was ended by SIGKILL"):
            await text_of(toolbox, "add", a=1, b=1)  # nobody knew of it before
        assert [await text_of(toolbox, "add", a=1, b=1) for _ in range(20)] == ["2"] * 20
        assert not toolbox.lost
        os.kill(int(await text_of(toolbox, "pid")), signal.SIGKILL)
        with pytest.raises(ToolServerError, match="server 'odd' was ended by SIGKILL"):
            await text_of(toolbox, "add", a=1, b=1)
        assert toolbox.lost


async def test_arguments_and_specs_may_be_any_mapping():
    spec = odd_stdio(env=MappingProxyType({"ART_MCP_TEST_VARIABLE": "seen"}))
    async with open_tools([spec], processes=1) as toolbox:
        result = await toolbox.call(ToolCall("variables", MappingProxyType({})))
        assert result.structured["ART_MCP_TEST_VARIABLE"] == "seen"
        dated = await toolbox.call(ToolCall("rename", {"title": datetime(2026, 1, 2, tzinfo=UTC)}))
        assert dated.text.startswith("2026-01-02T00:00:00")


async def test_of_several_failures_to_start_the_first_is_told():
    with pytest.raises(ConfigError, match="NOPE_X"):
        async with open_tools([odd_stdio(env={"A": "${NOPE_X}"})], processes=2):
            pass


async def test_a_server_that_does_not_start_is_told_as_one_here():
    crash = ServerSpec("crash", "stdio", command="python3", args=("-c", "raise SystemExit('no luck')"))
    with pytest.raises(ToolServerError, match=r"server 'crash' ended with exit code 1 before it was ready: no luck"):
        async with open_tools([crash], processes=1):
            pass


async def test_a_server_in_the_same_process_is_in_the_holders_and_each_call_goes_to_the_one_with_the_fewest():
    pids: set[int] = set()
    before = psutil.Process().children(recursive=True)
    async with open_tools([IN_PROCESS], processes=2) as toolbox:

        async def ask() -> None:
            pids.add(int(await text_of(toolbox, "pid")))

        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(ask)
        assert pids == {one.pid for one in holders()}
        assert len(pids) == 2
        started = [one for one in psutil.Process().children(recursive=True) if one not in before]
    assert remaining(started) == []


async def test_parallel_calls_get_their_own_answers_though_one_is_cancelled():
    answers: dict[int, str] = {}
    async with open_tools([IN_PROCESS], processes=1) as toolbox:

        async def call(number: int) -> None:
            answers[number] = await text_of(toolbox, "add", a=number, b=1)

        async with anyio.create_task_group() as group:
            with anyio.CancelScope() as scope:

                async def cancel() -> None:
                    assert await text_of(toolbox, "add", a=1, b=1) == "2"  # what is to be cancelled is under way by then
                    scope.cancel()

                group.start_soon(cancel)
                await text_of(toolbox, "pause", seconds=1000)
            for number in range(120):
                group.start_soon(call, number)
        assert scope.cancelled_caught
        assert answers == {number: str(number + 1) for number in range(120)}


async def test_when_a_holder_dies_its_calls_fail_the_other_goes_on_and_without_one_all_fail_at_once():
    failures: list[str] = []
    async with open_tools([IN_PROCESS], processes=2) as toolbox:
        first, second = holders()

        async def wait_for_death() -> None:
            with pytest.raises(ToolServerError) as caught:
                await text_of(toolbox, "pause", seconds=1000)
            failures.append(str(caught.value))

        async with anyio.create_task_group() as group:
            for _ in range(2):
                group.start_soon(wait_for_death)
            await text_of(toolbox, "add", a=1, b=1)
            await text_of(toolbox, "add", a=1, b=1)
            first.send_signal(signal.SIGKILL)
            assert remaining([first]) == []
            with anyio.fail_after(60):
                while not failures:
                    await text_of(toolbox, "add", a=1, b=1)
            assert {int(await text_of(toolbox, "pid")) for _ in range(3)} == {second.pid}
            assert not toolbox.lost
            second.send_signal(signal.SIGKILL)
        assert len(failures) == 2
        assert all("that held the connections to the servers has ended (killed by SIGKILL)" in failure for failure in failures)
        assert toolbox.lost
        with pytest.raises(ToolServerError, match="has ended"):
            await text_of(toolbox, "add", a=1, b=1)


async def test_a_tool_that_ends_its_process_fails_the_calls_in_it():
    async with open_tools([IN_PROCESS], processes=1) as toolbox:
        with pytest.raises(ToolServerError, match=r"has ended \(exit code 3\)"):
            await text_of(toolbox, "die")


async def test_the_working_folder_and_the_environment_are_ours_and_a_file_there_is_no_library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mcp.py").write_text("raise SystemExit('the file in the folder was loaded')")
    monkeypatch.setenv("ART_MCP_TEST_VARIABLE", "seen")
    async with open_tools([IN_PROCESS], processes=1) as toolbox:
        assert await text_of(toolbox, "folder") == os.getcwd()
        result = await toolbox.call(ToolCall("variables", {}))
        assert result.structured["ART_MCP_TEST_VARIABLE"] == "seen"
        assert result.structured.get("PYTHONPATH") == os.environ.get("PYTHONPATH")


async def test_the_servers_of_an_environment_are_held_apart_unless_each_rollout_has_its_own():
    environment = Environment(servers=[f"{IN_PROCESS.target}"], scenarios=lambda _: [], rewards={"none": lambda _: 0.0})
    async with open_servers(environment, folder="/", processes=1) as toolbox, toolbox.lend() as lent:
        assert await lent.call(ToolCall("add", {"a": 1, "b": 1})) == ToolResult("2", structured={"result": 2})
    each = Environment(servers=[odd_stdio()], scenarios=lambda _: [], rewards={"none": lambda _: 0.0}, copies=2, name="each")
    with pytest.raises(ConfigError, match="each rollout of environment 'each' has servers of its own"):
        async with open_servers(each, processes=1):
            pass


async def test_a_server_object_and_a_number_below_one_are_refused():
    with pytest.raises(ConfigError, match="the server object 'mine' is in this process"):
        async with open_tools([MCPServer("mine")], processes=1):
            pass
    with pytest.raises(ConfigError, match="-1 processes cannot hold connections"):
        async with open_tools([IN_PROCESS], processes=-1):
            pass
