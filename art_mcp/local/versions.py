"""A folder for weights on their way to an engine; what a process that was killed left there, the next one removes."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from art_mcp.store.lock import take

PREFIX = "art-mcp-versions-"
LOCK = "in-use"


class Versions:
    """A temporary folder that is this process's until `cleanup`, or its death, whichever comes first."""

    def __init__(self) -> None:
        for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            remove_if_left(folder)
        self._folder = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
        self.path = Path(self._folder.name)
        making = self.path / "making"
        self._lock = making.open("w")
        take(self._lock)
        making.rename(self.path / LOCK)  # nobody finds it before it is locked

    def cleanup(self) -> None:
        self._folder.cleanup()
        self._lock.close()


def remove_if_left(folder: Path) -> None:
    """Removes a folder whose process is gone; one of which that is not known, or that is another user's, stays."""
    with suppress(OSError), (folder / LOCK).open("r+") as lock:
        if take(lock):
            shutil.rmtree(folder, ignore_errors=True)
