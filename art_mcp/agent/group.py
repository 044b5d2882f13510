"""Groups of rollouts under one concurrency limit; the one place where a failed rollout is caught and recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import anyio

from art_mcp.agent.converse import converse
from art_mcp.agent.rollout import name_rollout, rollout
from art_mcp.agent.trace import outcome_of, rewards_of, traced
from art_mcp.environment import Environment
from art_mcp.errors import EngineError, RolloutError, members_of
from art_mcp.model import Model, TrainableModel
from art_mcp.ports import Chat, Progress, Toolbox, Tracer
from art_mcp.types import (
    FailedRollout,
    Message,
    Reply,
    SamplingParams,
    Scenario,
    ScoredTrajectory,
    StopReason,
    Tool,
    Trajectory,
    TrajectoryGroup,
    Usage,
)


@dataclass(frozen=True, slots=True)
class Silent:
    """Progress that nobody watches."""

    def finished(self, outcome: ScoredTrajectory | FailedRollout) -> None:
        pass


@dataclass(slots=True)
class Metered:
    """A Chat that sums what its turns used, for a rollout that may fail after some of them."""

    chat: Chat
    usage: Usage | None = None

    async def reply(self, conversation: Sequence[Message], *, tools: Sequence[Tool], params: SamplingParams) -> Reply:
        reply = await self.chat.reply(conversation, tools=tools, params=params)
        if reply.usage:
            self.usage = reply.usage + (self.usage or Usage())
        return reply


@dataclass(frozen=True, slots=True)
class Play:
    """What all rollouts of a batch share; `key` is (run seed, step), `chat` the door to a remote model."""

    model: Model[Any]
    chat: Chat | None
    environment: Environment
    toolbox: Toolbox
    temperature: float
    key: tuple[int, int]
    tracer: Tracer | None = None

    async def group(
        self, scenario: Scenario, numbers: Sequence[int], *, limiter: anyio.CapacityLimiter, watcher: Progress
    ) -> TrajectoryGroup:
        """The rollouts of one scenario with these numbers, as many at a time as the limiter lets in."""
        outcomes: dict[int, ScoredTrajectory | FailedRollout] = {}

        async def attempt(number: int) -> None:
            async with limiter:
                outcome = await self.attempt(scenario, number)
            outcomes[number] = outcome
            watcher.finished(outcome)

        with traced(self.tracer, "group", scenario=scenario.id, prompt=scenario.prompt, step=self.key[1]) as tell:
            async with anyio.create_task_group() as tasks:
                for number in numbers:
                    tasks.start_soon(attempt, number)
            group = make_group(scenario, [outcomes[number] for number in numbers])
            tell(rewards_of(group))
        return group

    async def attempt(self, scenario: Scenario, number: int) -> ScoredTrajectory | FailedRollout:
        """One rollout, scored; or what the world did to it."""
        chat = None if self.chat is None else Metered(self.chat)
        try:
            return await self.score(scenario, number, chat=chat)
        except RolloutError as error:
            name = name_rollout(self.key, scenario, number)
            return FailedRollout(name, type(error).__name__, str(error), chat.usage if chat else None)

    async def score(self, scenario: Scenario, number: int, *, chat: Chat | None) -> ScoredTrajectory:
        """One rollout, scored. Raises RolloutError when the world breaks it."""
        name = name_rollout(self.key, scenario, number)
        with traced(self.tracer, "rollout", id=name, prompt=scenario.prompt) as tell:
            trajectory = await self.play(scenario, number, chat=chat)
            with traced(self.tracer, "reward", answer=trajectory.answer) as tell_reward:
                scored = await self.environment.score(trajectory, self.toolbox)
                tell_reward({"reward": scored.reward, "parts": dict(scored.parts)})
            tell(outcome_of(scored))
        return scored

    async def play(self, scenario: Scenario, number: int, *, chat: Chat | None) -> Trajectory:
        """One rollout: over `chat` where there is one, else with the model's own tokens."""
        shared: dict[str, Any] = {
            "toolbox": self.toolbox,
            "system": self.environment.system,
            "limits": self.environment.limits,
            "temperature": self.temperature,
            "key": self.key,
            "number": number,
            "tracer": self.tracer,
        }
        if chat is not None:
            return await converse(scenario, chat=chat, **shared)
        assert isinstance(self.model, TrainableModel)
        starts = await self.model.ready()
        trajectory = await rollout(scenario, sampler=self.model.sampler(), dialect=self.model.dialect(), **shared)
        if trajectory.stop_reason is StopReason.TIME_LIMIT and await self.model.ready() != starts:
            raise EngineError("the engine died, and another was started while this rollout's time ran")
        return trajectory


@asynccontextmanager
async def door_to(model: Model[Any]) -> AsyncGenerator[Chat | None]:
    """A Chat with a remote model, None for one that a backend samples."""
    if isinstance(model, TrainableModel):
        yield None
    else:
        async with model.chat() as chat:
            yield chat


async def gather_trajectory_groups(
    scenarios: Sequence[Scenario],
    *,
    model: Model[Any],
    environment: Environment,
    toolbox: Toolbox,
    rollouts: int = 8,
    concurrency: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    step: int | None = None,
    progress: Progress | None = None,
    tracer: Tracer | None = None,
) -> list[TrajectoryGroup]:
    """Plays every scenario `rollouts` times with the model's current policy and scores it: one group a scenario, in order.

    `model`: a TrainableModel, or a remote Model, whose groups have no spans to learn from. `concurrency` bounds the rollouts in
    flight over all groups. `step` (default: the model's; 0 for a remote one) and `seed` key every draw; a scenario that stands
    here twice is drawn anew the second time. `tracer` watches (default: that of the model's backend).

    A rollout that the world broke (RolloutError) becomes a FailedRollout of its group and the others go on; anything else is a
    bug and raises, the first one as it is.
    """
    if step is None:
        step = await model.get_step() if isinstance(model, TrainableModel) else 0
    tracer = tracer or model.tracer
    limiter, watcher = anyio.CapacityLimiter(concurrency), progress or Silent()
    firsts = first_numbers(scenarios, rollouts)
    groups: dict[int, TrajectoryGroup] = {}

    async def gather(play: Play, place: int) -> None:
        numbers = range(firsts[place], firsts[place] + rollouts)
        groups[place] = await play.group(scenarios[place], numbers, limiter=limiter, watcher=watcher)

    with first_failure():
        async with door_to(model) as chat, anyio.create_task_group() as tasks:
            play = Play(model, chat, environment, toolbox, temperature, (seed, step), tracer)
            for place in range(len(scenarios)):
                tasks.start_soon(gather, play, place)
    return [groups[place] for place in range(len(scenarios))]


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
