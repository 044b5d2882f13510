"""Groups of rollouts under one concurrency limit; the one place where a failed rollout is caught and recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import anyio

from art_mcp.agent.rollout import rollout
from art_mcp.environment import Environment
from art_mcp.errors import RolloutError
from art_mcp.model import TrainableModel
from art_mcp.ports import Progress, Toolbox
from art_mcp.types import FailedRollout, Scenario, ScoredTrajectory, TrajectoryGroup


@dataclass(frozen=True, slots=True)
class Silent:
    """Progress that nobody watches."""

    def finished(self, outcome: ScoredTrajectory | FailedRollout) -> None:
        pass


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

    `concurrency` bounds the rollouts in flight over all groups. A rollout that the world broke (RolloutError) becomes a
    FailedRollout of its group and the others go on; a bug in a reward's caller or in art_mcp itself raises.
    """
    limiter = anyio.CapacityLimiter(concurrency)
    key = (seed, await model.get_step() if step is None else step)
    watcher = progress or Silent()
    outcomes: dict[tuple[int, int], ScoredTrajectory | FailedRollout] = {}

    async def attempt(place: int, number: int) -> None:
        async with limiter:
            try:
                outcome = await scored_rollout(scenarios[place], number)
            except RolloutError as error:
                outcome = FailedRollout(f"{key[0]}:{key[1]}:{scenarios[place].id}:{number}", type(error).__name__, str(error))
        outcomes[place, number] = outcome
        watcher.finished(outcome)

    async def scored_rollout(scenario: Scenario, number: int) -> ScoredTrajectory:
        trajectory = await rollout(
            scenario,
            sampler=model.sampler(),
            dialect=model.dialect(),
            toolbox=toolbox,
            system=environment.system,
            limits=environment.limits,
            temperature=temperature,
            key=key,
            number=number,
        )
        return await environment.score(trajectory, toolbox)

    async with anyio.create_task_group() as tasks:
        for place in range(len(scenarios)):
            for number in range(rollouts):
                tasks.start_soon(attempt, place, number)
    return [
        make_group(scenario, [outcomes[place, number] for number in range(rollouts)])
        for place, scenario in enumerate(scenarios)
    ]


def make_group(scenario: Scenario, outcomes: Sequence[ScoredTrajectory | FailedRollout]) -> TrajectoryGroup:
    return TrajectoryGroup(
        trajectories=tuple(outcome for outcome in outcomes if isinstance(outcome, ScoredTrajectory)),
        failures=tuple(outcome for outcome in outcomes if isinstance(outcome, FailedRollout)),
        scenario=scenario,
    )
