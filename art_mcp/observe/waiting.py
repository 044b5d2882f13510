"""A line on a terminal while something takes seconds and has no progress of its own to show."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import TextIO


@contextmanager
def waiting(stream: TextIO | None, text: str) -> Generator[None]:
    """Shows `text` on `stream` while the block lasts, where that is a terminal. What others write meanwhile writes over it."""
    terminal = stream if stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb" else None
    if terminal:
        terminal.write(f"{text} …\r")
        terminal.flush()
    try:
        yield
    finally:
        if terminal:
            terminal.write("\x1b[K")
            terminal.flush()
