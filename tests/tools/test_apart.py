"""Connections held by other processes: the same toolbox, the same failures, and nothing left when they end."""

import os
import signal

import anyio
import psutil
import pytest
from mcp.server import MCPServer
from odd import odd_in_process, odd_stdio, text_of

from art_mcp.environment import Environment
from art_mcp.errors import ConfigError, ToolServerError
from art_mcp.tools import open_servers, open_tools
from art_mcp.types import ServerSpec, ToolCall, ToolResult
from tests.processes import remaining

pytestmark = pytest.mark.anyio
IN_PROCESS = odd_in_process()


def holders() -> list[psutil.Process]:
    """The processes under this one that hold connections; each has a launcher, whose command is in its own line too."""
    found = [one for one in psutil.Process().children(recursive=True) if "art_mcp.tools.apart" in one.cmdline()]
    return [one for one in found if "-S" not in one.cmdline()]


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


MOODY = """
from mcp.server import MCPServer

server = MCPServer("moody")

@server.tool()
async def crash() -> str:
    raise KeyError("lost")
"""


async def test_what_a_server_keeps_from_its_client_is_told_from_there_too(tmp_path):
    (tmp_path / "moody.py").write_text(MOODY)
    async with open_tools(["moody.py:server"], folder=tmp_path, processes=1) as toolbox:
        assert "lost" not in (await toolbox.call(ToolCall("crash", {}))).text
        assert toolbox.last_error("crash") == "KeyError: 'lost'"


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
            while len(failures) < 1:
                await anyio.wait_all_tasks_blocked()
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


async def test_the_working_folder_and_the_environment_are_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ART_MCP_TEST_VARIABLE", "seen")
    async with open_tools([IN_PROCESS], processes=1) as toolbox:
        assert await text_of(toolbox, "folder") == os.getcwd()
        result = await toolbox.call(ToolCall("variables", {}))
        assert result.structured["ART_MCP_TEST_VARIABLE"] == "seen"


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
