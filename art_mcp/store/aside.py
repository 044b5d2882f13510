"""Folders that take the place of others whole, and what makes good a kill in the middle of it. What is in them is not known."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from art_mcp.errors import RunError, boundary

AWAY = re.compile(r"\.(.+)\.\d+\.old\.tmp")
"""The name of a folder on its way out: whole, and the only one where its successor has not taken its place yet."""


def replace_folder(aside: Path, folder: Path) -> None:
    """`aside`, which is beside `folder`, takes its name; what had the name is removed. Two renames, because no portable call
    replaces a folder that is not empty: killed in between, the old one has another name until `put_back`."""
    away = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
    if folder.exists():
        folder.rename(away)
    aside.rename(folder)
    if away.exists():
        away.rename(aside)  # half removed, it must not be called what `put_back` takes for whole
        shutil.rmtree(aside)


def put_back(parent: Path, name: str | None = None) -> None:
    """Gives the folder `name` in `parent`, or every one, its name again where a kill left it without. Raises RunError."""
    for away in sorted(parent.glob(".*.old.tmp")):
        match = AWAY.fullmatch(away.name)
        if match and name in (None, match[1]) and not (parent / match[1]).exists():
            with boundary(RunError, f"putting {parent / match[1]} back in its place"):
                away.rename(parent / match[1])
