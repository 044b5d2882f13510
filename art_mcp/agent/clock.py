"""The time that one rollout may take: it stands still while the rollout waits for an engine that is not ready."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
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
        self._waiting = 0
        self.failure: EngineError | None = None
        """The last that `ready` raised."""
        self.limit = anyio.CancelScope(deadline=self._began + seconds)

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return (self._stopped if self._waiting else anyio.current_time()) - self._began - self._stood

    async def ready(self) -> None:
        """Waits for the engine; the clock stands still until all that wait have it. Raises what `ready` raises."""
        if not self._waiting:
            self._stopped = anyio.current_time()
            self._left = self.limit.deadline - self._stopped
            self.limit.deadline = inf
        self._waiting += 1
        try:
            await self._ready()
        except EngineError as error:
            self.failure = error
            raise
        finally:
            self._waiting -= 1
            if not self._waiting:
                now = anyio.current_time()
                self._stood += now - self._stopped
                self.limit.deadline = now + self._left
