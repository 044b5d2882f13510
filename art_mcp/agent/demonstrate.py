"""Demonstrations: conversations that show how it is done, and the samples that a policy learns from them. No files here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, cast

from art_mcp.agent.check import answer, calling
from art_mcp.agent.group import do_each
from art_mcp.agent.lending import toolbox_for
from art_mcp.agent.rollout import answers, make_calls, name_rollout, opening_of
from art_mcp.core.samples import demonstration
from art_mcp.environment import Environment
from art_mcp.errors import ConfigError, EnvironmentLoadError, TrainError, boundary
from art_mcp.ports import Dialect, Toolbox, Toolboxes
from art_mcp.types import (
    Malformed,
    Message,
    Sample,
    Scenario,
    StopReason,
    Tool,
    ToolCall,
    ToolUse,
    Trajectory,
    TrajectoryGroup,
)

KEY = ("demonstration",)
"""What the ids of demonstrated conversations begin with, in place of a seed and a step."""


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A conversation to imitate, every turn of the assistant in it, and the tools that were offered."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]


def sample_of(shown: Demonstration, *, dialect: Dialect) -> Sample:
    """The tokens of a rollout whose policy wrote these turns in the template's own form, those turns to be learned.

    Raises TrainError for a turn with a call that would not be read as one.
    """
    messages, tools = shown.messages, shown.tools
    places = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    shared, rest = dialect.opening(messages[: places[0]], tools)
    parts: list[tuple[Sequence[int], bool]] = [([*shared, *rest], False)]
    for at, after in zip(places, [*places[1:], None], strict=True):
        turn = dialect.written(messages[:at], messages[at], tools)
        refuse_malformed(messages[at], dialect.read(turn, tools)[1])
        parts.append((turn, True))
        if after is not None:
            parts.append((dialect.bridge(messages[at], messages[at + 1 : after], turn[-1]), False))
    return demonstration(parts)


def refuse_malformed(reply: Message, calls: Sequence[ToolCall | Malformed]) -> None:
    wanted = len(reply.get("tool_calls") or ())
    for call in calls:
        if isinstance(call, Malformed):
            raise TrainError(f"a demonstrated call is one that the policy could not make: {call.text.strip()}: {call.error}")
    if len(calls) != wanted:
        raise TrainError(f"a demonstrated turn with {wanted} calls is read as one with {len(calls)}: {reply['content']!r}")


async def show_solutions(
    scenarios: Sequence[Scenario], *, environment: Environment, toolbox: Toolboxes, concurrency: int = 64
) -> list[Demonstration]:
    """The environment's own solutions of `scenarios`, played over the real tool servers; those that do not solve theirs are
    left out.

    Raises EnvironmentLoadError where there is no solution, or none of them solves its scenario.
    """
    show = partial(show_solution, environment=environment, toolbox=toolbox)
    kept = [shown for shown in await do_each(show, scenarios, concurrency=concurrency) if shown is not None]
    if not kept:
        raise EnvironmentLoadError(
            f"the solution of environment {environment.name!r} solves none of {len(scenarios)} scenarios: "
            "`art-mcp check` says more"
        )
    return kept


async def show_solution(scenario: Scenario, *, environment: Environment, toolbox: Toolboxes) -> Demonstration | None:
    """The reference solution with the real results of its calls, one call a turn, or several where the solution puts them
    together; None where it does not solve the scenario."""
    async with toolbox_for(scenario, environment=environment, toolbox=toolbox) as lent:
        return await show_with(lent, scenario, environment=environment)


async def show_with(toolbox: Toolbox, scenario: Scenario, *, environment: Environment) -> Demonstration | None:
    if environment.solution is None:
        raise EnvironmentLoadError(
            f"environment {environment.name!r} has no `solution` to demonstrate: give it one, or bring demonstrations in a file"
        )
    turns, text = environment.solve(scenario)
    messages = opening_of(scenario.prompt, environment.system)
    uses: list[ToolUse] = []
    for turn, calls in enumerate(turns):
        reply = calling(*calls)
        results = await make_calls(calls, toolbox)
        uses.extend(ToolUse(call, result, turn) for call, result in zip(calls, results, strict=True))
        messages.extend([reply, *answers(reply, calls, results)])
    messages.append(answer(text))
    name = name_rollout(KEY, scenario, 0)
    played = Trajectory(scenario, name, tuple(messages), (), StopReason.ANSWERED, tuple(uses))
    solved = environment.solved(await environment.score(played, toolbox))
    return Demonstration(played.messages, toolbox.tools) if solved else None


def show_successes(
    groups: Sequence[TrajectoryGroup], *, environment: Environment, tools: Sequence[Tool]
) -> list[Demonstration]:
    """What the policy itself did well: for each scenario the best rollout (the shortest of several) that solved it without a
    malformed call, to be learned in the template's own form, whatever form it was read in (as in arXiv:2308.01825)."""
    kept: list[Demonstration] = []
    for group in groups:
        solved = [one for one in group.trajectories if environment.solved(one) and not one.trajectory.malformed]
        ended = [one for one in solved if one.trajectory.stop_reason is StopReason.ANSWERED]
        if ended:
            best = min(ended, key=lambda one: (-one.reward, len(one.trajectory.messages), one.trajectory.policy_tokens))
            kept.append(Demonstration(best.trajectory.messages, tuple(tools)))
    return kept


