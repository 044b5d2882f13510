"""The clock, the file of results and the test of pairs that the GPU measurements share; nothing is played here."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import anyio

from art_mcp.types import TrajectoryGroup

RECORDED = ("torch", "transformers", "peft", "trl", "unsloth", "unsloth_zoo", "vllm", "bitsandbytes", "mcp", "numpy")


class Clock:
    """Seconds since the program began, of `deadline` that it may take; says on stderr what happens when."""

    def __init__(self, deadline: float) -> None:
        self._began, self.deadline = time.monotonic(), deadline

    def spent(self) -> float:
        return time.monotonic() - self._began

    def left(self, *, reserve: float = 0.0) -> float:
        return self.deadline - reserve - self.spent()

    def say(self, text: str) -> None:
        print(f"[{self.spent():6.1f} s] {text}", file=sys.stderr, flush=True)


class Report:
    """A JSON file that is whole at every moment, with all that was measured so far."""

    def __init__(self, path: Path, **begin: Any) -> None:
        self._path = path
        self.values: dict[str, Any] = begin
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, **values: Any) -> None:
        self.values |= values
        aside = self._path.with_suffix(".tmp")
        aside.write_text(json.dumps(self.values, indent=1, default=str) + "\n")
        aside.replace(self._path)


@dataclass(slots=True)
class Curve:
    """A Recorder in memory: a row for each step, short enough for a file of results."""

    clock: Clock
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def groups(self, step: int, groups: Sequence[TrajectoryGroup]) -> None:
        pass

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        self.rows.append({"step": step, **{name: rounded(value) for name, value in values.items()}})
        shown = [
            f"{name} {self.rows[-1][name]}" for name in ("loss", "reward", "solved_with", "solved_without") if name in values
        ]
        self.clock.say(f"step {step}: {'  '.join(shown)}")


def rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def mcnemar(before: dict[str, str], after: dict[str, str], *, levels: Sequence[int]) -> dict[str, Any]:
    """The exact paired test (McNemar 1947): two-sided binomial over the questions that only one of both solved."""
    pairs = [pair for level in levels for pair in zip(before.get(str(level), ""), after.get(str(level), ""), strict=False)]
    gained, lost = pairs.count(("0", "1")), pairs.count(("1", "0"))
    some = gained + lost
    tail = sum(math.comb(some, k) for k in range(min(gained, lost) + 1)) / 2**some if some else 1.0
    both = [pair for pair in pairs if "." not in pair]
    share = (sum(b == "1" for b, _ in both) / max(1, len(both)), sum(a == "1" for _, a in both) / max(1, len(both)))
    return {"pairs": len(both), "before": share[0], "after": share[1], "gained": gained, "lost": lost, "p": min(1.0, 2 * tail)}


def describe_run(arguments: dict[str, Any]) -> dict[str, Any]:
    """When, with what, on what."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", "benchmarks." + Path(sys.argv[0]).stem, *sys.argv[1:]]),
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()},
        "versions": {"python": platform.python_version(), **{name: installed(name) for name in RECORDED}},
        "gpu": gpu_name(),
        "host": platform.platform(),
    }


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def gpu_name() -> str | None:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class Delays:
    """How late this process' event loop was: a task that asks for a moment and gets a later one. A client that computes for
    long in one piece, or has more to do than one process can, delays whatever else it does."""

    EVERY = 0.01

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque(maxlen=4096)

    async def watch(self) -> None:
        while True:
            asked = time.monotonic() + self.EVERY
            await anyio.sleep(self.EVERY)
            now = time.monotonic()
            self._seen.append((now, now - asked))

    def worst(self, seconds: float) -> float:
        """The longest delay, in seconds, of those that ended within the last `seconds`."""
        since = time.monotonic() - seconds
        return max((late for at, late in self._seen if at >= since), default=0.0)
