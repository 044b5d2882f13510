"""How every child process is started, so that none outlives us; what the children do is not here.

Run by path as a script, this file is the launcher: `python -I -S child.py PARENT_PID [--tell] COMMAND ARG…`. It needs nothing
but the standard library, and `-I` keeps this folder, whose types.py would shadow the standard one, off sys.path.

    parent ──► launcher ──► command      in the process group that the guard leads
                   └──────► guard        reads a pipe whose only writer is the launcher

- The command ends: the launcher ends what is left of its group and exits as the command did.
- The launcher ends, even by SIGKILL: the guard reads the end of its pipe and kills the group.
- The parent ends, even by SIGKILL: the launcher, which looks twice a second, gets another parent id, sends the group
  SIGTERM and, two seconds later, SIGKILL.
- SIGTERM, SIGINT and SIGHUP are forwarded to the group. Whoever sends them decides when patience ends, by SIGKILL.

As the guard leads the group and dies only with it, the group's id cannot pass to somebody else's processes meanwhile. A
command that makes a session of its own leaves the group, and with it this protection.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from anyio.abc import Process

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRACE_SECONDS = 2.0
POLL_SECONDS = 0.5
CANNOT_START = 127
TELL, TOLD = "--tell", "\x01ended "


def launch_command(command: str, args: Sequence[str] = (), *, tell: bool = False) -> tuple[str, list[str]]:
    """The command and arguments that start `command args…` under the launcher, as a child of this very process. With `tell`,
    the last line on stderr says how the command ended: TOLD and a status as `os.waitpid` gives it."""
    telling = [TELL] if tell else []
    return sys.executable, ["-I", "-S", os.path.abspath(__file__), str(os.getpid()), *telling, command, *args]


@asynccontextmanager
async def open_child(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    stderr: int | IO[bytes] | None = None,
    grace: float = 5.0,
) -> AsyncGenerator[Process]:
    """A child with binary stdin and stdout pipes; when the block ends, however it ends, so does the child's whole group.

    On leaving: SIGTERM, `grace` seconds, SIGKILL. `env` None inherits ours; `stderr` None is ours. A command that cannot be
    started makes a child that exits with 127 after one line on stderr.
    """
    import anyio

    command, args = launch_command(argv[0], argv[1:])
    process = await anyio.open_process([command, *args], env=env, cwd=cwd, stderr=stderr, start_new_session=True)
    try:
        yield process
    finally:
        with anyio.CancelScope(shield=True):
            await end_child(process, grace)


async def end_child(process: Process, grace: float) -> None:
    """SIGTERM, at most `grace` seconds for the child to go, SIGKILL; then its pipes are closed."""
    import anyio

    with suppress(ProcessLookupError):
        process.terminate()
    with anyio.move_on_after(grace):
        await process.wait()
    with suppress(ProcessLookupError):
        process.kill()
    await process.aclose()


def main(parent: int, argv: list[str]) -> int:
    """The launcher: runs `argv` until it or `parent` ends. Returns a status as `os.waitpid` gives it."""
    telling = os.dup(2) if argv[0] == TELL else None
    status = launch(parent, argv if telling is None else argv[1:])
    if telling is not None:
        with suppress(OSError):  # a full disk; then nobody learns how it ended
            os.write(telling, f"\n{TOLD}{status}\n".encode())
    return status


def launch(parent: int, argv: list[str]) -> int:
    unmasked = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    guard = start_guard()
    signals = catch_signals()
    signal.pthread_sigmask(signal.SIG_SETMASK, unmasked)
    try:
        if os.getppid() != parent:
            return 0
        try:
            # Python ignores these two, and an ignored signal stays ignored in what it starts.
            defaults = (signal.SIGPIPE, signal.SIGXFSZ)
            child = os.posix_spawnp(argv[0], argv, os.environ, setpgroup=guard, setsigdef=defaults)
        except OSError as error:
            os.write(2, f"cannot start {argv[0]!r}: {error.strerror}\n".encode())
            return CANNOT_START << 8
        release_streams()
        return supervise(child, guard, parent=parent, signals=signals)
    finally:
        signal_group(guard, signal.SIGKILL)


def start_guard() -> int:
    """Forks the guard and makes it the leader of a new group. It inherits the blocked signals, so forwarding spares it."""
    reader, writer = os.pipe()
    guard = os.fork()
    if guard == 0:
        os.close(writer)
        os.setpgid(0, 0)
        release_streams()
        os.read(reader, 1)
        os.killpg(0, signal.SIGKILL)
    os.close(reader)
    os.setpgid(guard, guard)  # both sides do it, for neither knows who comes first
    return guard


def release_streams() -> None:
    """Lets go of stdin, stdout and stderr: the pipes end with the command, not with those who watch it."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)


def catch_signals() -> int:
    """A descriptor that gives the numbers of arriving signals, one a byte."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (*FORWARDED, signal.SIGCHLD):
        signal.signal(number, note)
    return reader


def note(number: int, frame: object) -> None:
    """Does nothing: a signal reaches the descriptor only where it has a handler."""


def supervise(child: int, guard: int, *, parent: int, signals: int) -> int:
    """Forwards signals until the child has ended, or until the parent has and the child's grace is over."""
    poll = select.poll()
    poll.register(signals, select.POLLIN)
    deadline: float | None = None
    while deadline is None or monotonic() < deadline:
        if poll.poll(POLL_SECONDS * 1000):
            status = forward(signals, child, guard)
            if status is not None:
                return status
        if deadline is None and os.getppid() != parent:
            signal_group(guard, signal.SIGTERM)
            deadline = monotonic() + GRACE_SECONDS
    return 0


def forward(signals: int, child: int, guard: int) -> int | None:
    """Passes on what has arrived; the child's status once it has ended."""
    arrived = os.read(signals, 512)
    for number in FORWARDED:
        if number in arrived:
            signal_group(guard, number)
    pid, status = os.waitpid(child, os.WNOHANG)
    return status if pid else None


def signal_group(group: int, number: int) -> None:
    # EPERM: macOS answers so when only zombies are left.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def module_command(module: str) -> tuple[list[str], dict[str, str]]:
    """The command that runs a module in a Python as ours, and what its environment needs for that: all of our sys.path. (-P: a
    file of the working folder is not to be taken for a library.)"""
    return [sys.executable, "-P", "-m", module], {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def ending(code: int) -> str:
    """How a process ended, by its return code as `subprocess` gives it."""
    return f"exit code {code}" if code >= 0 else f"killed by {signal_name(-code)}"


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has none
        return f"signal {number}"


def leave_as(status: int) -> None:
    """Ends this process as one with this wait status ended: with its exit code, or by the same signal."""
    if os.WIFSIGNALED(status):
        import resource

        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the core that matters is the command's own
        with suppress(OSError):  # SIGKILL takes no handler
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    leave_as(main(int(sys.argv[1]), sys.argv[2:]))
