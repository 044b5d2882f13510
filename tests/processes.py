"""Which processes are still there; what they are and who ends them is not here."""

from collections.abc import Iterable
from time import monotonic

import psutil

WITHIN = 60.0
"""Seconds that what was killed may take to be gone: a kill is an order, and its execution needs the processor too."""


def remaining(processes: Iterable[psutil.Process], *, within: float = WITHIN) -> list[psutil.Process]:
    """Those that still run after so many seconds; returns at once when none does. A zombie has ended: whoever inherited it may
    never ask how."""
    deadline = monotonic() + within
    running = list(filter(runs, processes))
    while running and monotonic() < deadline:
        psutil.wait_procs(running, timeout=0.05)
        running = list(filter(runs, running))
    return running


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ended(*pids: int) -> bool:
    """Whether all of these are gone within WITHIN seconds."""
    return remaining([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]) == []


def commands(processes: Iterable[psutil.Process]) -> list[tuple[psutil.Process, list[str]]]:
    """Each with its command line, but for those that end while one looks."""
    found = []
    for process in processes:
        try:
            found.append((process, process.cmdline()))
        except psutil.NoSuchProcess:
            continue
    return found
