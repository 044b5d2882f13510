"""Copies of servers, each lent to one rollout at a time: real processes, and servers in this one."""

import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import psutil
import pytest
from odd import ODD, odd_url, text_of

from art_mcp.environment import Environment
from art_mcp.errors import ConfigError, ToolServerError
from art_mcp.tools import copies
from art_mcp.tools.copies import open_servers
from art_mcp.tools.toolbox import open_tools
from art_mcp.types import Scenario, ToolCall
from tests.processes import ended

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
CART = ROOT / "servers" / "cart" / "server.py"
CARTS = {"stdio": {"name": "cart", "command": sys.executable, "args": [str(CART)]}, "in-process": f"{CART}:server"}
STDIO = {"name": "odd", "command": sys.executable, "args": [ODD]}


async def keep(scenario, toolbox):
    """A reset of what has no state."""


def place(*servers, copies, **fields):
    scenarios = [Scenario("one", "")]
    return Environment(servers=servers, scenarios=lambda split: scenarios, rewards={"r": len}, copies=copies, **fields)


async def pid_of(toolbox) -> int:
    return int(await text_of(toolbox, "pid"))


@pytest.mark.parametrize("transport", CARTS)
async def test_what_one_rollout_does_to_its_servers_no_other_sees_at_the_same_time_or_later(transport):
    async with open_servers(place(CARTS[transport], copies=2, tools=["put"])) as servers:
        assert [tool.name for tool in servers.tools] == ["put"]
        async with servers.lend() as first, servers.lend() as second:
            assert await text_of(first, "put", item="eggs", quantity=2) == "2 eggs in the cart"
            assert await text_of(second, "put", item="eggs", quantity=3) == "3 eggs in the cart"
            assert (await first.unrestricted.call(ToolCall("contents", {}))).structured == {"eggs": 2}
            assert (await first.call(ToolCall("contents", {}))).is_error
        async with servers.lend() as third:
            assert (await third.unrestricted.call(ToolCall("contents", {}))).structured == {}


async def test_without_copies_all_rollouts_share_one_set_of_servers():
    async with open_servers(place(STDIO, copies=0)) as servers, servers.lend() as first, servers.lend() as second:
        assert await pid_of(first) == await pid_of(second)


async def test_there_are_never_more_sets_than_copies_and_who_waits_gets_one_in_turn():
    lent: list[int] = []
    before = set(psutil.Process().children())
    most, two = 0, anyio.Event()

    async def play(servers) -> None:
        nonlocal most
        async with servers.lend() as toolbox:
            lent.append(await pid_of(toolbox))
            if len(set(lent)) == 2:
                two.set()
            await two.wait()
            most = max(most, len(set(psutil.Process().children()) - before))

    async with open_servers(place(STDIO, copies=2, reset=keep)) as servers, anyio.create_task_group() as group:
        for _ in range(9):
            group.start_soon(play, servers)
    assert len(lent) == 9
    assert most == 2
    assert len(set(lent)) == 2
    assert all(map(ended, lent))


async def test_servers_do_not_all_start_at_once_which_would_be_too_slow_for_any_of_them(monkeypatch):
    monkeypatch.setattr(copies, "STARTS", 3)
    starting = most = 0

    @asynccontextmanager
    async def open_set():
        nonlocal starting, most
        starting, most = starting + 1, max(most, starting + 1)
        async with open_tools([CARTS["in-process"]]) as toolbox:
            starting -= 1
            yield toolbox

    async def play(servers) -> None:
        async with servers.lend():
            pass

    async with copies.open_copies(open_set, most=12, reuse=False) as servers, anyio.create_task_group() as group:
        for _ in range(12):
            group.start_soon(play, servers)
    assert most == 3


async def test_without_a_reset_each_rollout_gets_servers_that_nobody_had():
    pids: list[int] = []
    async with open_servers(place(STDIO, copies=1)) as servers:
        for _ in range(3):
            async with servers.lend() as toolbox:
                pids.append(await pid_of(toolbox))
        assert len(set(pids)) == 3
    assert all(map(ended, pids))


async def test_servers_in_which_a_call_was_given_up_or_that_died_are_not_lent_again():
    async with open_servers(place(STDIO, copies=1, reset=keep)) as servers:
        async with servers.lend() as toolbox:
            first = await pid_of(toolbox)
        async with servers.lend() as toolbox:
            assert await pid_of(toolbox) == first
            with anyio.move_on_after(0.01):
                await text_of(toolbox, "pause", seconds=1000)
        async with servers.lend() as toolbox:
            second = await pid_of(toolbox)
            with pytest.raises(ToolServerError, match="ended with exit code 3: my last words"):
                await text_of(toolbox.unrestricted, "die")
        async with servers.lend() as toolbox:
            third = await pid_of(toolbox)
        os.kill(third, signal.SIGKILL)
        assert ended(third)
        with anyio.fail_after(30):
            while await pid_of_next(servers) == third:  # until the end of its streams has been seen
                pass
    assert len({first, second, third}) == 3


async def pid_of_next(servers) -> int:
    async with servers.lend() as toolbox:
        try:
            return await pid_of(toolbox)
        except ToolServerError:
            pass
    async with servers.lend() as toolbox:
        return await pid_of(toolbox)


