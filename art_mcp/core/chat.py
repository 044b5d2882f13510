"""A chat endpoint's answer as a turn, and what it is told next, in OpenAI's form. Nothing is sent from here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from art_mcp.core.read_call import Call, by_name, read_call
from art_mcp.errors import EngineError
from art_mcp.types import Message, Reply, Tool, ToolCall, ToolResult, Usage

CUT_OFF = "length"
"""The finish reason of a turn that ran out of tokens."""
NOT_BY_THE_MODEL = ("content_filter", "error")
"""Finish reasons of turns that something else ended."""


def read_answer(answer: object, tools: Sequence[Tool]) -> Reply:
    """The turn in a chat completion. A call that cannot be made is Malformed, with what to fix; anything else that is not as it
    must be is the endpoint's fault: EngineError."""
    body = members(answer, "the answer")
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        raise EngineError(f"the answer has no choices: {excerpt(body.get('error') or body)}")
    choice = members(cast("list[object]", choices)[0], "its first choice")
    reason = choice.get("finish_reason")
    if reason in NOT_BY_THE_MODEL:
        raise EngineError(f"the endpoint ended the turn itself: {reason}")
    sent, calls = read_calls(members(choice.get("message"), "its message"), tools)
    return Reply(spoken(sent, calls), sent, calls, stopped=reason != CUT_OFF, usage=read_usage(body.get("usage")))


def members(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise EngineError(f"{what} should be a JSON object, not {excerpt(value)}")
    return cast("dict[str, Any]", value)


def excerpt(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:199]}…"


def read_calls(message: Mapping[str, Any], tools: Sequence[Tool]) -> tuple[dict[str, Any], tuple[Call, ...]]:
    """The message as the endpoint is to see it again, every call with an id, vendors' own fields included; and its calls."""
    sent = {key: value for key, value in message.items() if key == "content" or value not in (None, [], {})}
    sent = {"content": None, **sent, "role": "assistant"}
    begun = sent.get("tool_calls", [])
    if not isinstance(begun, list):
        raise EngineError(f"its tool_calls should be a list, not {excerpt(begun)}")
    written = [members(call, "a tool call") for call in cast("list[object]", begun)]
    written = [call | {"id": str(call.get("id") or f"call{index:05d}")} for index, call in enumerate(written)]
    if written:
        sent["tool_calls"] = written
    return sent, tuple(read_one(call, tools) for call in written)


def read_one(call: Mapping[str, Any], tools: Sequence[Tool]) -> Call:
    """The call, checked as one that was written as text is. No arguments at all are an empty object."""
    function = members(call.get("function"), "a tool call's function")
    name, arguments = function.get("name"), function.get("arguments")
    absent = arguments is None or (isinstance(arguments, str) and not arguments.strip())
    raw = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    text = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {"{}" if absent else raw}}}'
    given = {"name": name} if absent else {"name": name, "arguments": arguments}
    read = read_call(given, text, by_name(tools), lenient=False)
    return replace(read, id=call["id"]) if isinstance(read, ToolCall) else read


def spoken(sent: Message, calls: Sequence[Call]) -> Message:
    """The turn in our form: calls that cannot be made stand in its text."""
    parts = [text_of(sent.get("content")) or text_of(sent.get("refusal"))]
    parts += [call.text for call in calls if not isinstance(call, ToolCall)]
    message: dict[str, Any] = {"role": "assistant", "content": "\n".join(part for part in parts if part)}
    thoughts = text_of(sent.get("reasoning_content") or sent.get("reasoning"))
    made = [call for call in calls if isinstance(call, ToolCall)]
    if thoughts:
        message["reasoning_content"] = thoughts
    if made:
        message["tool_calls"] = [
            {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}} for call in made
        ]
    return message


def text_of(content: object) -> str:
    """Text, or the text parts of a list."""
    if isinstance(content, list):
        return "".join(text_of(part) for part in cast("list[object]", content))
    if isinstance(content, dict):
        return text_of(cast("dict[str, object]", content).get("text"))
    return content if isinstance(content, str) else ""


def read_usage(usage: object) -> Usage | None:
    """The tokens counted, and the cost where the endpoint tells it, as OpenRouter does; None where it counts none."""
    if not isinstance(usage, dict):
        return None
    counts = cast("dict[str, Any]", usage)
    details = counts.get("prompt_tokens_details")
    cached = cast("dict[str, Any]", details).get("cached_tokens") if isinstance(details, dict) else 0
    cost = counts.get("cost")
    return Usage(
        whole(counts.get("prompt_tokens")),
        whole(counts.get("completion_tokens")),
        whole(cached),
        float(cost) if isinstance(cost, int | float) else None,
    )


def whole(count: object) -> int:
    return count if isinstance(count, int) else 0


def answers_to(sent: Message, results: Sequence[ToolResult]) -> list[Message]:
    """The tool messages that answer the calls of a turn, one each, malformed ones included."""
    return [
        {"role": "tool", "tool_call_id": call["id"], **name_of(call["function"]), "content": result.text}
        for call, result in zip(sent["tool_calls"], results, strict=True)
    ]


def name_of(function: Mapping[str, Any]) -> dict[str, str]:
    """The `name` of a tool message, where the call has one."""
    name = function.get("name")
    return {"name": name} if isinstance(name, str) and name else {}
