"""Where vLLM's processes are while they read an adapter, told by a thread in each of them."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

EVERY = 0.02
"""Seconds between two looks at the threads of an engine process."""
LOOK = """\
import os, sys, threading, time, traceback

def look(path):
    with open(path, "w", buffering=1) as out:
        while True:
            time.sleep({every})
            for frame in sys._current_frames().values():
                frames = [(one.f_code, line) for one, line in traceback.walk_stack(frame)]
                if any(code.co_name == {loading!r} for code, _ in frames):
                    named = [f"{{os.path.basename(code.co_filename)}}:{{line}} {{code.co_name}}" for code, line in frames]
                    print(" < ".join(named[:4]), file=out)

threading.Thread(target=look, args=(os.path.join({folder!r}, f"{{os.getpid()}}.txt"),), daemon=True).start()
"""
LOADING = "add_lora"
"""The function of vLLM within which an engine reads an adapter."""


def look_at_engines(folder: Path) -> None:
    """Every Python process that starts from now on tells in `folder` where it is while it reads an adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.txt"):
        old.unlink()
    (folder / "sitecustomize.py").write_text(LOOK.format(folder=str(folder.resolve()), every=EVERY, loading=LOADING))
    paths = [str(folder.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def seen_loading(folder: Path) -> list[tuple[str, int]]:
    """What engines were seen at while they read an adapter, innermost frame first, and how often."""
    return Counter(line for file in folder.glob("*.txt") for line in file.read_text().splitlines()).most_common(20)
