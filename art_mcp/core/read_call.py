"""What a model wrote as one call → a ToolCall that can be made, or Malformed. Where calls stand in a text is not known here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeAlias, cast

from pydantic_core import from_json

from art_mcp.core.arguments import validate
from art_mcp.core.complaints import listed, show
from art_mcp.core.json_scan import MAX_DEPTH, NotJson, check_value, count_colons, quote, read_value, read_whole, type_of
from art_mcp.types import JsonObject, Malformed, MalformedKind, Tool, ToolCall

Call: TypeAlias = ToolCall | Malformed

REMEMBERED = 64
SHAPE = '{"name": ..., "arguments": {...}}'


class Mistake(Exception):
    """Why a call cannot be made, for the model to read."""

    def __init__(self, kind: MalformedKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def by_name(tools: Sequence[Tool]) -> Mapping[str, Tool]:
    """The tools by their names, remembered for a tuple, which cannot change."""
    known = _offered.get(id(tools))
    if known is not None and known[0] is tools:
        return known[1]
    offered = {tool.name: tool for tool in tools}
    if isinstance(tools, tuple):
        if len(_offered) >= REMEMBERED:
            _offered.clear()
        _offered[id(tools)] = (tools, offered)
    return offered


_offered: dict[int, tuple[Sequence[Tool], Mapping[str, Tool]]] = {}
"""By identity; it keeps the tuple alive, so that no id is used twice."""


def read_usual(body: str, offered: Mapping[str, Tool]) -> ToolCall | None:
    """The call that `body` is, where it is strict JSON of the usual form and can be made; None where it needs a closer look.

    pydantic's reader takes a fraction of the time of Python's with checks in it, but it keeps the last of repeated names: a
    colon that the value does not account for. (An escaped one, \\u003a, stands in no text.)
    """
    try:
        value = from_json(body)
        name, arguments = value["name"], value["arguments"]
        tool = offered[name]
        colons = 2 + count_colons(arguments, MAX_DEPTH - 1)
    except (ValueError, TypeError, LookupError):
        return None
    if type_of(arguments) is not dict or len(value) != 2 or body.count(":") != colons or "\\u003" in body:
        return None
    return make_call(name, arguments) if validate(arguments, tool) is None else None


def make_call(name: str, arguments: JsonObject) -> ToolCall:
    """`ToolCall(name, arguments)` in half the time: a frozen dataclass looks for each of its fields anew to set it, and that
    would be a sixth of the time that a call takes to read."""
    call = object.__new__(ToolCall)
    set_name(call, name)
    set_arguments(call, arguments)
    set_id(call, "")
    set_lenient(call, False)
    return call


set_name, set_arguments, set_id, set_lenient = (
    vars(ToolCall)[field].__set__ for field in ("name", "arguments", "id", "lenient")
)


def read_body(body: str) -> Any:
    """The one JSON value that `body`, without white space around it, is. Raises Mistake (EMPTY, INVALID_JSON)."""
    if not body:
        raise Mistake(MalformedKind.EMPTY, f"the call is empty; write {SHAPE}")
    try:
        value, end = read_value(body)
        if end != len(body):
            raise Mistake(MalformedKind.INVALID_JSON, blame_rest(body[end:].lstrip()))
        check_value(value, body)
    except NotJson as error:
        message = str(error) if body[0] in '{["' else f"the call is not JSON; write {SHAPE}"
        raise Mistake(MalformedKind.INVALID_JSON, message) from error
    return value


def blame_rest(rest: str) -> str:
    if rest[:1] in ("{", "["):
        return "more than one JSON value in one call; write a <tool_call> for each call"
    if rest[:1] in ("}", "]"):
        return f"invalid JSON: remove the extra {rest[0]} at its end"
    return "text follows the JSON; write </tool_call> right after its last bracket"


def read_call(value: object, text: str, offered: Mapping[str, Tool], *, lenient: bool, usual: bool = True) -> Call:
    """The call that `value`, written as `text`, stands for. `lenient` accepts `parameters` for `arguments`; `usual` says
    that the call stands where the model's template puts calls."""
    try:
        members, tool = identify(value, offered)
        given = members.get("arguments")
        in_form = type(given) is dict and len(members) == 2
        arguments = cast("dict[str, Any]", given) if in_form else find_arguments(members, lenient=lenient)
        complaint = validate(arguments, tool)
        if complaint is not None:
            raise Mistake(MalformedKind.SCHEMA, complaint)
    except Mistake as mistake:
        return Malformed(text, str(mistake), mistake.kind, asked_of(value, mistake.kind, lenient=lenient))
    return ToolCall(tool.name, arguments, lenient=not (usual and (in_form or "parameters" not in members)))


