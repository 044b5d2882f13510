"""Whether an environment rewards what it means to: its reference solution must score above every lazy policy."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from art_mcp.agent.group import do_each
from art_mcp.agent.lending import toolbox_for
from art_mcp.agent.rollout import rollout
from art_mcp.agent.verdict import EMPTY, REFERENCE, Verdict, blame, judge, judge_alone
from art_mcp.environment import Environment
from art_mcp.errors import RewardError
from art_mcp.ports import Dialect, Progress, Sampler, Toolbox, Toolboxes
from art_mcp.types import Message, Scenario, ScoredTrajectory, Tool, ToolCall

Script = Callable[[Scenario, Sequence[Tool]], list[Message]]
"""The turns that a policy plays in a scenario, as assistant messages."""

Play = Callable[[Sequence[Sequence[int]]], Sampler]
"""Makes a sampler that plays these turns (token ids)."""


def answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def calling(*calls: ToolCall) -> Message:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "id": f"call{i:05d}", "function": {"name": call.name, "arguments": dict(call.arguments)}}
            for i, call in enumerate(calls)
        ],
    }


def placeholder(schema: dict[str, Any]) -> Any:
    """Some value of the schema's type: what a policy writes that does not care."""
    kind = schema.get("type")
    if "enum" in schema:
        return schema["enum"][0]
    values: dict[str, Any] = {"string": "1", "number": 1, "integer": 1, "boolean": True, "array": [], "object": {}}
    return values.get(str(kind), 1)


def call_everything(scenario: Scenario, tools: Sequence[Tool]) -> list[Message]:
    calls = [
        ToolCall(tool.name, {name: placeholder(part) for name, part in tool.parameters.get("properties", {}).items()})
        for tool in tools
    ]
    return [*(calling(call) for call in calls), answer("0")]


def copy_numbers(scenario: Scenario, tools: Sequence[Tool]) -> list[Message]:
    return [answer(" ".join(re.findall(r"\d+(?:\.\d+)?", scenario.prompt)) or scenario.prompt)]


BUSY = "calling every tool"
LAZY: dict[str, Script] = {
    "no tool": lambda scenario, tools: [answer("I do not know.")],
    "constant answer": lambda scenario, tools: [answer("42")],
    "copying numbers": copy_numbers,
    EMPTY: lambda scenario, tools: [],
    BUSY: call_everything,
}


PLAYS = len(LAZY) + 3
"""Rollouts of each scenario: every lazy policy's, the solution's, and an empty turn's after that and after all of them. Where
sets of servers are reset, one more: the solution's, with others under way."""


def reference(environment: Environment) -> Script:
    """The environment's own solution as turns: its calls one a turn, or together as it has them, then the answer."""

    def script(scenario: Scenario, tools: Sequence[Tool]) -> list[Message]:
        turns, text = environment.solve(scenario)
        return [*(calling(*calls) for calls in turns), answer(text)]

    return script


