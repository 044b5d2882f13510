"""Whether an environment rewards what it means to: its reference solution must score above every lazy policy."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from art_mcp.agent.rollout import rollout
from art_mcp.environment import Environment, own_code
from art_mcp.errors import EnvironmentLoadError, RewardError
from art_mcp.ports import Dialect, Sampler, Toolbox
from art_mcp.types import Malformed, Message, Scenario, ScoredTrajectory, Tool, ToolCall, ToolUse

Script = Callable[[Scenario, Sequence[Tool]], list[Message]]
"""The turns that a policy plays in a scenario, as assistant messages."""

Play = Callable[[Sequence[Sequence[int]]], Sampler]
"""Makes a sampler that plays these turns (token ids)."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Mean reward of the reference solution and of each lazy policy over the same scenarios; `failures` says what is wrong."""

    rewards: dict[str, float]
    solved: dict[str, float]
    failures: tuple[str, ...]


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


def calls_of(step: ToolCall | Sequence[ToolCall]) -> tuple[ToolCall, ...]:
    """The calls of one turn of a reference solution."""
    return (step,) if isinstance(step, ToolCall) else tuple(step)


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


LAZY: dict[str, Script] = {
    "no tool": lambda scenario, tools: [answer("I do not know.")],
    "constant answer": lambda scenario, tools: [answer("42")],
    "copying numbers": copy_numbers,
    "calling every tool": call_everything,
    "empty turn": lambda scenario, tools: [],
}


def reference(environment: Environment) -> Script:
    """The environment's own solution as turns: its calls one a turn, or together as it has them, then the answer."""
    solution = environment.solution
    if solution is None:
        raise EnvironmentLoadError(f"environment {environment.name!r} has no `solution`: nothing to compare lazy policies with")

    def script(scenario: Scenario, tools: Sequence[Tool]) -> list[Message]:
        with own_code(EnvironmentLoadError, f"the solution of scenario {scenario.id!r}"):
            steps, text = solution(scenario)
        return [*(calling(*calls_of(step)) for step in steps), answer(text)]

    return script


async def check_environment(
    environment: Environment, *, dialect: Dialect, toolbox: Toolbox, play: Play, split: str = "train", n: int = 20
) -> Verdict:
    """Plays the reference solution and the lazy policies in the first `n` scenarios of `split`, over the real tool servers.

    Raises EnvironmentLoadError where there is no reference solution or it fails, and RewardError, naming who played what,
    where a reward fails.
    """
    scenarios = environment.split(split)[:n]
    scripts = {"reference solution": reference(environment), **LAZY}
    rewards: dict[str, float] = {}
    solved: dict[str, float] = {}
    uses: list[ToolUse] = []
    for name, script in scripts.items():
        played: list[ScoredTrajectory] = []
        for scenario in scenarios:
            try:
                one = await play_script(script, scenario, environment=environment, dialect=dialect, toolbox=toolbox, play=play)
            except RewardError as error:
                raise RewardError(f"{error}; {name} was playing scenario {scenario.id!r}") from error
            played.append(one)
        rewards[name] = fmean([one.reward for one in played])
        solved[name] = fmean([environment.solved(one) for one in played])
        if script is scripts["reference solution"]:
            uses = [use for one in played for use in one.trajectory.uses]
    return Verdict(rewards, solved, (*refusals(uses), *complaints(rewards, solved)))


def refusals(uses: Sequence[ToolUse]) -> list[str]:
    """What the tools say against the reference solution's calls, which a reward that reads only the answer does not see.
    That some calls are answered with an error may be meant."""
    malformed = [use for use in uses if isinstance(use.call, Malformed)]
    if malformed:
        return [f"{len(malformed)} of the reference solution's {len(uses)} calls cannot be made: {malformed[0].result.text}"]
    if uses and all(use.result.is_error for use in uses):
        return [f"each of the reference solution's {len(uses)} calls is answered with an error: {uses[0].result.text}"]
    return []


def complaints(rewards: dict[str, float], solved: dict[str, float]) -> list[str]:
    best = rewards["reference solution"]
    found = [
        f"{name} scores {rewards[name]:.3f}, not below the reference solution's {best:.3f}"
        for name in LAZY
        if rewards[name] >= best
    ]
    if solved["reference solution"] < 1:
        found.append(f"the reference solution solves only {solved['reference solution']:.0%} of the scenarios")
    return found


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
