"""Groups of rollouts under one concurrency limit; the one place where a failed rollout is caught and recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import anyio

from art_mcp.agent.rollout import name_rollout, rollout
from art_mcp.environment import Environment
from art_mcp.errors import EngineError, RolloutError, members_of
from art_mcp.model import TrainableModel
from art_mcp.ports import Progress, Toolbox
from art_mcp.types import FailedRollout, Scenario, ScoredTrajectory, StopReason, TrajectoryGroup


@dataclass(frozen=True, slots=True)
class Silent:
    """Progress that nobody watches."""

    def finished(self, outcome: ScoredTrajectory | FailedRollout) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Play:
    """What all rollouts of a batch share; `key` is (run seed, step)."""

    model: TrainableModel[Any]
    environment: Environment
    toolbox: Toolbox
    temperature: float
    key: tuple[int, int]

    async def attempt(self, scenario: Scenario, number: int) -> ScoredTrajectory | FailedRollout:
        """One rollout, scored; or what the world did to it."""
        try:
            starts = await self.model.ready()
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
            if trajectory.stop_reason is StopReason.TIME_LIMIT and await self.model.ready() != starts:
                raise EngineError("the engine died, and another was started while this rollout's time ran")
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
    limiter, watcher = anyio.CapacityLimiter(concurrency), progress or Silent()
    firsts = first_numbers(scenarios, rollouts)
    outcomes: dict[tuple[int, int], ScoredTrajectory | FailedRollout] = {}

    async def attempt(place: int, number: int) -> None:
        async with limiter:
            outcome = await play.attempt(scenarios[place], firsts[place] + number)
        outcomes[place, number] = outcome
        watcher.finished(outcome)

    with first_failure():
        async with anyio.create_task_group() as tasks:
            for place in range(len(scenarios)):
                for number in range(rollouts):
                    tasks.start_soon(attempt, place, number)
    return [
        make_group(scenario, [outcomes[place, number] for number in range(rollouts)])
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


def make_group(scenario: Scenario, outcomes: Sequence[ScoredTrajectory | FailedRollout]) -> TrajectoryGroup:
    return TrajectoryGroup(
        trajectories=tuple(outcome for outcome in outcomes if isinstance(outcome, ScoredTrajectory)),
        failures=tuple(outcome for outcome in outcomes if isinstance(outcome, FailedRollout)),
        scenario=scenario,
    )