def write_line(shown: Demonstration, *, offered: Sequence[Tool]) -> str:
    """A demonstration as one line of JSON; its tools stand there unless they are the ones that are `offered` anyway."""
    own = {} if shown.tools == tuple(offered) else {"tools": [tool.schema() for tool in shown.tools]}
    return json.dumps({"messages": shown.messages, **own}, ensure_ascii=False)


def read_line(line: str, *, offered: Sequence[Tool], where: str) -> Demonstration:
    """A line of JSON as fine-tuning files have it: `messages` with `tool_calls` (arguments as an object, or as a string that
    holds one), and `tools`, unless the ones that are `offered` are meant. Raises ConfigError, naming `where` it stands."""
    with boundary(ConfigError, f"{where} is no demonstration", ValueError, TypeError, KeyError, AttributeError):
        value = cast("Mapping[str, Any]", json.loads(line))
        messages = tuple(read_message(message) for message in value["messages"])
        check_order([str(message["role"]) for message in messages])
        tools = tuple(read_tool(tool) for tool in value["tools"]) if value.get("tools") else tuple(offered)
    return Demonstration(messages, tools)


def read_message(value: Mapping[str, Any]) -> Message:
    message: dict[str, Any] = {**value, "content": value.get("content") or ""}
    calls = message.pop("tool_calls", None) or ()
    if calls:
        message["tool_calls"] = [read_call(call, number) for number, call in enumerate(calls)]
    return message


def read_call(value: Mapping[str, Any], number: int) -> dict[str, Any]:
    function: Mapping[str, Any] = value.get("function", value)
    arguments: Any = function["arguments"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise TypeError(f"the arguments of {function['name']} are no object")
    name = {"name": function["name"], "arguments": cast("dict[str, Any]", arguments)}
    return {"type": "function", "id": value.get("id") or f"call{number:05d}", "function": name}


def read_tool(value: Mapping[str, Any]) -> Tool:
    function: Mapping[str, Any] = value.get("function", value)
    parameters: Mapping[str, Any] = function.get("parameters") or {"type": "object"}
    return Tool(str(function["name"]), str(function.get("description") or ""), parameters)


def check_order(roles: Sequence[str]) -> None:
    spoken = [role for role in roles if role != "system"]
    if spoken[:1] != ["user"]:
        raise ValueError("it does not begin with a message of the user's")
    if roles[-1] != "assistant":
        raise ValueError("it does not end with a turn of the assistant")
    if any(pair == ("assistant", "assistant") for pair in pairwise(roles)):
        raise ValueError("two turns of the assistant follow each other")
