"""Whether a template bridges exactly, tried on small conversations, the shortest first. No conversation of a run comes here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from art_mcp.core.template import ChatTemplate, Tools, Unbridgeable
from art_mcp.errors import TemplateError
from art_mcp.types import Message, Tool

Turn: TypeAlias = tuple[Message, tuple[Message, ...]]
"""A reply of the policy and what the world says next (nothing after the last one)."""

PROBE = Tool("look_up", "Looks up a word.", {"type": "object", "properties": {"word": {"type": "string"}}})
SYSTEM: Message = {"role": "system", "content": "You look things up."}
QUESTION: Message = {"role": "user", "content": "What is a heron?"}
AGAIN: Message = {"role": "user", "content": "And an egret?"}
ANSWER: Message = {"role": "assistant", "content": "A wading bird."}
MALFORMED: Message = {"role": "assistant", "content": "look_up(heron"}
ERROR: Message = {"role": "tool", "name": "", "tool_call_id": "", "content": "This is no call."}


@dataclass(frozen=True, slots=True)
class Bridging:
    """Which turns a template bridges exactly, beside a call, its result and an answer (without which it is refused).

    `text_with_calls`: text before a call. `parallel_calls`: several calls in one turn. `errors`: the answer to a malformed
    call, a tool message after a turn that has text and no call. `follow_ups`: a user's next message. `without_thoughts`: turns
    in which the policy does not think; where that is False, the others are of turns that do. `refusals` says, for each
    that is False, in this order, with which conversation it fails: there the policy reads something near, and the spans differ
    from a rendering of the whole.
    """

    text_with_calls: bool
    parallel_calls: bool
    errors: bool
    follow_ups: bool
    without_thoughts: bool
    refusals: tuple[Unbridgeable, ...]


def check_bridgeable(template: ChatTemplate, *, tools: Tools = ()) -> Bridging:
    """What the template bridges exactly, for these tools (default: a small one).

    Raises Unbridgeable with the shortest conversation of calls, results and an answer that it does not, neither as it is nor
    with a thought in every turn. (Qwen3's writes an empty thought into the last turn, and leaves it out of the others.)
    """
    offered = tools or (PROBE,)
    thoughtless = find_refusal(template, offered, thinking=False)
    if thoughtless and find_refusal(template, offered, thinking=True):
        raise thoughtless
    refusals: dict[str, Unbridgeable] = {}
    for feature, conversations in features(name_of(offered[0])).items():
        for turns in conversations:
            try:
                try_turns(template, [QUESTION], with_thoughts(turns) if thoughtless else turns, tools=offered)
            except Unbridgeable as refusal:
                refusals.setdefault(feature, refusal)
    exact = {feature: feature not in refusals for feature in features("")}
    last = (thoughtless,) if thoughtless else ()
    return Bridging(**exact, without_thoughts=not thoughtless, refusals=(*refusals.values(), *last))


def find_refusal(template: ChatTemplate, offered: Tools, *, thinking: bool) -> Unbridgeable | None:
    """What the template makes of the first basic conversation that it does not bridge; None where it bridges all."""
    for turns in basic(name_of(offered[0])):
        for opening in ([QUESTION], [SYSTEM, QUESTION]):
            try:
                try_turns(template, opening, with_thoughts(turns) if thinking else turns, tools=offered)
            except Unbridgeable as refusal:
                return refusal
    return None


def with_thoughts(turns: Sequence[Turn]) -> list[Turn]:
    return [({**reply, "reasoning_content": "A bird, surely."}, following) for reply, following in turns]


def basic(name: str) -> list[tuple[Turn, ...]]:
    """The conversations that every template must bridge, by length: an answer, a call, a chain of calls."""
    first, second = call(name, word="heron"), call(name, word="egret", depth=2)
    answer: Turn = (ANSWER, ())
    return [
        (answer,),
        (with_results(first), answer),
        (with_results(first), with_results(second), answer),
        (with_results(first), with_results(second), with_results(first), answer),
    ]


def features(name: str) -> dict[str, list[tuple[Turn, ...]]]:
    """The conversations that show each field of `Bridging`, by length."""
    single, answer = with_results(call(name, word="heron")), (ANSWER, ())
    told = with_results({**call(name, word="heron"), "content": "Let me look."})
    both = call(name, word="heron")["tool_calls"] + call(name, word="egret")["tool_calls"]
    parallel = with_results({**call(name), "tool_calls": [{**each, "id": f"call0000{at}"} for at, each in enumerate(both)]})
    error: Turn = (MALFORMED, (ERROR,))
    mixed: Turn = ({**call(name, word="heron"), **MALFORMED}, (*single[1], ERROR))
    again: Turn = (ANSWER, (AGAIN,))
    return {
        "text_with_calls": [(told, answer), (mixed, answer), (told, single, answer), (single, told, answer)],
        "parallel_calls": [(parallel, answer), (parallel, parallel, answer), (single, parallel, single, answer)],
        "errors": [(error, answer), (error, single, answer), (single, error, single, answer)],
        "follow_ups": [(again, answer), (single, again, answer), (single, again, single, answer)],
    }


def try_turns(template: ChatTemplate, opening: Sequence[Message], turns: Sequence[Turn], *, tools: Tools) -> None:
    """Walks a conversation turn by turn, beside the rendering of all of it. Raises Unbridgeable where they part."""
    messages = list(opening)
    try:
        text = template.prompt(messages, tools)
        for reply, following in turns:
            written, stop = write(template, messages, reply, following=following, tools=tools)
            messages.append(reply)
            demand(template, messages, parts_of(reply), got=written)
            text += written
            if following:
                messages += following
                whole = template.prompt(messages, tools)
                bridge = bridge_or_nothing(template, reply, following, ended_with=stop)
                if text + bridge != whole:
                    raise Unbridgeable(template.name, messages, expected=whole, got=text + bridge)
                demand(template, messages, [str(message["content"]) for message in following], got=bridge)
                text = whole
    except Unbridgeable:
        raise
    except TemplateError as error:
        said = [message for turn in turns for message in (turn[0], *turn[1])]
        raise Unbridgeable(template.name, [*opening, *said], reason=f"the template refuses it: {error}") from error


def write(
    template: ChatTemplate, messages: Sequence[Message], reply: Message, *, following: Sequence[Message], tools: Tools
) -> tuple[str, str]:
    """What the policy writes for `reply`, and the stop with which it ends. Where the template leaves turns open, a malformed
    call hands over as a call does."""
    written, ending = template.written(messages, reply, tools=tools), template.ending(reply)
    if ending.closed or "tool_calls" in reply or not following or following[0]["role"] != "tool":
        return written, ending.stop
    stop = template.ending(call("probe")).stop
    return written.removesuffix(ending.stop) + stop, stop


def bridge_or_nothing(template: ChatTemplate, reply: Message, following: Sequence[Message], *, ended_with: str) -> str:
    try:
        return template.bridge_text(reply, following, ended_with=ended_with)
    except TemplateError:  # its message is about stand-ins; the caller shows the conversation that was tried
        return ""


def demand(template: ChatTemplate, messages: Sequence[Message], parts: Sequence[str], *, got: str) -> None:
    """Raises Unbridgeable where something that was said is not to be found in what the template made of it."""
    for part in parts:
        if part not in got:
            reason = f"the template leaves out {part!r}: it writes {got[-80:]!r}"
            raise Unbridgeable(template.name, messages, expected=part, got=got, reason=reason)


def parts_of(reply: Message) -> list[str]:
    called = [each["function"] for each in reply.get("tool_calls") or ()]
    said = [str(reply.get("reasoning_content", "")), str(reply["content"])]
    return said + [part for each in called for part in (each["name"], *map(str, each["arguments"].values()))]


def call(name: str, **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "call00000", "function": function}]}


def with_results(reply: Message) -> Turn:
    """The reply with a result for each of its calls."""
    calls = reply["tool_calls"]
    return reply, tuple(
        {"role": "tool", "name": each["function"]["name"], "tool_call_id": each["id"], "content": f"A bird, no. {at}."}
        for at, each in enumerate(calls)
    )


def name_of(tool: Any) -> str:
    return tool.name if isinstance(tool, Tool) else str(tool["function"]["name"])
