"""The toolbox over real servers: all transports and eras, failures, names, limits."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import pytest
from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from odd import ODD, odd_in_process, odd_stdio, odd_url, text_of

from art_mcp.errors import ConfigError, ToolServerError
from art_mcp.tools import link, open_tools
from art_mcp.tools.endpoint import open_log
from art_mcp.types import ServerSpec, ToolCall, ToolResult
from tests.clocks import skip
from tests.processes import ended

pytestmark = pytest.mark.anyio
IN_PROCESS = odd_in_process()


def server_with(name: str, *tools: str) -> MCPServer:
    server = MCPServer(name, log_level="CRITICAL")
    for tool in tools:
        server.add_tool(speaker(f"{tool} of {name}"), name=tool)
    return server


def speaker(text: str):
    async def speak() -> str:
        return text

    return speak


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_every_transport_and_era_lists_calls_and_reports_errors_alike(odd, mode):
    async with open_tools([odd], mode=mode) as toolbox:
        add = next(tool for tool in toolbox.tools if tool.name == "add")
        assert add.description == "Adds.\n\nBoth must be whole."
        assert list(add.parameters.items()) == [
            ("type", "object"),
            ("properties", {"a": {"type": "integer"}, "b": {"type": "integer"}}),
            ("required", ["a", "b"]),
        ]
        assert add.read_only
        assert await toolbox.call(ToolCall("add", {"a": 2, "b": 3})) == ToolResult("5", structured={"result": 5})
        refused = await toolbox.call(ToolCall("refuse", {}))
        assert refused.is_error
        assert "not today" in refused.text
        wrong = await toolbox.call(ToolCall("add", {"a": "x", "b": 1}))
        assert wrong.is_error
        unknown = await toolbox.call(ToolCall("ad", {}))
        assert unknown.is_error
        assert unknown.text.startswith("unknown tool 'ad'; did you mean 'add'?")


async def test_parallel_calls_on_one_session_get_their_own_answers_though_one_is_cancelled(odd):
    answers: dict[int, str] = {}
    async with open_tools([odd]) as toolbox:

        async def call(number: int) -> None:
            answers[number] = await text_of(toolbox, "add", a=number, b=1)

        async with anyio.create_task_group() as group:
            for number in range(120):
                group.start_soon(call, number)
            with anyio.CancelScope() as scope:
                group.start_soon(cancel_once, toolbox, scope)
                await text_of(toolbox, "pause", seconds=1000)
        assert scope.cancelled_caught
        assert answers == {number: str(number + 1) for number in range(120)}
        assert await text_of(toolbox, "add", a=1, b=1) == "2"


async def cancel_once(toolbox, scope: anyio.CancelScope) -> None:
    """Cancels when a call made later than what is to be cancelled has its answer."""
    assert await text_of(toolbox, "add", a=1, b=1) == "2"
    scope.cancel()


async def test_a_call_that_gets_no_answer_in_time_is_the_servers_failure_and_the_next_one_works(odd):
    async with open_tools([odd], call_timeout=100) as toolbox:

        async def waste_time() -> None:
            assert await text_of(toolbox, "add", a=1, b=1) == "2"  # the call before it is under way by then
            skip(100)

        async with anyio.create_task_group() as group:
            group.start_soon(waste_time)
            with pytest.raises(ToolServerError, match=r"server 'odd' did not answer 'pause' within 100 s"):
                await text_of(toolbox, "pause", seconds=1000)
        assert await text_of(toolbox, "add", a=1, b=1) == "2"


@pytest.mark.parametrize("transport", ["stdio", "sse", "streamable-http"])
async def test_a_server_that_dies_in_a_call_fails_this_and_later_calls_but_not_its_neighbour(transport):
    neighbour = server_with("neighbour", "greet")
    if transport == "stdio":
        await check_death(odd_stdio(), neighbour)
    else:
        with odd_url(transport) as spec:
            await check_death(spec, neighbour)


async def check_death(spec: ServerSpec, neighbour: MCPServer) -> None:
    async with open_tools([spec, neighbour]) as toolbox:
        with pytest.raises(ToolServerError, match="server 'odd' "):
            await text_of(toolbox, "die")
        for _ in range(3):
            with pytest.raises(ToolServerError, match="server 'odd' "):
                await text_of(toolbox, "add", a=1, b=1)
        assert await text_of(toolbox, "greet") == "greet of neighbour"


async def test_calls_in_flight_when_a_server_dies_all_fail():
    failures: list[str] = []
    async with open_tools([odd_stdio()]) as toolbox:

        async def wait_for_death() -> None:
            with pytest.raises(ToolServerError) as caught:
                await text_of(toolbox, "pause", seconds=60)
            failures.append(str(caught.value))

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(wait_for_death)
            os.kill(int(await text_of(toolbox, "pid")), signal.SIGKILL)
    assert len(failures) == 3


@pytest.mark.parametrize("mode", ["auto", "legacy"])
@pytest.mark.parametrize("tool", ["leave", "leave_thread"])
async def test_a_tool_that_calls_sys_exit_fails_all_calls_in_flight_with_the_exit_code_and_the_servers_last_words(tool, mode):
    failures: list[str] = []
    async with open_tools([odd_stdio()], mode=mode, call_timeout=1000) as toolbox:

        async def call(name: str, **arguments) -> None:
            with pytest.raises(ToolServerError) as caught:
                await text_of(toolbox, name, **arguments)
            failures.append(str(caught.value))

        async with anyio.create_task_group() as group:
            group.start_soon(lambda: call("pause", seconds=1000))
            assert await text_of(toolbox, "add", a=1, b=1) == "2"
            group.start_soon(lambda: call(tool, code=5))
        await call("add", a=1, b=1)
    assert len(failures) == 3
    assert set(failures) == {"server 'odd' ended with exit code 5: my last words"}


async def test_a_server_that_is_killed_is_told_with_the_signal():
    async with open_tools([odd_stdio()]) as toolbox:
        os.kill(int(await text_of(toolbox, "pid")), signal.SIGKILL)
        with pytest.raises(ToolServerError, match="server 'odd' was ended by SIGKILL: it wrote nothing to stderr"):
            await text_of(toolbox, "add", a=1, b=1)


async def test_a_server_that_closes_its_streams_and_lives_on_is_lost_at_once():
    async with open_tools([odd_stdio()], call_timeout=1000) as toolbox:
        with pytest.raises(ToolServerError, match="server 'odd' closed its streams"):
            await text_of(toolbox, "shut")


async def test_a_tool_in_this_process_that_calls_sys_exit_does_not_end_it():
    async with open_tools([IN_PROCESS]) as toolbox:
        with pytest.raises(ToolServerError, match=r"server 'odd' called sys\.exit\(5\) in 'leave'"):
            await text_of(toolbox, "leave", code=5)
        assert await text_of(toolbox, "add", a=1, b=1) == "2"


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_long_call_is_not_disturbed_by_looking_after_its_server(mode, monkeypatch):
    monkeypatch.setattr(link, "LOOK_SECONDS", 0.01)
    async with open_tools([odd_stdio()], mode=mode) as toolbox:
        assert await text_of(toolbox, "pause", seconds=0.5) == "paused 0.5"
        assert await text_of(toolbox, "add", a=1, b=1) == "2"


async def test_what_the_block_raises_leaves_it_as_it_is(sse, http):
    with pytest.raises(KeyError, match="mine"):
        async with open_tools([{"name": "a", "type": "sse", "url": sse.url}, http]):
            raise KeyError("mine")


async def test_the_death_of_a_server_can_be_caught_outside_the_block_and_quotes_its_last_words():
    with pytest.raises(ToolServerError, match="server 'odd' ended with exit code 3: my last words"):
        async with open_tools([odd_stdio()]) as toolbox:
            await text_of(toolbox, "die")


async def test_same_names_of_different_servers_are_prefixed_and_reported():
    async with open_tools([server_with("a", "greet", "one"), server_with("b", "greet", "two")]) as toolbox:
        assert [tool.name for tool in toolbox.tools] == ["a_greet", "one", "b_greet", "two"]
        assert toolbox.renamed == {"a_greet": "greet", "b_greet": "greet"}
        assert await text_of(toolbox, "b_greet") == "greet of b"
        assert (await toolbox.call(ToolCall("greet", {}))).is_error


async def test_only_restricts_and_orders_the_offered_tools():
    async with open_tools([server_with("a", "one", "two", "three")], only=["three", "one"]) as toolbox:
        assert [tool.name for tool in toolbox.tools] == ["three", "one"]
        assert (await toolbox.call(ToolCall("two", {}))).is_error


async def test_tools_that_are_not_offered_can_be_called_without_the_restriction_and_those_that_no_server_has_raise(odd):
    async with open_tools([odd, server_with("a", "add")], only=["refuse"]) as toolbox:
        assert [tool.name for tool in toolbox.tools] == ["refuse"]
        assert (await text_of(toolbox, "odd_add", a=2, b=3)).startswith("unknown tool 'odd_add'; there are: ")
        assert await text_of(toolbox.unrestricted, "odd_add", a=2, b=3) == "5"
        assert {"refuse", "pause", "odd_add", "a_add"} <= {tool.name for tool in toolbox.unrestricted.tools}
        with pytest.raises(LookupError, match=r"no server has a tool 'odd_ad'; did you mean 'odd_add'\? there are: .*a_add"):
            await toolbox.unrestricted.call(ToolCall("odd_ad", {}))


async def test_an_unknown_name_in_only_is_a_config_error_that_lists_the_names():
    with pytest.raises(ConfigError, match="no tool 'tow'; did you mean 'two'\\? there are: one, two"):
        async with open_tools([server_with("a", "one", "two")], only=["tow"]):
            pass


async def test_two_servers_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="2 servers are called 'a'"):
        async with open_tools([server_with("a", "one"), server_with("a", "two")]):
            pass


async def test_titles_that_repeat_a_name_go_but_a_property_called_title_stays():
    async with open_tools([IN_PROCESS], only=["rename"]) as toolbox:
        (rename,) = toolbox.tools
        assert rename.parameters["properties"] == {
            "title": {"type": "string"},
            "subtitle": {"default": "none", "type": "string"},
        }
        assert rename.serial
        assert not rename.read_only


async def test_a_stdio_server_gets_its_own_variables_and_few_of_ours(monkeypatch):
    monkeypatch.setenv("OUR_SECRET", "do not tell")
    monkeypatch.setenv("TOKEN", "s3cret-token")
    async with open_tools([odd_stdio(env={"GIVEN": "${TOKEN}"})]) as toolbox:
        result = await toolbox.call(ToolCall("variables", {}))
    variables = set(result.structured)
    assert result.structured["GIVEN"] == "s3cret-token"
    assert variables <= {"HOME", "LOGNAME", "PATH", "SHELL", "TERM", "USER", "GIVEN", "LC_CTYPE", "__CF_USER_TEXT_ENCODING"}


async def test_servers_are_found_by_name_entry_and_file(tmp_path):
    (tmp_path / "odd.py").symlink_to(ODD)
    (tmp_path / "config.json").write_text('{"mcpServers": {"named": {"command": "python", "args": ["odd.py"]}}}')
    entry = {"name": "entry", "command": "python3", "args": [ODD]}
    async with open_tools(["named", entry, "odd.py:server"], config=tmp_path / "config.json") as toolbox:
        assert await text_of(toolbox, "named_folder") == str(tmp_path.resolve())
        assert await text_of(toolbox, "entry_add", a=1, b=2) == "3"
        assert await text_of(toolbox, "odd_add", a=1, b=2) == "3"


PARENT = """
import anyio
from art_mcp.tools import open_tools
from art_mcp.tools.endpoint import open_log
from art_mcp.types import ServerSpec, ToolCall

