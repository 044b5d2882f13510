"""The time that one rollout may take: it stands still while the rollout waits for an engine, or is held with all others."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import TypeAlias

import anyio

from art_mcp.errors import EngineError

Ready: TypeAlias = Callable[[], Awaitable[None]]
"""Returns when the policy can be sampled from, such as `TrainableModel.ready`."""


async def at_once() -> None:
    """For an engine that is always ready."""


class Clock:
    """Runs from when it is made; after `seconds` the block `with clock.limit` is cancelled."""

    def __init__(self, seconds: float, ready: Ready = at_once) -> None:
        self._ready = ready
        self._began = anyio.current_time()
        self._stood = self._stopped = 0.0
        self._left = seconds
        self._stops = 0
        self.failure: EngineError | None = None
        """The last that `ready` raised."""
        self.limit = anyio.CancelScope(deadline=self._began + seconds)

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return (self._stopped if self._stops else anyio.current_time()) - self._began - self._stood

    def stop(self) -> None:
        """It stands still until each that stopped it has let it go on."""
        if not self._stops:
            self._stopped = anyio.current_time()
            self._left = self.limit.deadline - self._stopped
            self.limit.deadline = inf
        self._stops += 1

    def go_on(self) -> None:
        self._stops -= 1
        if not self._stops:
            now = anyio.current_time()
            self._stood += now - self._stopped
            self.limit.deadline = now + self._left

    async def ready(self) -> None:
        """Waits for the engine; the clock stands still until all that wait have it. Raises what `ready` raises."""
        self.stop()
        try:
            await self._ready()
        except EngineError as error:
            self.failure = error
            raise
        finally:
            self.go_on()


@dataclass(slots=True)
class Clocks:
    """Those of a run's rollouts, which can be held all at once."""

    running: set[Clock] = field(default_factory=set[Clock])
    holding: bool = False

    @contextmanager
    def limit(self, clock: Clock) -> Generator[None]:
        """Cancels the block when `clock` has run out."""
        with clock.limit:
            self.running.add(clock)
            if self.holding:
                clock.stop()
            try:
                yield
            finally:
                self.running.discard(clock)

    @contextmanager
    def held(self) -> Generator[None]:
        """No clock runs within the block."""
        self.holding = True
        for clock in self.running:
            clock.stop()
        try:
            yield
        finally:
            self.holding = False
            for clock in self.running:
                clock.go_on()
