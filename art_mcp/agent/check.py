"""Whether an environment rewards what it means to: its reference solution must score above every lazy policy."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from art_mcp.agent.rollout import rollout
from art_mcp.environment import Environment, own_code
from art_mcp.errors import EnvironmentLoadError, RewardError, explained
from art_mcp.ports import Dialect, Sampler, Toolbox
from art_mcp.types import Malformed, Message, Scenario, ScoredTrajectory, Tool, ToolCall, ToolUse

Script = Callable[[Scenario, Sequence[Tool]], list[Message]]
"""The turns that a policy plays in a scenario, as assistant messages."""

Play = Callable[[Sequence[Sequence[int]]], Sampler]
"""Makes a sampler that plays these turns (token ids)."""

Why = Callable[[str], str]
"""What the server of the tool of this name wrote of its last error; "" if nothing."""

REFERENCE = "reference solution"


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
    environment: Environment,
    *,
    dialect: Dialect,
    toolbox: Toolbox,
    play: Play,
    split: str = "train",
    n: int = 20,
    why: Why = lambda tool: "",
) -> Verdict:
    """Plays the reference solution and the lazy policies in the first `n` scenarios of `split`, over the real tool servers.
    `why` is asked about the first of the solution's calls that is answered with an error.

    Raises EnvironmentLoadError where there is no reference solution or it fails, and RewardError, naming who played what,
    where a reward fails.
    """
    scenarios = environment.split(split)[:n]
    scripts = {REFERENCE: reference(environment), **LAZY}
    rewards: dict[str, float] = {}
    solved: dict[str, float] = {}
    refused: list[str] = []
    for name, script in scripts.items():
        played: list[ScoredTrajectory] = []
        reasons: list[str] = []
        for scenario in scenarios:
            try:
                one = await play_script(script, scenario, environment=environment, dialect=dialect, toolbox=toolbox, play=play)
            except RewardError as error:
                raise RewardError(f"{error}; {name} was playing scenario {scenario.id!r}") from error
            played.append(one)
            reasons.append(reason_of(one, why))  # before another scenario makes it write something else
        rewards[name] = fmean([one.reward for one in played])
        solved[name] = fmean([environment.solved(one) for one in played])
        if name == REFERENCE:
            refused = refusals(played, reasons, environment=environment)
    return Verdict(rewards, solved, (*refused, *complaints(rewards, solved)))


def wrong_calls(scored: ScoredTrajectory) -> list[ToolUse]:
    """The calls that a tool answered with an error."""
    return [use for use in scored.trajectory.uses if use.result.is_error and isinstance(use.call, ToolCall)]


def reason_of(scored: ScoredTrajectory, why: Why) -> str:
    """The last error that a tool answered with, and what its server says beyond that; "" where there was none."""
    wrong = wrong_calls(scored)
    if not wrong or not isinstance(wrong[-1].call, ToolCall):
        return ""
    text, reason = wrong[-1].result.text, why(wrong[-1].call.name)
    return explained(text, reason)


def refusals(played: Sequence[ScoredTrajectory], reasons: Sequence[str], *, environment: Environment) -> list[str]:
    """What the tools say against the reference solution's calls, which a reward that reads only the answer does not see.
    That some calls are answered with an error may be meant, as long as their scenarios are solved."""
    uses = [use for one in played for use in one.trajectory.uses]
    malformed = [use for use in uses if isinstance(use.call, Malformed)]
    if malformed:
        return [f"{len(malformed)} of the reference solution's {len(uses)} calls cannot be made: {malformed[0].result.text}"]
    if uses and all(use.result.is_error for use in uses):
        return [f"each of the reference solution's {len(uses)} calls is answered with an error: {next(filter(None, reasons))}"]
    spoiled = [place for place, one in enumerate(played) if wrong_calls(one) and not environment.solved(one)]
    if not spoiled:
        return []
    wrong = sum(len(wrong_calls(played[place])) for place in spoiled)
    return [
        f"{wrong} of the reference solution's {len(uses)} calls are answered with an error, in scenarios that it does not "
        f"solve: {reasons[spoiled[0]]}"
    ]


def complaints(rewards: dict[str, float], solved: dict[str, float]) -> list[str]:
    best = rewards[REFERENCE]
    found = [
        f"{name} scores {rewards[name]:.3f}, not below the reference solution's {best:.3f}"
        for name in LAZY
        if rewards[name] >= best
    ]
    if solved[REFERENCE] < 1:
        found.append(f"the reference solution solves only {solved[REFERENCE]:.0%} of the scenarios")
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
