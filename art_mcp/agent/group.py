"""Groups of rollouts under one concurrency limit; the one place where a failed rollout is caught and recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import anyio

from art_mcp.agent.rollout import name_rollout, rollout
from art_mcp.environment import Environment
from art_mcp.errors import RolloutError, members_of
from art_mcp.model import TrainableModel
from art_mcp.ports import Progress, Toolbox
from art_mcp.types import FailedRollout, Scenario, ScoredTrajectory, TrajectoryGroup

Outcome: TypeAlias = ScoredTrajectory | FailedRollout


@dataclass(frozen=True, slots=True)
class Silent:
    """Progress that nobody watches."""

    def finished(self, outcome: Outcome) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Play:
    """What all rollouts of a batch share; `key` is (run seed, step)."""

    model: TrainableModel[Any]
    environment: Environment
    toolbox: Toolbox
    temperature: float
    key: tuple[int, int]

    async def attempt(self, scenario: Scenario, number: int) -> Outcome:
        """One rollout, scored; or what the world did to it."""
        try:
            trajectory = await rollout(
                scenario,
                sampler=self.model.sampler(),
                dialect=self.model.dialect(),
                toolbox=self.toolbox,
                system=self.environment.system,
                limits=self.environment.limits,
                temperature=self.temperature,
                key=self.key,
                number=number,
            )
            return await self.environment.score(trajectory, self.toolbox)
        except RolloutError as error:
            return FailedRollout(name_rollout(self.key, scenario, number), type(error).__name__, str(error))


async def gather_trajectory_groups(
    scenarios: Sequence[Scenario],
    *,
    model: TrainableModel[Any],
    environment: Environment,
    toolbox: Toolbox,
    rollouts: int = 8,
    concurrency: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    step: int | None = None,
    progress: Progress | None = None,
) -> list[TrajectoryGroup]:
    """Plays every scenario `rollouts` times with the model's current policy and scores it: one group a scenario, in order.

    `concurrency` bounds the rollouts in flight over all groups. `step` (default: the model's) and `seed` key every draw; a
    scenario that stands here twice is drawn anew the second time. A rollout that the world broke (RolloutError) becomes a
    FailedRollout of its group and the others go on; anything else is a bug and raises, the first one as it is.
    """
    key = (seed, await model.get_step() if step is None else step)
    play = Play(model, environment, toolbox, temperature, key)

    async def attempt(scenario: Scenario, number: int) -> Sequence[Outcome]:
        return [await play.attempt(scenario, number)]

    return await gather_groups(attempt, scenarios, rollouts=rollouts, concurrency=concurrency, progress=progress)


async def gather_groups(
    attempt: Callable[[Scenario, int], Awaitable[Sequence[Outcome]]],
    scenarios: Sequence[Scenario],
    *,
    rollouts: int,
    concurrency: int,
    progress: Progress | None,
) -> list[TrajectoryGroup]:
    """A group for each scenario, of what `attempt(scenario, number)` made of its rollouts: a failure, or a trajectory and its
    branches, of which `progress` is told the last. What `attempt` raises is raised, the first one as it is."""
    limiter, watcher = anyio.CapacityLimiter(concurrency), progress or Silent()
    firsts = first_numbers(scenarios, rollouts)
    outcomes: dict[tuple[int, int], Sequence[Outcome]] = {}

    async def one(place: int, number: int) -> None:
        async with limiter:
            outcome = await attempt(scenarios[place], firsts[place] + number)
        outcomes[place, number] = outcome
        watcher.finished(outcome[-1])

    with first_failure():
        async with anyio.create_task_group() as tasks:
            for place in range(len(scenarios)):
                for number in range(rollouts):
                    tasks.start_soon(one, place, number)
    return [
        make_group(scenario, [outcome for number in range(rollouts) for outcome in outcomes[place, number]])
        for place, scenario in enumerate(scenarios)
    ]


def first_numbers(scenarios: Sequence[Scenario], rollouts: int) -> list[int]:
    """The number of each group's first rollout: 0, or what follows the group before it that has the same scenario."""
    seen: Counter[str] = Counter()
    numbers: list[int] = []
    for scenario in scenarios:
        numbers.append(seen[scenario.id] * rollouts)
        seen[scenario.id] += 1
    return numbers


@contextmanager
def first_failure() -> Generator[None]:
    """Raises the first of a task group's failures as it is: what breaks one rollout as a rule breaks them all."""
    failure: BaseException | None = None
    try:
        yield
    except BaseExceptionGroup as group:
        failure = group
    while failure is not None and members_of(failure):
        failure = members_of(failure)[0]
    if failure is not None:
        raise failure


def make_group(scenario: Scenario, outcomes: Sequence[Outcome]) -> TrajectoryGroup:
    return TrajectoryGroup(
        trajectories=tuple(outcome for outcome in outcomes if isinstance(outcome, ScoredTrajectory)),
        failures=tuple(outcome for outcome in outcomes if isinstance(outcome, FailedRollout)),
        scenario=scenario,
    )
