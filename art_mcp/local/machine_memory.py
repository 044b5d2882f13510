"""How much memory this process may use: the machine's, and the limits of the control groups that it is in."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

LIMITS = {"cgroup2": "memory.max", "cgroup": "memory.limit_in_bytes"}
"""The file with a group's limit, in version 2 and version 1 (Linux, Documentation/admin-guide: cgroup-v2, cgroup-v1/memory)."""
BEST_EFFORT = 1 << 60
"""From here on version 1 means that there is no limit."""


@dataclass(frozen=True, slots=True)
class Memory:
    """In bytes; `limit` is the container's, None where there is none."""

    total: int
    available: int
    limit: int | None

    @property
    def usable(self) -> int:
        return self.available if self.limit is None else min(self.available, self.limit)


def read_memory(proc: Path = Path("/proc")) -> Memory:
    """Of this machine, as the kernel says; where there is no /proc, as POSIX does, which knows nothing of what is available."""
    meminfo = proc / "meminfo"
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        total, available = (int(lines[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
        limit = min((limit for path in limit_files(proc) if (limit := read_limit(path)) is not None), default=total)
        return Memory(total, available, limit if limit < total else None)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Memory(total, total, None)


def limit_files(proc: Path) -> Iterator[Path]:
    """Where the limits of this process's groups are, from its own up to the topmost that is mounted here: all of them count."""
    groups = {"cgroup2" if not names else "cgroup": path for names, path in memory_groups(proc)}
    for kind, root, mounted in memory_mounts(proc):
        if kind in groups:
            own = PurePosixPath(groups[kind])
            # a container without a namespace for its groups sees the host's paths, and has its own group alone mounted
            below = own.relative_to(root) if own.is_relative_to(root) and ".." not in own.parts else PurePosixPath()
            yield from (mounted / folder / LIMITS[kind] for folder in (below, *below.parents))


def memory_groups(proc: Path) -> Iterator[tuple[str, str]]:
    """Lines such as "0::/a" (version 2) and "4:cpu,memory:/a" (version 1), as (controllers, path)."""
    for line in lines_of(proc / "self" / "cgroup"):
        _, names, path = line.split(":", 2)
        if not names or "memory" in names.split(","):
            yield names, path


def memory_mounts(proc: Path) -> Iterator[tuple[str, str, Path]]:
    """The kind, the root within its hierarchy, and the place of each mount of groups (proc(5), mountinfo)."""
    for line in lines_of(proc / "self" / "mountinfo"):
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
            root, place = (re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), part) for part in before.split(" ")[3:5])
            yield kind, root, Path(place)


def lines_of(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # no control groups here
        return []


def read_limit(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:  # the topmost group of version 2 has none
        return None
    return int(text) if text.isdigit() and int(text) < BEST_EFFORT else None
