"""One rollout: the policy's go at one scenario, token for token. Groups, concurrency and failures live in `group`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio

from art_mcp.agent.clock import Clock, Clocks, Ready, at_once
from art_mcp.agent.trace import described, traced
from art_mcp.core.seeds import seed_of
from art_mcp.errors import EngineError, ToolServerError, boundary
from art_mcp.ports import Dialect, Sampler, Toolbox, Tracer
from art_mcp.types import (
    Limits,
    Malformed,
    Message,
    SamplingParams,
    Scenario,
    Span,
    StopReason,
    ToolCall,
    ToolResult,
    ToolUse,
    Trajectory,
)


@dataclass(slots=True)
class Transcript:
    """A rollout while it grows: consistent after every statement, so that a time limit may end it anywhere."""

    messages: list[Message]
    spans: list[Span] = field(default_factory=list[Span])
    uses: list[ToolUse] = field(default_factory=list[ToolUse])
    tokens: list[int] = field(default_factory=list[int])

    def add(self, span: Span) -> None:
        if span.token_ids:
            self.spans.append(span)
            self.tokens.extend(span.token_ids)


async def rollout(
    scenario: Scenario,
    *,
    sampler: Sampler,
    dialect: Dialect,
    toolbox: Toolbox,
    system: str = "",
    limits: Limits | None = None,
    temperature: float = 1.0,
    key: Sequence[object] = (0, 0),
    number: int = 0,
    tracer: Tracer | None = None,
    ready: Ready = at_once,
    clocks: Clocks | None = None,
) -> Trajectory:
    """Plays `scenario` until an answer or a limit. Awaiting `ready`, before each turn, and being held by `clocks` cost no time.

    Every draw depends on (`key`, scenario id, `number`, turn) alone; `key` is (run seed, step), `number` the rollout's
    place in its group. The spans are never longer than `limits.tokens` or the model's context.

    Raises RolloutError when the world fails: a dead tool server, an engine, an opening without room for a turn, no first turn.
    """
    limits = limits or Limits()
    transcript = Transcript(opening_of(scenario.prompt, system))
    clock = Clock(limits.seconds, ready)
    reason = StopReason.TIME_LIMIT
    with (clocks or Clocks()).limit(clock):
        reason = await play(
            transcript,
            sampler=sampler,
            dialect=dialect,
            toolbox=toolbox,
            limits=limits,
            temperature=temperature,
            key=(*key, scenario.id, number),
            tracer=tracer,
            clock=clock,
        )
    if not any(span.logprobs is not None for span in transcript.spans):
        raise EngineError(f"no turn was sampled within {limits.seconds:g} s: raise Limits.seconds, or play fewer at a time")
    return Trajectory(
        scenario=scenario,
        rollout_id=name_rollout(key, scenario, number),
        messages=tuple(transcript.messages),
        spans=tuple(transcript.spans),
        stop_reason=reason,
        uses=tuple(transcript.uses),
        seconds=clock.seconds,
        temperature=temperature,
    )


async def play(
    transcript: Transcript,
    *,
    sampler: Sampler,
    dialect: Dialect,
    toolbox: Toolbox,
    limits: Limits,
    temperature: float,
    key: Sequence[object],
    tracer: Tracer | None,
    clock: Clock,
) -> StopReason:
    """Samples turn after turn into `transcript` and says why it ended."""
    shared, rest = dialect.opening(transcript.messages, toolbox.tools)
    transcript.add(Span(tuple(shared)))
    transcript.add(Span(tuple(rest)))
    most = min(limits.tokens, sampler.context_length)
    if len(transcript.tokens) >= most:
        whose = "the model's context" if most == sampler.context_length else "Limits.tokens of the environment"
        raise EngineError(
            f"the opening has {len(transcript.tokens)} tokens and leaves no room for a turn: {most} is the limit ({whose})"
        )
    for turn in range(limits.turns):
        room = min(limits.turn_tokens, most - len(transcript.tokens))
        params = SamplingParams(max_tokens=room, temperature=temperature, seed=seed_of(*key, turn))
        await clock.ready()
        with traced(tracer, "turn", turn=turn, messages=tuple(transcript.messages)) as tell:
            completion = await sampler.sample(transcript.tokens, params=params, stop=dialect.stop_token_ids, shared=len(shared))
            transcript.add(completion.span)
            reply, calls = dialect.read(completion.span.token_ids, toolbox.tools)
            tell(reply)
        transcript.messages.append(reply)
        ended = end_of(transcript.uses, calls, turn=turn, stopped=completion.stopped, room=room, limits=limits)
        if ended:
            return ended
        results = await make_calls(calls, toolbox, tracer)
        transcript.uses.extend(ToolUse(call, result, turn) for call, result in zip(calls, results, strict=True))
        following = answers(reply, calls, results)
        transcript.messages.extend(following)
        if turn + 1 == limits.turns:
            break
        bridge = dialect.bridge(reply, following, completion.span.token_ids[-1])
        if len(transcript.tokens) + len(bridge) >= most:
            return StopReason.TOKEN_LIMIT
        transcript.add(Span(tuple(bridge)))
    return StopReason.TURN_LIMIT


def opening_of(prompt: str, system: str) -> list[Message]:
    """The messages with which a rollout begins."""
    before: list[Message] = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": prompt}]


def end_of(
    uses: list[ToolUse], calls: Sequence[ToolCall | Malformed], *, turn: int, stopped: bool, room: int, limits: Limits
) -> StopReason | None:
    """Why a rollout ends with this turn; None where its calls are to be made. `stopped`: the turn ended by itself, within the
    `room` of so many tokens. Malformed calls that nobody will answer are entered in `uses`."""
    too_many = len(uses) + len(calls) > limits.calls
    if too_many or not stopped:
        uses.extend(unmade(call, turn) for call in calls if isinstance(call, Malformed))
    if not stopped:
        return StopReason.TOKEN_LIMIT if room < limits.turn_tokens else StopReason.TRUNCATED
    if not calls:
        return StopReason.ANSWERED
    return StopReason.CALL_LIMIT if too_many else None


def name_rollout(key: Sequence[object], scenario: Scenario, number: int) -> str:
    """The id of a rollout: all that its draws depend on, but for the turn."""
    return ":".join(map(str, (*key, scenario.id, number)))


def unmade(call: Malformed, turn: int) -> ToolUse:
    return ToolUse(call, ToolResult(call.error, is_error=True), turn)


async def make_calls(calls: Sequence[ToolCall | Malformed], toolbox: Toolbox, tracer: Tracer | None = None) -> list[ToolResult]:
    """The results in the order of the calls. Calls run in parallel; those of tools whose server says that they change
    things run one after the other, in the order written."""
    results: dict[int, ToolResult] = {}
    serial = {tool.name for tool in toolbox.tools if tool.serial}

    async def make(indices: Sequence[int]) -> None:
        for index in indices:
            call = calls[index]
            with traced(tracer, "tool", **described(call)) as tell:
                made = isinstance(call, ToolCall)
                results[index] = await toolbox.call(call) if made else ToolResult(call.error, is_error=True)
                tell({"text": results[index].text, "is_error": results[index].is_error})

    in_order = [i for i, call in enumerate(calls) if isinstance(call, ToolCall) and call.name in serial]
    chains = [in_order, *([index] for index in range(len(calls)) if index not in in_order)]
    together = [chain for chain in chains if chain]
    with boundary(ToolServerError, "calling tools"):
        if len(together) == 1:  # mostly: what tasks cost is a tenth of a short turn
            await make(together[0])
        else:
            async with anyio.create_task_group() as tasks:
                for chain in together:
                    tasks.start_soon(make, chain)
    return [results[index] for index in range(len(calls))]


def answers(reply: Message, calls: Sequence[ToolCall | Malformed], results: Sequence[ToolResult]) -> list[Message]:
    """One tool message for each call, in order; a malformed call is answered with what to fix."""
    ids = iter([call["id"] for call in reply.get("tool_calls") or ()])
    messages: list[Message] = []
    for call, result in zip(calls, results, strict=True):
        message: dict[str, Any] = {"role": "tool", "content": result.text}
        if isinstance(call, ToolCall):
            message |= {"name": call.name, "tool_call_id": next(ids, "")}
        messages.append(message)
    return messages
