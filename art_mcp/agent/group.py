"""Groups of rollouts under one concurrency limit; the one place where a failed rollout is caught and recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import anyio

from art_mcp.agent.clock import Clocks
from art_mcp.agent.converse import converse
from art_mcp.agent.lending import toolbox_for
from art_mcp.agent.places import Places, places_of
from art_mcp.agent.rollout import name_rollout, rollout
from art_mcp.agent.trace import outcome_of, rewards_of, traced
from art_mcp.environment import Environment
from art_mcp.errors import RolloutError, members_of
from art_mcp.model import Model, TrainableModel
from art_mcp.ports import Chat, Progress, Toolbox, Toolboxes, Tracer
from art_mcp.types import (
    FailedRollout,
    Message,
    Reply,
    SamplingParams,
    Scenario,
    ScoredTrajectory,
    Tool,
    Trajectory,
    TrajectoryGroup,
    Usage,
)

Item = TypeVar("Item")
Done = TypeVar("Done")
Outcome: TypeAlias = ScoredTrajectory | FailedRollout
Attempt: TypeAlias = Callable[[Scenario, int], Awaitable[Sequence[Outcome]]]
"""One rollout of a scenario by its number: a failure, or a trajectory and its branches."""


@dataclass(frozen=True, slots=True)
class Silent:
    """Progress that nobody watches."""

    def finished(self, outcome: Outcome) -> None:
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
    """What all rollouts of a batch share; `key` is (run seed, step), `chat` the door to a remote model; a model of
    ours is played with by `clocks`."""

    model: Model[Any]
    chat: Chat | None
    environment: Environment
    toolbox: Toolboxes
    temperature: float
    key: tuple[int, int]
    tracer: Tracer | None = None
    clocks: Clocks | None = None

    async def attempt(self, scenario: Scenario, number: int) -> Outcome:
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
            async with toolbox_for(scenario, environment=self.environment, toolbox=self.toolbox) as toolbox:
                trajectory = await self.play(scenario, number, chat=chat, toolbox=toolbox)
                with traced(self.tracer, "reward", answer=trajectory.answer) as tell_reward:
                    scored = await self.environment.score(trajectory, toolbox)
                    tell_reward({"reward": scored.reward, "parts": dict(scored.parts)})
            tell(outcome_of(scored))
        return scored

    async def play(self, scenario: Scenario, number: int, *, chat: Chat | None, toolbox: Toolbox) -> Trajectory:
        """One rollout: over `chat` where there is one, else with the model's own tokens."""
        shared: dict[str, Any] = {
            "toolbox": toolbox,
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
        model, clocks = self.model, self.clocks
        sampler, dialect = model.sampler(), model.dialect()
        return await rollout(scenario, sampler=sampler, dialect=dialect, ready=model.ready, clocks=clocks, **shared)


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
    toolbox: Toolboxes,
    rollouts: int = 8,
    concurrency: int | Places = 128,
    temperature: float = 1.0,
    seed: int = 0,
    step: int | None = None,
    progress: Progress | None = None,
    tracer: Tracer | None = None,
) -> list[TrajectoryGroup]:
    """Plays every scenario `rollouts` times with the model's current policy and scores it: one group a scenario, in order.

    `model`: a TrainableModel, or a remote Model, whose groups have no spans to learn from. `concurrency` bounds the rollouts in
    flight over all groups: a number, or places that are shared with other batches. `step` (default: the model's; 0 for a remote
    one) and `seed` key every draw; a scenario that stands here twice is drawn anew the second time. `tracer` watches (default:
    that of the model's backend).

    A rollout that the world broke (RolloutError) becomes a FailedRollout of its group and the others go on; anything else is a
    bug and raises, the first one as it is.
    """
    if step is None:
        step = await model.get_step() if isinstance(model, TrainableModel) else 0
    tracer, places = tracer or model.tracer, places_of(concurrency)
    with first_failure():
        async with door_to(model) as chat:
            play = Play(model, chat, environment, toolbox, temperature, (seed, step), tracer, places.clocks)

            async def attempt(scenario: Scenario, number: int) -> Sequence[Outcome]:
                return [await play.attempt(scenario, number)]

            return await gather_groups(
                attempt,
                scenarios,
                rollouts=rollouts,
                concurrency=places,
                progress=progress,
                tracer=tracer,
                step=step,
            )


async def gather_groups(
    attempt: Attempt,
    scenarios: Sequence[Scenario],
    *,
    rollouts: int,
    concurrency: int | Places,
    progress: Progress | None = None,
    tracer: Tracer | None = None,
    step: int = 0,
) -> list[TrajectoryGroup]:
    """A group for each scenario, of what `attempt(scenario, number)` made of its rollouts: a failure, or a trajectory and its
    branches, of which `progress` is told the last. What `attempt` raises is raised, the first one as it is."""
    places, watcher = places_of(concurrency), progress or Silent()
    firsts = first_numbers(scenarios, rollouts)
    groups: dict[int, TrajectoryGroup] = {}

    async def gather(place: int) -> None:
        scenario, outcomes = scenarios[place], dict[int, Sequence[Outcome]]()

        async def one(number: int) -> None:
            async with places.take():
                outcome = await attempt(scenario, firsts[place] + number)
            outcomes[number] = outcome
            watcher.finished(outcome[-1])

        with traced(tracer, "group", scenario=scenario.id, prompt=scenario.prompt, step=step) as tell:
            async with anyio.create_task_group() as tasks:
                for number in range(rollouts):
                    tasks.start_soon(one, number)
            group = make_group(scenario, [outcome for number in range(rollouts) for outcome in outcomes[number]])
            tell(rewards_of(group))
        groups[place] = group

    with first_failure():
        async with anyio.create_task_group() as tasks:
            for place in range(len(scenarios)):
                tasks.start_soon(gather, place)
    return [groups[place] for place in range(len(scenarios))]


def first_numbers(scenarios: Sequence[Scenario], rollouts: int) -> list[int]:
    """The number of each group's first rollout: 0, or what follows the group before it that has the same scenario."""
    seen: Counter[str] = Counter()
    numbers: list[int] = []
    for scenario in scenarios:
        numbers.append(seen[scenario.id] * rollouts)
        seen[scenario.id] += 1
    return numbers


async def do_each(do: Callable[[Item], Awaitable[Done]], items: Sequence[Item], *, concurrency: int) -> list[Done]:
    """What `do` gives for each item, in their order, in which they also begin; so many are under way at once. What it raises
    is raised, the first one as it is."""
    limiter = anyio.CapacityLimiter(concurrency)
    done: dict[int, Done] = {}

    async def one(place: int) -> None:
        async with limiter:
            done[place] = await do(items[place])

    with first_failure():
        async with anyio.create_task_group() as tasks:
            for place in range(len(items)):
                tasks.start_soon(one, place)
    return [done[place] for place in range(len(items))]


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