async def main():
    spec = ServerSpec("odd", "stdio", command={python!r}, args=({odd!r},))
    async with open_tools([spec]) as toolbox, anyio.create_task_group() as group:
        group.start_soon(toolbox.call, ToolCall("hold", {{"seconds": 1000}}))
        print((await toolbox.call(ToolCall("pid", {{}}))).text, flush=True)
        await anyio.sleep_forever()

anyio.run(main)
"""


def test_no_server_outlives_a_parent_that_got_sigkill():
    root = Path(__file__).parents[2]
    program = PARENT.format(python=sys.executable, odd=ODD)
    with subprocess.Popen([sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE, text=True) as parent:
        server = int(parent.stdout.readline())
        parent.kill()
    assert ended(server)


CRASHING = """
import logging
from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

{setup}
server = MCPServer("crashing")


@server.tool()
async def crash() -> str:
    raise RuntimeError("no such disk")
"""

CRASH = """
import asyncio, sys
from art_mcp.tools import open_tools
from art_mcp.tools.endpoint import open_log
from art_mcp.types import ToolCall


async def main():
    async with open_tools([sys.argv[1]]) as toolbox:
        print(await toolbox.call(ToolCall("crash", {})))


asyncio.run(main())
"""


@pytest.mark.parametrize(("setup", "told"), [("", False), ("logging.basicConfig()", True)])
def test_an_in_process_tool_that_raises_prints_no_traceback_unless_its_file_sets_up_logging(tmp_path, setup, told):
    (tmp_path / "crashing.py").write_text(CRASHING.format(setup=setup))
    command = [sys.executable, "-c", CRASH, f"{tmp_path}/crashing.py:server"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "is_error=True" in done.stdout
    assert ("no such disk" in done.stderr) is told
    assert bool(done.stderr) is told


ERRORS = {
    "Traceback (most recent call last):\n  File x\nOSError: no more room\n": "OSError: no more room",
    "KeyError: 'a'\n\nThe above exception …\n\nsdk.UnexpectedToolError: Error\nUnexpectedToolError: Error": "KeyError: 'a'",
    "   sqlite3.OperationalError: no such   \n   table: sums   \n\n   more\n": "sqlite3.OperationalError: no such table: sums",
    "TypeError: x is not a function\n    at Object.<anonymous> (/srv/index.js:1)\n": "TypeError: x is not a function",
    "INFO: nothing of note\nserver listens\n": "",
    "": "",
}


BOXED = """my own words
  ╭─ Traceback (most recent call last) ─╮
  │ /srv/server.py:7 in stop            │
  │ ❱  7 │   sys.exit(3)                │
  │ ╰──────────────────────────────╯    │
  │ SystemExit: 3                       │
  ╰─────────────────────────────────────╯
    ^^^^^^
