"""Training runs in processes of their own, to be killed; which process dies when is not here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic

import psutil

from art_mcp.store.run import Run
from tests.processes import remaining

ROOT = Path(__file__).resolve().parents[2]
MAIN = "from art_mcp.cli.main import main; main()"
ENDS_WITHIN = 60.0
"""Seconds after a kill in which everything that belongs to the run must be gone."""


class Command:
    """`art-mcp` as somebody runs it in `folder`, with what it says on stderr in `said`."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, said: Path) -> None:
        self.process, self.folder, self._said = process, folder, said

    @property
    def said(self) -> str:
        return self._said.read_text(errors="replace")

    def until(self, happened: Callable[[], object], *, seconds: float = 120.0) -> None:
        """Returns when it has happened; fails, with what was said, where the command ends before that."""
        deadline = monotonic() + seconds
        while not happened():
            assert monotonic() < deadline, self.said
            with suppress(subprocess.TimeoutExpired):
                raise AssertionError(f"it ended with {self.process.wait(0.003)}: {self.said}")

    def family(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def kill(self, victim: psutil.Process) -> int:
        """kill -9; returns the exit code of the command, after which nothing of it runs any more."""
        family = self.family()
        victim.kill()
        deadline = monotonic() + ENDS_WITHIN
        code = self.process.wait(ENDS_WITHIN)
        assert remaining(family, within=deadline - monotonic()) == []
        return code


@contextmanager
def started(*args: str, folder: Path) -> Iterator[Command]:
    """`art-mcp ARGS` in `folder`; whatever of it still runs when the block ends is killed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environ = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    said = folder / "stderr.txt"
    with said.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", MAIN, *args],
            cwd=folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
    command = Command(process, folder, said)
    try:
        yield command
    finally:
        with suppress(psutil.NoSuchProcess):
            for one in reversed(command.family()):
                with suppress(psutil.NoSuchProcess):
                    one.kill()
        process.wait()


def processor_seconds(processes: Iterable[psutil.Process]) -> float:
    """That they have used so far."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def steps_recorded(run: Run) -> int:
    """How many lines the run's metrics have."""
    path = run.folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
