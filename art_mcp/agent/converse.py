"""One rollout of a remote model: its go at one scenario, message by message, without spans to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic

import anyio

from art_mcp.agent.rollout import answers, end_of, make_calls, name_rollout, opening_of
from art_mcp.agent.trace import traced
from art_mcp.core.chat import answers_to
from art_mcp.core.seeds import seed_of
from art_mcp.errors import EngineError, NoRoomError
from art_mcp.ports import Chat, Toolbox, Tracer
from art_mcp.types import (
    Limits,
    Message,
    Reply,
    SamplingParams,
    Scenario,
    StopReason,
    Tool,
    ToolUse,
    Trajectory,
    Usage,
)


@dataclass(slots=True)
class Conversation:
    """A rollout while it grows: `messages` in our form, `sent` as the endpoint has them. `length`: tokens so far, as far as the
    endpoint tells; `owed`: it has not answered yet."""

    messages: list[Message]
    sent: list[Message]
    uses: list[ToolUse] = field(default_factory=list[ToolUse])
    usage: Usage | None = None
    length: int = 0
    owed: bool = False

    def add(self, reply: Reply) -> None:
        self.messages.append(reply.message)
        self.sent.append(reply.sent)
        if reply.usage:
            self.usage = reply.usage + (self.usage or Usage())
            self.length = reply.usage.prompt_tokens + reply.usage.completion_tokens


async def converse(
    scenario: Scenario,
    *,
    chat: Chat,
    toolbox: Toolbox,
    system: str = "",
    limits: Limits | None = None,
    temperature: float = 1.0,
    key: Sequence[object] = (0, 0),
    number: int = 0,
    tracer: Tracer | None = None,
) -> Trajectory:
    """Plays `scenario` with a remote model until an answer without a call, or a limit; arguments as for `rollout`.

    `limits.tokens` holds as far as the endpoint counts tokens. Raises RolloutError when the world fails: a dead tool server, an
    endpoint that gives no usable answer, or that owes one when `limits.seconds` are over.
    """
    limits = limits or Limits()
    opening = opening_of(scenario.prompt, system)
    talk = Conversation(opening, list(opening))
    began = monotonic()
    reason = StopReason.TIME_LIMIT
    with anyio.move_on_after(limits.seconds):
        reason = await play(
            talk,
            chat=chat,
            toolbox=toolbox,
            limits=limits,
            temperature=temperature,
            key=(*key, scenario.id, number),
            tracer=tracer,
        )
    if talk.owed:
        raise EngineError(
            f"the endpoint owed an answer when the rollout's {limits.seconds:g} s were over: "
            "raise Limits.seconds, or play fewer at a time"
        )
    return Trajectory(
        scenario=scenario,
        rollout_id=name_rollout(key, scenario, number),
        messages=tuple(talk.messages),
        spans=(),
        stop_reason=reason,
        uses=tuple(talk.uses),
        seconds=monotonic() - began,
        usage=talk.usage,
    )


async def play(
    talk: Conversation,
    *,
    chat: Chat,
    toolbox: Toolbox,
    limits: Limits,
    temperature: float,
    key: Sequence[object],
    tracer: Tracer | None,
) -> StopReason:
    """Adds turn after turn to `talk` and says why it ended."""
    for turn in range(limits.turns):
        room = min(limits.turn_tokens, limits.tokens - talk.length)
        if room < 1:
            return StopReason.TOKEN_LIMIT
        params = SamplingParams(max_tokens=room, temperature=temperature, seed=seed_of(*key, turn))
        try:
            reply = await next_turn(talk, chat, tools=toolbox.tools, params=params, turn=turn, tracer=tracer)
        except NoRoomError:
            if turn == 0:
                raise
            return StopReason.TOKEN_LIMIT
        ended = end_of(talk.uses, reply.calls, turn=turn, stopped=reply.stopped, room=room, limits=limits)
        if ended:
            return ended
        results = await make_calls(reply.calls, toolbox, tracer)
        talk.uses.extend(ToolUse(call, result, turn) for call, result in zip(reply.calls, results, strict=True))
        talk.messages.extend(answers(reply.message, reply.calls, results))
        talk.sent.extend(answers_to(reply.sent, results))
    return StopReason.TURN_LIMIT


async def next_turn(
    talk: Conversation, chat: Chat, *, tools: Sequence[Tool], params: SamplingParams, turn: int, tracer: Tracer | None
) -> Reply:
    """The endpoint's next message, added to `talk`, which notes that it is owed until then."""
    with traced(tracer, "turn", turn=turn, messages=tuple(talk.messages)) as tell:
        talk.owed = True
        try:
            reply = await chat.reply(talk.sent, tools=tools, params=params)
        except NoRoomError:
            talk.owed = False
            raise
        talk.owed = False
        tell(reply.message)
    talk.add(reply)
    return reply
