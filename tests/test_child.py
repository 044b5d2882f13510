"""The launcher: what it starts behaves as if started directly, and never outlives whoever started it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import psutil
import pytest

from art_mcp.child import launch_command, open_child
from tests.processes import ended, runs

ROOT = Path(__file__).parents[1]
FAMILY = "trap '' TERM; sleep 1000 & echo $! $$; wait; wait"
"""A shell that ignores SIGTERM, with a child of its own; it writes both ids."""


@pytest.fixture
def anyio_backend():
    return "asyncio"


def launched(*argv: str, **options) -> subprocess.CompletedProcess:
    command, args = launch_command(argv[0], argv[1:])
    return subprocess.run([command, *args], capture_output=True, start_new_session=True, check=False, **options)


def start(*argv: str) -> subprocess.Popen:
    command, args = launch_command(argv[0], argv[1:])
    return subprocess.Popen([command, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", -15), ("kill -KILL $$", -9)])
def test_the_launcher_ends_as_its_command_did(script, status):
    assert launched("sh", "-c", script).returncode == status


@pytest.mark.parametrize(("script", "status"), [("exit 7", 7), ("echo words >&2; kill -KILL $$", -9), ("no-such-command", 127)])
def test_the_launcher_tells_how_its_command_ended_where_it_is_asked_to(script, status):
    command, args = launch_command("sh", ["-c", script], tell=True)
    result = subprocess.run([command, *args], capture_output=True, text=True, start_new_session=True, check=False)
    assert result.returncode == status
    *_, last = result.stderr.splitlines()
    assert os.waitstatus_to_exitcode(int(last.removeprefix("\x01ended "))) == status


def test_streams_arrive_byte_by_byte_as_they_are():
    data = bytes(range(256)) * 4096
    result = launched("sh", "-c", "cat; echo done >&2", input=data)
    assert result.stdout == data
    assert result.stderr == b"done\n"


def test_a_command_that_does_not_exist_is_127_and_one_line():
    result = launched("no-such-command")
    assert (result.returncode, result.stderr) == (127, b"cannot start 'no-such-command': No such file or directory\n")


def test_the_launcher_does_not_see_the_types_of_this_package():
    shadowing = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "art_mcp")}
    assert launched("sh", "-c", "exit 7", env=shadowing).returncode == 7


def test_nothing_is_started_for_a_parent_that_is_gone_already(tmp_path):
    command, args = launch_command("touch", [str(tmp_path / "made")])
    args[args.index(str(os.getpid()))] = "1"
    assert subprocess.run([command, *args], check=False).returncode == 0
    assert not (tmp_path / "made").exists()


def test_the_command_is_in_a_group_of_its_own_with_default_signals():
    report = "import os, signal; print(os.getpgid(0) == os.getpid(), os.getpgid(0) == os.getpgid(os.getppid()))"
    result = launched(sys.executable, "-c", f"{report}; print(signal.pthread_sigmask(signal.SIG_BLOCK, []))")
    assert result.stdout == b"False False\nset()\n"


def test_what_the_command_leaves_behind_goes_with_it():
    result = launched("sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $!")
    assert ended(int(result.stdout))


def test_sigterm_is_forwarded_and_the_command_may_clean_up():
    with start("sh", "-c", "trap 'echo bye; exit 5' TERM; echo ready; while :; do sleep 0.05; done") as process:
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        assert process.stdout.read() == b"bye\n"
    assert process.returncode == 5


def test_sigkill_of_the_launcher_ends_the_whole_group():
    with start("sh", "-c", FAMILY) as process:
        family = [int(pid) for pid in process.stdout.readline().split()]
        assert all(runs(psutil.Process(pid)) for pid in family)
        process.kill()
    assert ended(*family)


def test_sigkill_of_the_parent_ends_the_whole_group_though_it_ignores_sigterm():
    program = f"""
import subprocess
from art_mcp.child import launch_command
command, args = launch_command("sh", ["-c", {FAMILY!r}])
subprocess.run([command, *args], start_new_session=True)
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE) as parent:
        family = [int(pid) for pid in parent.stdout.readline().split()]
        assert all(runs(psutil.Process(pid)) for pid in family)
        parent.kill()
        assert ended(*family)


@pytest.mark.anyio
async def test_an_open_child_talks_in_bytes_and_ends_with_its_block():
    async with open_child(["cat"]) as process:
        await process.stdin.send(b"\x00\xff")
        assert await process.stdout.receive() == b"\x00\xff"
    assert process.returncode == -signal.SIGTERM


@pytest.mark.anyio
async def test_an_open_child_that_ignores_sigterm_is_killed_with_its_group():
    async with open_child(["sh", "-c", FAMILY], grace=0.1) as process:
        family = [int(pid) for pid in (await process.stdout.receive()).split()]
    assert process.returncode == -signal.SIGKILL
    assert ended(*family)


@pytest.mark.anyio
async def test_an_open_child_ends_when_its_block_is_cancelled():
    with anyio.move_on_after(60) as scope:
        async with open_child(["sleep", "1000"]) as process:
            scope.cancel()
            await anyio.sleep_forever()
    assert process.returncode == -signal.SIGTERM


@pytest.mark.anyio
async def test_an_open_child_that_has_ended_by_itself_is_no_trouble():
    async with open_child(["sh", "-c", "exit 3"]) as process:
        assert await process.wait() == 3
