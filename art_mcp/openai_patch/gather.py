"""Groups of rollouts of any agent on an `openai` client, scored, as the trainer takes them."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import anyio

from art_mcp.agent.clock import Clock, Ready
from art_mcp.agent.group import Outcome, gather_groups
from art_mcp.agent.rollout import name_rollout
from art_mcp.core.samples import check_alive
from art_mcp.environment import own_code
from art_mcp.errors import AgentError, RewardError, RolloutError
from art_mcp.model import TrainableModel
from art_mcp.openai_patch.patch import record
from art_mcp.openai_patch.recording import Recording
from art_mcp.ports import Progress
from art_mcp.types import FailedRollout, Scenario, ScoredTrajectory, TrajectoryGroup

if TYPE_CHECKING:
    from openai import AsyncOpenAI

Result = TypeVar("Result")
Agent: TypeAlias = "Callable[[AsyncOpenAI, Scenario], Awaitable[Result]]"
Judged: TypeAlias = "float | Mapping[str, float]"
Judge: TypeAlias = "Callable[[Recording, Result], Judged | Awaitable[Judged]]"


@dataclass(frozen=True, slots=True)
class AgentPlay:
    """What all rollouts of an agent share; `key` is (run seed, step)."""

    agent: Agent[Any]
    reward: Judge[Any]
    client: AsyncOpenAI
    model: TrainableModel[Any]
    temperature: float
    seconds: float
    reward_seconds: float
    key: tuple[int, int]

    async def attempt(self, scenario: Scenario, number: int) -> Sequence[Outcome]:
        """One rollout with its branches, scored; or what went wrong with it."""
        rollout_id = name_rollout(self.key, scenario, number)
        clock = Clock(self.seconds, self.model.ready)
        options: dict[str, Any] = {
            "rollout_id": rollout_id,
            "model": self.model.name,
            "temperature": self.temperature,
            "key": (*self.key, scenario.id, number),
            "ready": from_any_loop(clock.ready),
        }
        try:
            await clock.ready()
            with record(self.client, scenario, **options) as recording:
                result = await self._run(scenario, clock)
            return await self._score(recording, result)
        except RolloutError as error:
            return [FailedRollout(rollout_id, type(error).__name__, str(error))]

    async def _run(self, scenario: Scenario, clock: Clock) -> Any:
        try:
            with clock.limit, own_code(AgentError, "the agent"):
                return await self.agent(self.client, scenario)
        except AgentError as error:
            raise clock.failure or error from error.__cause__  # whatever it made of the engine's
        assert clock.limit.cancelled_caught
        raise clock.failure or AgentError(f"the agent had not ended after {self.seconds:g} s")

    async def _score(self, recording: Recording, result: Any) -> Sequence[ScoredTrajectory]:
        if not recording.calls:
            raise AgentError("the agent never asked the policy: it must use the client that it is given")
        with own_code(RewardError, "the reward"):
            judged = await self._judge(recording, result)
            parts = {name: float(value) for name, value in judged.items()} if isinstance(judged, Mapping) else {}
            reward = sum(parts.values()) if isinstance(judged, Mapping) else float(judged)
        if not math.isfinite(reward):
            raise RewardError(f"the reward is {reward}")
        return recording.scored(reward, parts)

    async def _judge(self, recording: Recording, result: Any) -> Judged:
        judged = self.reward(recording, result)
        if not inspect.isawaitable(judged):
            return judged
        with anyio.move_on_after(self.reward_seconds):
            return await judged
        raise RewardError(f"the reward had not ended after {self.reward_seconds:g} s: mend it, or raise reward_seconds")


def from_any_loop(ready: Ready) -> Ready:
    """`ready` in the event loop that runs now, whoever awaits it: an agent may use its client in a thread, in a loop there."""
    home = asyncio.get_running_loop()

    async def asked() -> None:
        if asyncio.get_running_loop() is home:
            await ready()
        else:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(as_coroutine(ready), home))

    return asked


async def as_coroutine(ready: Ready) -> None:
    await ready()


async def gather_agent_groups(
    agent: Agent[Result],
    scenarios: Sequence[Scenario],
    *,
    model: TrainableModel[Any],
    reward: Judge[Result],
    client: AsyncOpenAI | None = None,
    rollouts: int = 8,
    concurrency: int = 128,
    temperature: float = 1.0,
    seconds: float = 120.0,
    reward_seconds: float = 300.0,
    seed: int = 0,
    step: int | None = None,
    progress: Progress | None = None,
) -> list[TrajectoryGroup]:
    """Lets `agent(client, scenario)` attempt every scenario `rollouts` times on the model's current policy: one group a
    scenario, in order, ready for `model.train`.

    `client`: default the model's own. `reward(recording, result)`, plain or async, is told what was recorded and what the agent
    returned; it gives a number, or named parts that add up to it. One reward counts for all branches of a rollout. Every call
    goes to the model, at this temperature and from the whole distribution, whatever the agent says; a seed that the agent gives
    stays, and others are made of (`seed`, `step`, scenario id, rollout, number of the call). `seconds` bounds one rollout; its
    time stands still where a call waits for an engine that died and is started anew. `reward_seconds` bounds one asynchronous
    `reward`; a plain one cannot be interrupted, and all rollouts wait for it.

    An agent or a reward that raises makes a FailedRollout of its group, and the others go on. Raises TrainError when every
    rollout failed, with the first failure.
    """
    key = (seed, await model.get_step() if step is None else step)
    async with AsyncExitStack() as stack:
        client = client or await stack.enter_async_context(model.openai_client())
        play = AgentPlay(agent, reward, client, model, temperature, seconds, reward_seconds, key)
        groups = await gather_groups(play.attempt, scenarios, rollouts=rollouts, concurrency=concurrency, progress=progress)
    check_alive(groups)
    return groups
