"""How a run ends before its time: its status, what whoever stopped it is told, and a second Ctrl-C or SIGTERM."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import anyio

from art_mcp.errors import RunError
from art_mcp.store.run import Run

STOPPED = "stopped"
STOPPING = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130
"""The exit code that Ctrl-C gives, and SIGTERM where it stops a run as Ctrl-C does."""
CLEAR_LINE = "\r\x1b[2K\x1b[?25h"
"""For a terminal: the progress line goes, and the cursor that it hid comes back."""


@contextmanager
def status_kept(run: Run, stream: Any) -> Generator[None]:
    """Keeps the manifest's status: running, and where it does not end well, failed or stopped; then `stream` is told how the
    run goes on."""
    run.describe({"status": "running"})
    status = "failed"
    try:
        with second_press_ends(run):
            yield
        status = ""
    except (anyio.get_cancelled_exc_class(), KeyboardInterrupt):
        stream.write(f"stopped after {(run.checkpoints() or [0])[-1]} steps; {told_resume(run)}\n")
        status = STOPPED
        raise
    finally:
        if status:
            leave(run, status)


def leave(run: Run, status: str) -> None:
    with suppress(RunError):  # a full disk takes neither this nor what failed before, and that is what must be told
        run.describe({"status": status})


def told_resume(run: Run) -> str:
    return f"to go on: art-mcp train --resume {run.folder}"


@contextmanager
def second_press_ends(run: Run) -> Generator[None]:
    """Within the block, SIGTERM (a container's end, a queue's time limit) stops the run as Ctrl-C does; and after either of
    them, until this process ends, another one ends the process at once."""
    first = signal.getsignal(signal.SIGINT)
    if not callable(first) or threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            end_at_once(run)
        pressed = True
        for one in STOPPING:  # in Python's last second, it would end by the signal
            atexit.register(signal.signal, one, signal.SIG_IGN)
        first(signal.SIGINT, frame)

    before = {one: signal.signal(one, press) for one in STOPPING}
    try:
        yield
    finally:
        if not pressed:
            for one, handler in before.items():
                signal.signal(one, handler)


def end_at_once(run: Run) -> None:
    """Ends this process, after a line that says what is kept. Its children end with it, as `child.py` sees to. Nothing that
    may have been interrupted is used: neither sys.stderr nor the way out through the event loop, whose threads may abort it."""
    for one in STOPPING:
        signal.signal(one, signal.SIG_IGN)
    leave(run, STOPPED)
    steps = run.checkpoints()
    kept = f"the checkpoint of step {steps[-1]} is kept" if steps else "no checkpoint was written yet"
    head = CLEAR_LINE if os.isatty(2) else ""
    os.write(2, f"{head}ended at once, {kept}; {told_resume(run)}\n".encode())
    os._exit(INTERRUPTED)