async def test_a_set_that_does_not_start_fails_its_rollout_and_no_other(tmp_path):
    script = f'[ -e {tmp_path}/no ] && {{ echo "no database" >&2; exit 1; }}; exec "{sys.executable}" "{ODD}"'
    moody = place({"name": "moody", "command": "sh", "args": ["-c", script]}, copies=2)
    async with open_servers(moody) as servers, servers.lend() as first:
        (tmp_path / "no").touch()
        for _ in range(3):  # a place is free again each time
            with pytest.raises(ToolServerError, match="'moody' ended with exit code 1 before it was ready: no database"):
                async with servers.lend():
                    raise AssertionError
        (tmp_path / "no").unlink()
        async with servers.lend() as second:
            assert await pid_of(first) != await pid_of(second)


async def test_who_is_cancelled_while_servers_start_or_are_all_lent_takes_no_place_away():
    async with open_servers(place(STDIO, copies=1)) as servers:
        async with servers.lend() as toolbox:
            with anyio.move_on_after(0.01) as waiting:
                async with servers.lend():
                    raise AssertionError
            assert await text_of(toolbox, "add", a=1, b=1) == "2"
        with anyio.move_on_after(0.01) as starting:  # a server takes longer than that
            async with servers.lend():
                raise AssertionError
        assert waiting.cancelled_caught
        assert starting.cancelled_caught
        async with servers.lend() as toolbox:
            assert await text_of(toolbox, "add", a=1, b=1) == "2"


async def test_what_is_wrong_with_the_servers_is_told_when_they_are_opened(tmp_path):
    with pytest.raises(ConfigError, match="no tool 'tow'; there are: add"):
        async with open_servers(place(STDIO, copies=2, tools=["tow"])):
            pass
    with pytest.raises(ToolServerError, match="server 'none' cannot start: no command 'no-such-command'"):
        async with open_servers(place({"name": "none", "command": "no-such-command"}, copies=2)):
            pass
    with pytest.raises(KeyError, match="mine"):
        async with open_servers(place(STDIO, copies=2)) as servers, servers.lend():
            raise KeyError("mine")


@pytest.mark.parametrize("fields", [{}, {"reset": keep}], ids=["started anew", "reset"])
async def test_closing_waits_for_the_rollouts_that_are_under_way_and_for_nobody_else(fields):
    lent, closing, played = anyio.Event(), anyio.Event(), []

    async def play(servers) -> None:
        async with servers.lend() as toolbox:
            lent.set()
            await closing.wait()
            played.append(await text_of(toolbox, "put", item="eggs", quantity=1))

    with anyio.fail_after(60):
        async with (
            anyio.create_task_group() as group,
            open_servers(place(CARTS["in-process"], copies=2, **fields)) as servers,
        ):
            for _ in range(3):  # one waits for its turn, which it gets
                group.start_soon(play, servers)
            await lent.wait()
            closing.set()
    assert len(played) == 3
    with pytest.raises(ToolServerError, match="the servers are closed: the block that opened them is over"):
        async with servers.lend():
            raise AssertionError


async def test_a_toolbox_that_was_lent_cannot_be_used_once_its_rollout_is_over():
    async with open_servers(place(CARTS["in-process"], copies=1, reset=keep)) as servers:
        async with servers.lend() as toolbox:
            everything = toolbox.unrestricted
        for one in (toolbox, everything):
            with pytest.raises(RuntimeError, match="'put' is called on servers that were lent to a rollout which is over"):
                await text_of(one, "put", item="eggs", quantity=1)


async def test_copies_of_a_server_behind_a_url_are_sessions_of_their_own_there():
    with odd_url("streamable-http") as spec:
        entry = {"name": "odd", "type": "streamable-http", "url": spec.url}
        async with open_servers(place(entry, copies=2)) as servers, servers.lend() as first, servers.lend() as second:
            assert await pid_of(first) == await pid_of(second)


NOTES = """
from pathlib import Path
from mcp.server import MCPServer

server = MCPServer("notes", log_level="CRITICAL")


@server.tool()
async def note(text: str) -> str:
    with Path("notes.txt").open("a") as notes:
        notes.write(text)
    return Path("notes.txt").read_text()


server.run()
"""


@pytest.mark.parametrize(("start", "later"), [("", "onetwo"), ("cd $(mktemp -d -p .) && ", "two")])
async def test_files_are_shared_by_copies_unless_each_is_started_in_a_folder_of_its_own(tmp_path, start, later):
    (tmp_path / "notes.py").write_text(NOTES)
    script = f'{start}exec "{sys.executable}" "{tmp_path}/notes.py"'
    entry = {"name": "notes", "command": "sh", "args": ["-c", script], "cwd": str(tmp_path)}
    async with open_servers(place(entry, copies=1)) as servers:
        async with servers.lend() as toolbox:
            assert await text_of(toolbox, "note", text="one") == "one"
        async with servers.lend() as toolbox:
            assert await text_of(toolbox, "note", text="two") == later


LENDING = """
import anyio, sys
from art_mcp import Environment, Scenario, open_servers
from art_mcp.types import ToolCall

server = {"name": "odd", "command": sys.executable, "args": [sys.argv[1]]}
place = Environment(servers=[server], scenarios=lambda split: [Scenario("one", "")], rewards={"r": len}, copies=3)


async def play(servers):
    async with servers.lend() as toolbox:
        print((await toolbox.call(ToolCall("pid", {}))).text, flush=True)
        await toolbox.call(ToolCall("pause", {"seconds": 1000}))


async def main():
    async with open_servers(place) as servers, anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(play, servers)


anyio.run(main)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_neither_ctrl_c_nor_a_kill_leaves_a_copy_behind(number):
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LENDING, ODD]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        pids = [int(parent.stdout.readline()) for _ in range(3)]
        parent.send_signal(number)
        assert parent.wait(60) != 0
    assert len(set(pids)) == 3
    assert all(map(ended, pids))
