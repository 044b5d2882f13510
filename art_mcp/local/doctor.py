"""What a doctor says: findings, each a line with what to do. How they are found is in the modules beside this one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

Level: TypeAlias = Literal["ok", "warning", "problem"]

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, slots=True)
class Finding:
    """`about` is what was looked at, one word or two; `remedy` what to do, for all that is not ok. `facts` are for programs."""

    level: Level
    about: str
    text: str
    remedy: str = ""
    facts: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def ok(about: str, text: str, **facts: Any) -> Finding:
    return Finding("ok", about, text, facts=facts or None)


def warning(about: str, text: str, remedy: str, **facts: Any) -> Finding:
    return Finding("warning", about, text, remedy, facts or None)


def problem(about: str, text: str, remedy: str, **facts: Any) -> Finding:
    return Finding("problem", about, text, remedy, facts or None)


def is_sick(findings: Iterable[Finding]) -> bool:
    return any(finding.level == "problem" for finding in findings)


def size(count: float) -> str:
    """A number of bytes for people: "4.5 GiB"."""
    place = 0
    while count >= 1024 and place < len(UNITS) - 1:
        count, place = count / 1024, place + 1
    return f"{count:.{0 if place == 0 or count >= 100 else 1}f} {UNITS[place]}"
