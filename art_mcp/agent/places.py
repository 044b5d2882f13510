"""Places for rollouts in flight, which several batches may share: how many there are, how well they are used, and the clocks
of those who have one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from time import monotonic

import anyio

from art_mcp.agent.clock import Clocks


@dataclass(slots=True)
class Meter:
    """How many rollouts are in flight, and what that was over time."""

    flying: int = 0
    began: float = field(default_factory=monotonic)
    since: float = field(default_factory=monotonic)
    flown: float = 0.0
    idle: float = 0.0

    def count(self, change: int) -> None:
        now = monotonic()
        self.flown += self.flying * (now - self.since)
        self.idle += 0.0 if self.flying else now - self.since
        self.flying, self.since = self.flying + change, now

    def lap(self, places: float) -> dict[str, float]:
        """Since the last lap: the seconds in which nothing was in flight; and those in which a place was free, the mean over so
        many places."""
        self.count(0)
        free = max(0.0, self.since - self.began - self.flown / places)
        found = {"seconds_idle": self.idle, "seconds_free": free}
        self.began, self.flown, self.idle = self.since, 0.0, 0.0
        return found


def nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Places:
    """As many rollouts at a time as `limiter` has tokens, in the order in which they ask; `begins` is told of each that has
    got its place."""

    limiter: anyio.CapacityLimiter
    meter: Meter = field(default_factory=Meter)
    clocks: Clocks = field(default_factory=Clocks)
    begins: Callable[[], None] = nothing

    @asynccontextmanager
    async def take(self) -> AsyncGenerator[None]:
        """A place, for as long as the block lasts."""
        async with self.limiter:
            self.meter.count(1)
            try:
                self.begins()
                yield
            finally:
                self.meter.count(-1)

    def lap(self) -> dict[str, float]:
        """How well they were used since the last lap, as `Meter.lap` tells it."""
        return self.meter.lap(self.limiter.total_tokens)

    def told(self, begins: Callable[[], None]) -> Places:
        """The same places for a batch whose beginnings `begins` is told of."""
        return replace(self, begins=begins)


def places_of(concurrency: int | Places) -> Places:
    """So many places for one batch, unless they are places already."""
    return concurrency if isinstance(concurrency, Places) else Places(anyio.CapacityLimiter(concurrency))