async def check_environment(
    environment: Environment,
    *,
    dialect: Dialect,
    toolbox: Toolboxes,
    play: Play,
    split: str = "train",
    n: int = 20,
    progress: Progress | None = None,
) -> Verdict:
    """Plays the reference solution and the lazy policies in the first `n` scenarios of `split`, over the real tool servers.
    Where that solves nothing, or there is none, nothing is compared with it. Who calls no tool plays before it, when the
    servers are as they started; an empty turn is also played right after each scenario's solution, and after all of them: what
    one rollout does should not be counted for another. So nothing else is under way while solutions play; of the others, there
    are so many as `at_once` says. Last, where sets are reset, solutions play in all of them at once. `progress` is told of
    each rollout, of which there are at most `plays_of` a scenario.

    Raises EnvironmentLoadError where the reference solution fails, and RewardError, naming who played what, where one raises.
    """
    scenarios = environment.split(split)[:n]
    scripts = {REFERENCE: reference(environment), **LAZY}
    playing = partial(play_script, environment=environment, dialect=dialect, play=play)
    reasons: list[str] = []

    async def go(name: str, scenario: Scenario) -> ScoredTrajectory:
        async with toolbox_for(scenario, environment=environment, toolbox=toolbox) as lent:
            with played_by(name, scenario):
                scored = await playing(scripts[name], scenario, toolbox=lent)
            if name == REFERENCE:
                reasons.append(blame(scored, lent.last_error))  # before another rollout makes it write something else
        if progress is not None:
            progress.finished(scored)
        return scored

    everywhere = partial(play_everywhere, go, scenarios, concurrency=at_once(environment))
    before = await everywhere(*(name for name in LAZY if name != BUSY))
    if environment.solution is None:
        played = {**before, **await everywhere(BUSY)}
        after = await everywhere(EMPTY)
        return judge_alone(environment, played, before=before[EMPTY], after=after[EMPTY])
    played, after = {REFERENCE: list[ScoredTrajectory]()}, list[ScoredTrajectory]()
    for scenario in scenarios:
        played[REFERENCE].append(await go(REFERENCE, scenario))
        after.append(await go(EMPTY, scenario))
    together: Sequence[ScoredTrajectory] = ()
    if any(environment.solved(one) for one in played[REFERENCE]):
        played |= before | await everywhere(EMPTY)
        played |= await everywhere(BUSY)
        together = await play_together(go, scenarios, environment)
    return judge(environment, played, reasons[: len(after)], before=before[EMPTY], after=after, together=together)


async def play_together(
    go: Callable[[str, Scenario], Awaitable[ScoredTrajectory]], scenarios: Sequence[Scenario], environment: Environment
) -> Sequence[ScoredTrajectory]:
    """The reference solution in every scenario, in all sets of servers at once; nothing where that could show nothing new."""
    if not may_meet(environment):
        return ()
    return (await play_everywhere(go, scenarios, REFERENCE, concurrency=environment.copies))[REFERENCE]


def plays_of(environment: Environment) -> int:
    """The most rollouts of each scenario."""
    return PLAYS + may_meet(environment)


def may_meet(environment: Environment) -> bool:
    """Whether sets of servers that are one server would not show: those that are reset, and so played one at a time."""
    return environment.reset is not None and environment.copies > 1


async def play_everywhere(
    go: Callable[[str, Scenario], Awaitable[ScoredTrajectory]], scenarios: Sequence[Scenario], *names: str, concurrency: int
) -> dict[str, list[ScoredTrajectory]]:
    """What comes of each of these policies in every scenario."""
    pairs = [(name, scenario) for name in names for scenario in scenarios]
    played = iter(await do_each(lambda pair: go(*pair), pairs, concurrency=concurrency))
    return {name: [next(played) for _ in scenarios] for name in names}


@contextmanager
def played_by(name: str, scenario: Scenario) -> Generator[None]:
    """Tells of a reward that fails who played what."""
    try:
        yield
    except RewardError as error:
        raise RewardError(f"{error}; in scenario {scenario.id!r}, played by {name!r}") from error


def at_once(environment: Environment) -> int:
    """How many rollouts are played at a time where their order cannot matter: as many as there are sets of servers, if each is
    started anew. A set that is reset goes from one to the next, and what is left in it shows in that one set alone."""
    return 1 if environment.reset is not None else max(1, environment.copies)


async def play_script(
    script: Script, scenario: Scenario, *, environment: Environment, dialect: Dialect, toolbox: Toolbox, play: Play
) -> ScoredTrajectory:
    """One scripted rollout, through the same code as any other, scored."""
    user: Message = {"role": "user", "content": scenario.prompt}
    turns = [dialect.written([user], reply, toolbox.tools) for reply in script(scenario, toolbox.tools)]
    trajectory = await rollout(
        scenario,
        sampler=play(turns),
        dialect=dialect,
        toolbox=toolbox,
        system=environment.system,
        limits=environment.limits,
    )
    return await environment.score(trajectory, toolbox)
