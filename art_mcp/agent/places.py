"""Places for rollouts in flight, which several batches may share: how many there are, how well they are used, and time limits
that can be held."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from time import monotonic

import anyio


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


@dataclass(slots=True)
class Clocks:
    """Time limits, and what is left of them while they are held (None: they run)."""

    running: set[anyio.CancelScope] = field(default_factory=set[anyio.CancelScope])
    left: dict[anyio.CancelScope, float] | None = None

    @contextmanager
    def limit(self, seconds: float) -> Generator[anyio.CancelScope]:
        """Cancels the block after so many seconds that were not held."""
        with anyio.CancelScope() as scope:
            self.running.add(scope)
            self._set(scope, seconds)
            try:
                yield scope
            finally:
                self.running.discard(scope)

    @contextmanager
    def held(self) -> Generator[None]:
        """No time limit runs within the block."""
        now = anyio.current_time()
        self.left = {}
        for scope in self.running:
            self._set(scope, scope.deadline - now)
        try:
            yield
        finally:
            left, self.left = self.left, None
            for scope in self.running:
                self._set(scope, left[scope])

    def _set(self, scope: anyio.CancelScope, seconds: float) -> None:
        if self.left is None:
            scope.deadline = anyio.current_time() + seconds
        else:
            self.left[scope], scope.deadline = seconds, math.inf


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
