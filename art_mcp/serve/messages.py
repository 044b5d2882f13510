"""A client's messages and tools in the form that dialects read, and what makes two conversations the same one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from inspect import cleandoc
from typing import Any, cast

from art_mcp.core.json_scan import MAX_DEPTH, depth
from art_mcp.core.parameters import parameters_of
from art_mcp.serve.asked import OLD, Called, Offered, Part, Said
from art_mcp.serve.refusal import Refusal
from art_mcp.types import Message, Tool

NOTHING: Mapping[str, Any] = {"type": "object", "properties": {}}
"""The parameters of a tool that names none."""
SCHEMA_DEPTH = 64
ROLES = {"developer": "system"}


def read_tools(offered: Sequence[Offered]) -> tuple[Tool, ...]:
    """The tools as a toolbox describes them, whose rollouts train the policy; the same tuple for the same ones, because a
    dialect remembers openings by it."""
    functions = [one.function for one in offered]
    for at, function in enumerate(functions):
        if depth(function.parameters) > SCHEMA_DEPTH:
            where = f"tools.{at}.function.parameters"
            raise Refusal(400, f"{where}: nested deeper than {SCHEMA_DEPTH} levels", param=where)
    return tools_of(json.dumps([[one.name, one.description or "", one.parameters or NOTHING] for one in functions]))


@lru_cache(maxsize=64)
def tools_of(listed: str) -> tuple[Tool, ...]:
    return tuple(Tool(name, cleandoc(text), parameters_of(parameters)) for name, text, parameters in json.loads(listed))


def read_messages(said: Sequence[Said]) -> tuple[Message, ...]:
    """The conversation with the client's ids; results of calls stand in the order of the calls. Raises Refusal (400)."""
    messages: list[Message] = []
    names: dict[str, str] = {}
    for index, one in enumerate(said):
        if one.function_call is not None:
            where = f"messages.{index}.function_call"
            raise Refusal(400, f"{where} is not read: {OLD}", param=where)
        message: dict[str, Any] = {"role": ROLES.get(one.role, one.role), "content": text_of(one, index)}
        if one.role == "assistant" and one.tool_calls:
            message["tool_calls"] = [read_call(call, index) for call in one.tool_calls]
            names |= {call.id: call.function.name for call in one.tool_calls}
        elif one.role == "tool":
            id = one.tool_call_id or ""
            message |= {"name": names[id], "tool_call_id": id} if id in names else {"name": one.name} if one.name else {}
        elif one.name and one.role != "assistant":  # frameworks name their agents; the policy is one
            message["name"] = one.name
        messages.append(message)
    return tuple(in_order(messages))


def thoughts_of(said: Sequence[Said]) -> tuple[str, ...]:
    """What the client sent back of the thoughts of each assistant message; empty where that is nothing."""
    given = [one.reasoning_content or one.reasoning for one in said if one.role == "assistant"]
    return tuple(thoughts.strip() if isinstance(thoughts, str) else "" for thoughts in given)


def text_of(said: Said, index: int) -> str:
    if not isinstance(said.content, list):
        return said.content or ""
    return "".join(text_of_part(part, f"messages.{index}.content.{at}") for at, part in enumerate(said.content))


def text_of_part(part: Part, where: str) -> str:
    if part.type != "text" or part.text is None:
        raise Refusal(400, f"{where}: only text is read, not {part.type!r}", param=where)
    return part.text


def read_call(call: Called, index: int) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
        json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise wrong_arguments(call, index) from error
    if not isinstance(arguments, dict) or depth(cast("object", arguments)) > MAX_DEPTH:
        raise wrong_arguments(call, index)
    function = {"name": call.function.name, "arguments": cast("dict[str, Any]", arguments)}
    return {"type": "function", "id": call.id, "function": function}


def wrong_arguments(call: Called, index: int) -> Refusal:
    where = f"messages.{index}"
    return Refusal(
        400, f"{where}: the arguments of call {call.id!r} are no JSON object of at most {MAX_DEPTH} levels", param=where
    )


def in_order(messages: Sequence[Message]) -> list[Message]:
    """Results that directly follow their calls in the order of these: clients send them as they come, and a template that
    writes no ids tells them apart by their order alone."""
    ordered: list[Message] = []
    at = 0
    while at < len(messages):
        ordered.append(messages[at])
        places = {call["id"]: place for place, call in enumerate(messages[at].get("tool_calls") or ())}
        at += 1
        end = at
        while places and end < len(messages) and messages[end].get("tool_call_id") in places:
            end += 1
        ordered += sorted(messages[at:end], key=lambda result: places[result["tool_call_id"]])
        at = end
    return ordered


class Key:
    """What a conversation is known by: its tools and all that was said, whatever a client did to the spelling (white space in
    arguments, an absent content for an empty one, fields of its own)."""

    def __init__(self, tools: Sequence[Tool], messages: Sequence[Message]) -> None:
        self._hash = blake2b(json.dumps([[tool.name, tool.description, dict(tool.parameters)] for tool in tools]).encode())
        for message in messages:
            self._hash.update(self._spell(message))

    def after(self, message: Message) -> bytes:
        """The key of the conversation that has this message too."""
        longer = self._hash.copy()
        longer.update(self._spell(message))
        return longer.digest()

    def _spell(self, message: Message) -> bytes:
        functions = [(call["id"], call["function"]) for call in message.get("tool_calls") or ()]
        calls = [[id, function["name"], function["arguments"]] for id, function in functions]
        name = "" if message["role"] == "tool" else message.get("name", "")
        parts = [message["role"], message["content"], name, message.get("tool_call_id", ""), calls]
        return json.dumps(parts, sort_keys=True).encode() + b"\n"