"""


def test_of_a_traceback_in_a_box_the_last_words_are_its_error():
    with open_log() as log:
        log.note(BOXED)
        assert log.last_lines() == "my own words / SystemExit: 3"


@pytest.mark.parametrize(("written", "told"), ERRORS.items())
def test_a_servers_log_names_the_error_between_two_moments(written, told):
    with open_log() as log:
        log.note("ValueError: an old one")
        first = log.size()
        log.note(written)
        last = log.size()
        log.note("ValueError: a newer one")
        assert log.error_within(first, last) == told


async def test_an_error_that_a_tool_means_is_not_explained_by_an_earlier_crash():
    server = MCPServer("moody")

    @server.tool()
    async def crash() -> str:
        raise KeyError("lost")

    @server.tool()
    async def refuse() -> str:
        raise ToolError("not today")

    async with open_tools([server]) as toolbox:
        assert "lost" not in (await toolbox.call(ToolCall("crash", {}))).text
        assert toolbox.last_error("crash") == "KeyError: 'lost'"
        assert "not today" in (await toolbox.call(ToolCall("refuse", {}))).text
        assert toolbox.last_error("refuse") == toolbox.last_error("nobody's") == ""


async def test_a_server_is_not_blamed_for_what_another_one_raises_meanwhile():
    asked, crashed = anyio.Event(), anyio.Event()
    moody, calm = MCPServer("moody"), MCPServer("calm")

    @moody.tool()
    async def crash() -> str:
        raise KeyError("lost")

    @calm.tool()
    async def refuse() -> str:
        asked.set()
        await crashed.wait()
        raise ToolError("not today")

    async with open_tools([moody, calm]) as toolbox:
        async with anyio.create_task_group() as group:
            group.start_soon(toolbox.call, ToolCall("refuse", {}))
            await asked.wait()
            await toolbox.call(ToolCall("crash", {}))
            crashed.set()
        assert toolbox.last_error("crash") == "KeyError: 'lost'"
        assert toolbox.last_error("refuse") == ""