def asked_of(value: object, kind: MalformedKind, *, lenient: bool) -> tuple[str, JsonObject] | None:
    """The name and the arguments of a call that is one, but for the tools that there are."""
    if kind not in (MalformedKind.UNKNOWN_TOOL, MalformedKind.SCHEMA):
        return None
    members = cast("dict[str, Any]", value)
    try:
        return members["name"], find_arguments(members, lenient=lenient)
    except Mistake:  # more is wrong with it, which the model is told when it has found the tool
        return None


def identify(value: object, offered: Mapping[str, Tool]) -> tuple[dict[str, Any], Tool]:
    """The members of a call's object, and the tool that it names."""
    if type(value) is not dict:
        raise Mistake(MalformedKind.NOT_AN_OBJECT, f"a call is one object {SHAPE}, got {show(value)}")
    members = cast("dict[str, Any]", value)
    name = members.get("name")
    tool = offered.get(name) if type(name) is str else None
    if tool is None:
        raise blame_name(members, list(offered))
    return members, tool


def blame_name(members: Mapping[str, Any], names: list[str]) -> Mistake:
    name = members.get("name")
    if "name" not in members or name == "":
        return Mistake(MalformedKind.NO_NAME, f'the call has no "name"; write {SHAPE}')
    if not isinstance(name, str):
        return Mistake(MalformedKind.NO_NAME, f'"name" must be the name of a tool, got {show(name)}')
    if not names:
        return Mistake(
            MalformedKind.UNKNOWN_TOOL, f"there is no tool {quote(name)}; there are no tools, so answer without a call"
        )
    near = get_close_matches(name[:100], names, 1) or [known for known in names if known in name]
    guess = f"; did you mean {quote(near[0])}?" if near else "."
    tools = f"The tools are {listed(names, last='and', limit=20)}" if len(names) > 1 else f"The only tool is {quote(names[0])}"
    return Mistake(MalformedKind.UNKNOWN_TOOL, f"there is no tool {quote(name)}{guess} {tools}")


def find_arguments(members: Mapping[str, Any], *, lenient: bool) -> dict[str, Any]:
    """The arguments of a call in any form that is accepted. Anything else beside the tool's name is refused, not dropped."""
    key = "arguments"
    if key not in members and "parameters" in members:
        if not lenient:
            raise Mistake(MalformedKind.BAD_ARGUMENTS, 'write "arguments" instead of "parameters"')
        key = "parameters"
    if len(members) > 1 + (key in members):
        others = listed([name for name in members if name not in ("name", key)], last="and")
        raise Mistake(MalformedKind.BAD_ARGUMENTS, f'unknown {others} beside "name" and "{key}"; arguments go inside "{key}"')
    return read_arguments(members[key]) if key in members else {}


def read_arguments(value: object) -> dict[str, Any]:
    """The arguments, given as an object or as a string that holds its JSON."""
    if isinstance(value, str):
        try:
            value = read_whole(value.strip())
        except NotJson as error:
            message = f'"arguments" must be an object, got a string that is no JSON object: {error}'
            raise Mistake(MalformedKind.BAD_ARGUMENTS, message) from error
    if type(value) is not dict:
        raise Mistake(MalformedKind.BAD_ARGUMENTS, f'"arguments" must be an object such as {{"a": 1}}, got {show(value)}')
    return cast("dict[str, Any]", value)
