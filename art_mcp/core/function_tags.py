"""A policy's turn in the form of Qwen3-Coder and Qwen3.5 → the calls that it began: `<function=…>` with `<parameter=…>` in it.

<tool_call>
<function=add>
<parameter=a>
1
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from art_mcp.core.json_scan import SPACE
from art_mcp.core.parse import CLOSE, OPEN, Parsed, join_texts, next_tag
from art_mcp.core.read_call import Call, Mistake, by_name, read_body, read_call
from art_mcp.core.schemas import members_of
from art_mcp.core.untyped import kinds_of, read_text_value
from art_mcp.types import JsonObject, Malformed, MalformedKind, Tool

FUNCTION = re.compile(r"\s*<function=([^<>\n]*)>")
PARAMETER = re.compile(r"\s*<parameter=([^<>\n]*)>\n?")
VALUE_END = re.compile(r"\n?</parameter>(?=\s*(?:<parameter=|</function>))")
"""A value may hold any text, other tags too: it ends where what follows can only be another part of the call."""
FUNCTION_END = re.compile(r"\s*(</function>)\s*")
SHAPE = "<function=NAME>, then <parameter=NAME>, its value and </parameter> for each argument, then </function>"

Span: TypeAlias = tuple[int, int]


class Ends:
    """Where values may end in a text, found once, so that reading takes time in proportion to it however many calls it has."""

    def __init__(self, text: str) -> None:
        self._spans: list[Span] = [match.span() for match in VALUE_END.finditer(text)]

    def after(self, at: int) -> Span | None:
        """The first end at or after `at`: where the value stops, and where its close tag does."""
        place = bisect_left(self._spans, (at, 0))
        # the newline before a close tag may be the one that opens an empty value, and so lie before `at`
        if place and self._spans[place - 1][0] == at - 1 and self._spans[place - 1][1] > at:
            return at, self._spans[place - 1][1]
        return self._spans[place] if place < len(self._spans) else None


def parse_functions(text: str, tools: Sequence[Tool], *, lenient: bool = False) -> Parsed:
    """Every `<tool_call>` outside of a value is one ToolCall, or one Malformed that says what to fix. Never raises.

    A value is what the tool's schema says (`kinds_of`), since this form writes a number and its digits alike. The last close
    tag may be missing where another call or the end of the turn follows. `lenient` also reads a `<function=…>` without the tag
    around it, and the JSON of Hermes' form in it; such calls have `lenient=True`.
    """
    if OPEN not in text and not (lenient and "<function=" in text):
        return Parsed(text, ())
    offered, ends = by_name(tools), Ends(text)
    texts: list[str] = []
    calls: list[Call] = []
    end = 0
    while (start := next_start(text, end, lenient=lenient)) >= 0:
        texts.append(text[end:start])
        call, end = read_function(text, start, ends, offered, lenient=lenient)
        calls.append(call)
    texts.append(text[end:])
    texts[0] = texts[0].removesuffix("\n") if calls else texts[0]  # this form's templates put two before a call
    return Parsed(join_texts(texts) if calls else text, tuple(calls))


def next_start(text: str, at: int, *, lenient: bool) -> int:
    tagged = text.find(OPEN, at)
    bare = text.find("<function=", at) if lenient else -1
    return min((place for place in (tagged, bare) if place >= 0), default=-1)


def read_function(text: str, start: int, ends: Ends, offered: Mapping[str, Tool], *, lenient: bool) -> tuple[Call, int]:
    """The call that begins at `start`, and where it ends."""
    tagged = text.startswith(OPEN, start)
    inside = start + len(OPEN) * tagged
    try:
        name, head = read_name(text, inside)
        given, end = read_parameters(text, head, ends, offered.get(name))
        end = read_close(text, end, tagged=tagged)
    except Mistake as mistake:
        stop, end = next_tag(text, inside)
        body = text[inside:stop].strip(SPACE)
        if lenient and body[:1] in ("{", "["):
            return read_json(body, text[start:end], offered), end
        return Malformed(text[start:end], str(mistake), mistake.kind), end
    value = {"name": name, "arguments": given}
    return read_call(value, text[start:end], offered, lenient=lenient, usual=tagged), end


def read_json(body: str, written: str, offered: Mapping[str, Tool]) -> Call:
    try:
        value = read_body(body)
    except Mistake as mistake:
        return Malformed(written, str(mistake), mistake.kind)
    return read_call(value, written, offered, lenient=True, usual=False)


def read_name(text: str, at: int) -> tuple[str, int]:
    head = FUNCTION.match(text, at)
    if head is None:
        stop, _ = next_tag(text, at)
        empty = not text[at:stop].strip(SPACE)
        kind = MalformedKind.EMPTY if empty else MalformedKind.INVALID_TAGS
        raise Mistake(kind, f"the call {'is empty' if empty else 'does not begin with <function=NAME>'}; write {SHAPE}")
    name = head[1].strip()
    if not name:
        raise Mistake(MalformedKind.NO_NAME, f"the call has no name; write {SHAPE}")
    return name, head.end()


def read_parameters(text: str, at: int, ends: Ends, tool: Tool | None) -> tuple[JsonObject, int]:
    """The arguments that are written from `at` on, and where the first of anything else begins."""
    schema: Mapping[str, Any] = {} if tool is None else tool.parameters
    known = members_of(schema.get("properties"))
    given: JsonObject = {}
    while head := PARAMETER.match(text, at):
        name = head[1].strip()
        ending = ends.after(head.end())
        if not name or name in given:
            told = f"<parameter={name}> is there twice; write it once" if name else "a <parameter=…> has no name; write one"
            raise Mistake(MalformedKind.BAD_ARGUMENTS, told)
        value = "" if ending is None else text[head.end() : ending[0]]
        if ending is None or any(f"\n<parameter={other}>\n" in f"\n{value}" for other in known):
            raise Mistake(MalformedKind.INVALID_TAGS, f"<parameter={name}> is not closed; write </parameter> after its value")
        given[name] = read_text_value(value, kinds_of(known.get(name, True), schema))
        at = ending[1]
    return given, at


def read_close(text: str, at: int, *, tagged: bool) -> int:
    """Where the call ends whose last parameter ends at `at`."""
    closed = FUNCTION_END.match(text, at)
    if closed is None:
        unfinished = not text[at:].strip()
        what = "the call is not finished" if unfinished else "text follows where a <parameter=…> or </function> should be"
        raise Mistake(MalformedKind.INVALID_TAGS, f"{what}; write </function> after the last </parameter>, then {CLOSE}")
    end = closed.end()
    if text.startswith(CLOSE, end):
        return end + len(CLOSE)
    if tagged and text.startswith("<function=", end):
        raise Mistake(MalformedKind.INVALID_TAGS, f"more than one function in one call; write {OPEN} for each call")
    if tagged and end < len(text) and not text.startswith(OPEN, end):
        raise Mistake(MalformedKind.INVALID_TAGS, f"text follows </function>; write {CLOSE} right after it")
    return closed.end(1)
