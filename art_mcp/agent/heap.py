"""Keeps Python's garbage collector from stopping rollouts: while a run trains it leaves alone what was there before, and looks
at all the rest between two steps."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock

IMMORTAL = 1000
"""Python 3.12 counts some 375 objects of its own among the frozen ones, though nobody froze any."""
FULL_AFTER = 1000
"""After so many collections of younger objects comes one of all, where nobody asked for one before: some ten million objects
more, which is more than a step makes."""


@dataclass(slots=True)
class Blocks:
    """Those of this process that are open: the first freezes, the last lets go."""

    count: int = 0
    thresholds: tuple[int, int, int] = (0, 0, 0)
    lock: Lock = field(default_factory=Lock)

    def enter(self) -> bool:
        """Whether this block counts: not where the process froze objects itself, which are its own to let go."""
        with self.lock:
            if not self.count and gc.get_freeze_count() > IMMORTAL:
                return False
            if not self.count:
                gc.freeze()
                self.thresholds = gc.get_threshold()
                youngest, young, full = self.thresholds
                gc.set_threshold(youngest, young, max(full, FULL_AFTER))
            self.count += 1
        return True

    def leave(self) -> None:
        with self.lock:
            self.count -= 1
            if not self.count:
                gc.unfreeze()
                gc.set_threshold(*self.thresholds)


OPEN = Blocks()


@contextmanager
def collections_between_steps() -> Generator[None]:
    """While the block runs, no collection looks at objects that are older than it (`gc.freeze`), and all of the younger ones
    are looked at when `collect` is called, between two steps: hardly ever else.

    torch, a tokenizer and a model are some 400,000 objects; a full collection, for which a step's rollouts are reason enough,
    looked at each and stopped all rollouts for 0.25 s, now for 0.01 s. A step of a thousand rollouts leaves as many again:
    five times in each, rollouts stopped for 0.1 s, for a few hundred objects of garbage; now once. Cycles that were
    garbage before are collected afterwards. It is for a whole run: each block sets the collector's counts back, so that after
    many short ones nothing would ever be collected. Blocks may overlap, in other threads too. A process that froze objects
    itself before is left as it is.
    """
    counts = OPEN.enter()
    try:
        yield
    finally:
        if counts:
            OPEN.leave()


def collect() -> None:
    """A full collection now, inside such a block; elsewhere, and in a process that collects nothing, none."""
    if OPEN.count and gc.isenabled():
        gc.collect()
