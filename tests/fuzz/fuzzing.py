"""How much is tried, what one example may cost, and how well-formed text is spoiled. What is tried, and what must hold of it,
is in the tests."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "300"))
"""Examples for each of parser, evaluator and config loader; `make fuzz` asks for many more than the plain tests."""
PART = 2500
"""Examples of one test: a line of progress for each, and hypothesis keeps all examples of a test in memory."""
CPU_SECONDS = 5.0
"""Of this process, for one example: the costliest that is tried needs a tenth of it, and what hangs never ends."""
SECONDS = 600
"""For a part of a test. A hundred times what it needs on a quiet machine: it must not fail where others compute too."""
LONGEST = 200_000
"""Characters of a spoiled text."""

MANNERS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]

Edit = tuple[str, int, str]


class Hang(AssertionError):
    """An example took more work than any input should."""


def fuzz(share: float, **strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a test on `share` of all examples, in parts, each example within CPU_SECONDS."""
    count = max(1, round(EXAMPLES * share))
    parts = -(-count // PART)
    tried = settings(max_examples=-(-count // parts), deadline=None, suppress_health_check=MANNERS)
    parted = pytest.mark.parametrize("part", range(1, parts + 1), indirect=True)

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        run: Any = given(**strategies)(test)
        run.hypothesis.inner_test = limited(run.hypothesis.inner_test)
        return pytest.mark.timeout(SECONDS)(pytest.mark.usefixtures("part")(parted(tried(run))))

    return decorate


def limited(test: Callable[..., None], seconds: float = CPU_SECONDS) -> Callable[..., None]:
    """The test, ended by Hang once this process has computed for `seconds` in it; waiting does not count."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {seconds:g} seconds of computing")

    @wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        before = signal.signal(signal.SIGVTALRM, end)
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        try:
            test(*arguments, **named)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)

    return run


def edits(pieces: Iterable[str], most: int = 4) -> st.SearchStrategy[list[Edit]]:
    """Changes to make to a text; what is put in is one of `pieces`, or any text."""
    piece = st.sampled_from(list(pieces)) | st.text(max_size=4)
    return st.lists(st.tuples(st.sampled_from(list(EDITS)), st.integers(0, 2**20), piece), max_size=most)


def spoil(text: str, changes: Sequence[Edit], tokens: re.Pattern[str]) -> str:
    """`text` with the changes made, each at one of its `tokens` (what the pattern does not match stays where it is)."""
    for kind, place, piece in changes:
        parts = [part for part in tokens.split(text) if part]
        at = place % (len(parts) + 1)
        parts[at : at + 2] = EDITS[kind](parts[at : at + 2], piece, place)
        text = "".join(parts)[:LONGEST]
    return text


EDITS: dict[str, Callable[[list[str], str, int], list[str]]] = {
    "delete": lambda near, piece, place: near[1:],
    "double": lambda near, piece, place: [*near[:1], *near],
    "insert": lambda near, piece, place: [piece, *near],
    "replace": lambda near, piece, place: [piece, *near[1:]],
    "swap": lambda near, piece, place: near[::-1],
    "repeat": lambda near, piece, place: [*near[:1] * min(place % 10_007, 1 + 20_000 // len("".join(near[:1]) or "x")), *near],
}


def well_encoded(text: str) -> bool:
    """Whether a terminal or a file takes `text`, as one line."""
    return text.encode("utf-8", "replace").decode() == text and len(text.splitlines()) == 1
