"""A folder for weights on their way to an engine; what a process that was killed left there, the next one removes."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from art_mcp.store.lock import take

PREFIX = "art-mcp-versions-"
LOCK = "in-use"
MEMORY = Path("/dev/shm")
"""The machine's memory as a folder, where it has one. Of 342 adapters there none took half a second to publish, of 201 in a
temporary folder one did (docs/results/2026-11-28-gpu-sixteenth.md); most of the time is not the folder's."""
ROOM = 4 * 2**30
"""Bytes that must be free in it: many times the few adapters that are there at once. Containers often have 64 MiB."""


class Versions:
    """A temporary folder that is this process's until `cleanup`, or its death, whichever comes first; with `in_memory`, for
    adapters, in the machine's memory where that has room."""

    def __init__(self, *, in_memory: bool = False) -> None:
        for folder in (folder for place in {Path(tempfile.gettempdir()), MEMORY} for folder in place.glob(f"{PREFIX}*")):
            remove_if_left(folder)
        place = MEMORY if in_memory and has_room(MEMORY) else None
        self._folder = tempfile.TemporaryDirectory(prefix=PREFIX, dir=place, ignore_cleanup_errors=True)
        self.path = Path(self._folder.name)
        making = self.path / "making"
        self._lock = making.open("w")
        take(self._lock)
        making.rename(self.path / LOCK)  # nobody finds it before it is locked

    def cleanup(self) -> None:
        self._folder.cleanup()
        self._lock.close()


def has_room(place: Path) -> bool:
    """Whether this user may write there, and as much as adapters may come to."""
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK) and shutil.disk_usage(place).free >= ROOM


def remove_if_left(folder: Path) -> None:
    """Removes a folder whose process is gone; one of which that is not known, or that is another user's, stays."""
    with suppress(OSError), (folder / LOCK).open("r+") as lock:
        if take(lock):
            shutil.rmtree(folder, ignore_errors=True)
