"""A turn as OpenAI's clients expect it: a call is a call, whether it can be made or not, and the agent says what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from art_mcp.core.parse import join_texts
from art_mcp.serve.asked import Asked
from art_mcp.types import Malformed, Message, ToolCall


def show(reply: Message, calls: Sequence[ToolCall | Malformed], asked: Asked) -> tuple[Message, tuple[int, ...]]:
    """The message with every call that may be handed out, and their places among all `calls`. One that cannot be made has no id
    yet, and stands in the text no longer."""
    made = iter(reply.get("tool_calls") or ())
    listed: dict[int, Any] = {place: next(made) for place, call in enumerate(calls) if isinstance(call, ToolCall)}
    content, texts, taken = str(reply["content"]), list[str](), False
    for place, call in reversed(list(enumerate(calls))):
        head, found, tail = content.rpartition(call.text) if isinstance(call, Malformed) else ("", "", "")
        if not found or not isinstance(call, Malformed):
            continue
        content, handed = head, handed_out(call, asked)
        texts = [*([] if handed else [call.text]), tail, *texts]
        if handed:
            listed[place], taken = handed, True
    if not taken:
        return reply, tuple(sorted(listed))
    places = tuple(sorted(listed))
    return {**reply, "content": join_texts([content, *texts]), "tool_calls": [listed[place] for place in places]}, places


def handed_out(call: Malformed, asked: Asked) -> Mapping[str, Any] | None:
    """The call as a client gets it; None for one that is only text, or that breaks what `strict` promises of its tool."""
    strict = {offered.function.name: bool(offered.function.strict) for offered in asked.tools or ()}
    if call.asked is None or not asked.reads_calls or not strict:
        return None
    name, arguments = call.asked
    if strict.get(name, all(strict.values())):
        return None
    return {"type": "function", "id": None, "function": {"name": name, "arguments": arguments}}
