"""The batches of a training loop: one step's at a time, or the next steps' beside it. What is learned from them is `loop`'s
business.

The latter is off-policy training of bounded staleness with partial rollouts (verl's one_step_off_policy; AReaL,
arXiv:2505.24298): nothing waits for the longest conversation of a batch, and the engine does not wait for the training of one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import TypeAlias

import anyio
from anyio.abc import TaskGroup

from art_mcp.agent.group import first_failure
from art_mcp.agent.places import Places
from art_mcp.errors import EngineError
from art_mcp.types import TrajectoryGroup

Gather: TypeAlias = Callable[[int, Places], Awaitable[Sequence[TrajectoryGroup]]]
"""Plays all rollouts of a step in these places."""


@dataclass(slots=True)
class Batch:
    """The rollouts of one step on their way, `left` of which have no place yet; none: `begun`. Its `scope` ends them."""

    step: int
    left: int
    groups: Sequence[TrajectoryGroup] = ()
    began: float = 0.0
    over: float = 0.0
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    begun: anyio.Event = field(default_factory=anyio.Event)
    ended: anyio.Event = field(default_factory=anyio.Event)

    def begin_one(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.begun.set()


@dataclass(frozen=True, slots=True)
class Played:
    """The groups of a step; the seconds from the beginning of its first rollout to the end of its last; and how many of them
    the loop waited."""

    groups: Sequence[TrajectoryGroup]
    seconds: float
    waited: float


@dataclass(slots=True)
class Rounds:
    """Plays the steps of a loop, each of so many `rollouts`; one that lost its engine is played once more.

    The rollouts of step s begin when those of step s - 1 have all begun, and not before `play` was asked for step s - `ahead`,
    which is when the step before that is trained and published. So what is sampled for step s is sampled under the policy of
    step s - `ahead` or a later one: when it is trained, no token is older than `ahead` steps. All share `places`. What is ahead
    is cancelled `until` that time of anyio's clock; nothing is ahead of the last of `steps`.
    """

    tasks: TaskGroup
    gather: Gather
    places: Places
    rollouts: int
    ahead: int
    steps: int | None
    until: float
    _coming: deque[Batch] = field(default_factory=deque[Batch])

    async def play(self, step: int) -> Played:
        """The groups of `step`, each one more than the last. The next steps' are played on when this returns."""
        asked = monotonic()
        batch = await self._take(step)
        began, groups = batch.began, batch.groups
        if lost_engine(groups):
            # another engine answers by now, or there is none to be had; what was ahead was sampled by the one that is lost
            await self._drop()
            batch = await self._take(step)
            groups = [add_failures(group, lost) for group, lost in zip(batch.groups, groups, strict=True)]
        return Played(groups, batch.over - began, monotonic() - asked)

    async def _take(self, step: int) -> Batch:
        """The batch of `step`, played; from now on the next ones are ahead."""
        if self._coming and self._coming[0].scope.cancel_called:
            self._coming.clear()  # all end at the same time
        batch = self._coming.popleft() if self._coming else self._begin(step)
        batch.scope.deadline = math.inf
        last = self._coming[-1] if self._coming else batch
        while len(self._coming) < self.ahead and (self.steps is None or last.step + 1 < self.steps):
            last = self._begin(last.step + 1, after=last)
            self._coming.append(last)
        await batch.ended.wait()
        return batch

    def _begin(self, step: int, *, after: Batch | None = None) -> Batch:
        batch = Batch(step, self.rollouts)
        if after is not None:
            batch.scope.deadline = self.until
        self.tasks.start_soon(self._play, batch, after)
        return batch

    async def _play(self, batch: Batch, after: Batch | None) -> None:
        with batch.scope:
            if after is not None:
                await after.begun.wait()
                await anyio.lowlevel.checkpoint_if_cancelled()  # which waiting for what is there is not
            batch.began = monotonic()
            batch.groups = await self.gather(batch.step, self.places.told(batch.begin_one))
        batch.over = monotonic()
        batch.begun.set()
        batch.ended.set()

    async def _drop(self) -> None:
        """Cancels what is ahead."""
        for batch in self._coming:
            batch.scope.cancel()
        for batch in self._coming:
            await batch.ended.wait()


@asynccontextmanager
async def open_rounds(
    gather: Gather, *, places: Places, rollouts: int, ahead: int, steps: int | None = None, until: float = math.inf
) -> AsyncGenerator[Rounds]:
    """What is still played when the block ends is cancelled. What `gather` raises ends the block and is raised, the first
    failure as it is."""
    with first_failure():
        async with anyio.create_task_group() as tasks:
            yield Rounds(tasks, gather, places, rollouts, ahead, steps, until)
            tasks.cancel_scope.cancel()


def lost_engine(groups: Sequence[TrajectoryGroup]) -> bool:
    """Whether no rollout of the batch is left, and the engine's death took some of them."""
    kinds = {failure.kind for group in groups for failure in group.failures}
    return EngineError.__name__ in kinds and not any(group.trajectories for group in groups)


def add_failures(group: TrajectoryGroup, lost: TrajectoryGroup) -> TrajectoryGroup:
    """A group that was played once more, with what became of its first attempt."""
    return replace(group, failures=(*lost.failures, *group.failures))


def staleness(groups: Sequence[TrajectoryGroup], step: int) -> float:
    """How many steps the policies that sampled the groups' tokens are behind that of `step`, which is trained on them: the
    mean over the tokens."""
    spans = [span for group in groups for scored in group.trajectories for span in scored.trajectory.spans]
    known = [(span.policy_version, len(span.token_ids)) for span in spans if span.policy_version is not None]
    tokens = sum(count for _, count in known)
    return sum((step - version) * count for version, count in known) / tokens if tokens else 0.0
