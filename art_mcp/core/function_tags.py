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
import sys
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias

from art_mcp.core.arguments import signature_of, unfit
from art_mcp.core.json_scan import SPACE, NotJson, check_arguments, quote
from art_mcp.core.parse import CLOSE, OPEN, Parsed, join_texts, read_tagged
from art_mcp.core.read_call import Call, Mistake, by_name, read_call
from art_mcp.core.untyped import ALL, parameter_kinds, read_text_value
from art_mcp.types import JsonObject, Malformed, MalformedKind, Tool, ToolCall

HEAD = re.compile(r"\s*<function=([^<>\n]*)>")
BARE_HEAD = re.compile(r"^[ \t]*(?=<function=[^<>\n]*>\s*(?:<parameter=|</function>))", re.MULTILINE)
PARAMETER = re.compile(r"\s*<parameter=([^<>\n]*)>\n?")
ANY_PARAMETER = re.compile(r"(^[ \t]*)?<parameter=([^<>\n]*)>", re.MULTILINE)
OWN_END = re.compile(r"\n</parameter>(?=\n<parameter=|\n</function>\s*(?:</?tool_call>|\Z))")
ANY_END = re.compile(r"\n?</parameter>(?=\s*(?:<parameter=|</function>))")
NEXT_CALL = re.compile(r"</tool_call>\s*<tool_call>\s*<function=([^<>\n]*)>")
FUNCTION_END = re.compile(r"\s*(</function>)\s*")
NOTHING = re.compile(r"\s*\Z")
SHAPE = "<function=NAME>, then <parameter=NAME>, its value and </parameter> for each argument, then </function>"

BEYOND = sys.maxsize
"""A place that no text has."""

Span: TypeAlias = tuple[int, int]


def parse_functions(text: str, tools: Sequence[Tool], *, lenient: bool = False) -> Parsed:
    """Every `<tool_call>` outside of a value is one ToolCall, or one Malformed that says what to fix. Never raises.

    A value is of a kind that the tool's schema says (`parameter_kinds`): this form writes a number and its digits alike. It may
    be any text, tags too, but for what ends a call as the template writes it, for a line that begins with the tag of one of
    the tool's own parameters, and for two calls in a row: there a close tag is taken to be missing. The last close tag may be
    missing where another call or the end of the turn follows.

    `lenient` also reads a `<function=…>` that stands on a line of its own without the tag around it, and JSON as `parse_calls`
    reads it within the tag; such calls have `lenient=True`. Takes time in proportion to the text.
    """
    if OPEN not in text and not (lenient and "<function=" in text):
        return Parsed(text, ())
    reader = Reader(text, by_name(tools), lenient=lenient)
    texts: list[str] = []
    calls: list[Call] = []
    end = 0
    while (start := reader.next_start(end)) < BEYOND:
        texts.append(text[end:start])
        found, end = reader.read(start)
        calls.extend(found)
        texts.extend([""] * (len(found) - 1))
    texts.append(text[end:])
    texts[0] = texts[0].removesuffix("\n") if calls else texts[0]  # this form's templates put two before a call
    return Parsed(join_texts(texts) if calls else text, tuple(calls))


class Reader:
    """Reads one text; what it looks for again and again is found once."""

    def __init__(self, text: str, offered: Mapping[str, Tool], *, lenient: bool) -> None:
        self._text, self._offered, self._lenient = text, offered, lenient
        bare = [match.end() for match in BARE_HEAD.finditer(text)] if lenient else []
        self._starts, self._closes = sorted(places(OPEN, text) + bare), places(CLOSE, text)
        self._value_closes = places("</parameter>", text)
        self._own_ends = [match.span() for match in OWN_END.finditer(text)]
        self._any_ends = [match.span() for match in ANY_END.finditer(text)]
        self._next_calls = [match.start() for match in NEXT_CALL.finditer(text) if match[1].strip() in offered]
        self._parameters = [
            (match.start() if match[1] is None else match.end(1), match[2].strip(), match[1] is not None)
            for match in ANY_PARAMETER.finditer(text)
        ]
        self._lost: dict[tuple[str, bool], list[int]] = {}
        self._known = 0
        """Up to where the call that is read now is understood: no call begins before."""

    def next_start(self, at: int) -> int:
        return first(self._starts, at)

    def read(self, start: int) -> tuple[list[Call], int]:
        """The call that begins at `start` (leniently perhaps several, as JSON), and where it ends."""
        text = self._text
        tagged = text.startswith(OPEN, start)
        self._known = start + len(OPEN) * tagged
        if tagged and self._lenient and text[self._known : self._known + 99].lstrip(SPACE)[:1] in ("{", "["):
            found, end = read_tagged(text, start, self._offered, lenient=True)
            return [replace(one, lenient=True) if isinstance(one, ToolCall) else one for one in found], end
        try:
            name = self._read_name()
            given, written = self._read_parameters(name)
            end = self._read_close(tagged=tagged)
        except Mistake as mistake:
            _, end = self._next_tag(max(self._known, start + 1))
            return [Malformed(text[start:end], str(mistake), mistake.kind)], end
        reading = partial(read_call, text=text[start:end], offered=self._offered, lenient=self._lenient, usual=tagged)
        call = reading({"name": name, "arguments": given})
        if isinstance(call, Malformed) and call.kind is MalformedKind.SCHEMA:
            call = reading({"name": name, "arguments": as_texts_where_only_they_fit(given, written, self._offered[name])})
        return [call], end

    def _next_tag(self, at: int) -> Span:
        """Where a broken call's body stops, at its close tag, where the next call begins or at the end of the text; and where
        the call ends, its close tag included."""
        limit, close = min(first(self._starts, at), len(self._text)), first(self._closes, at)
        return (close, close + len(CLOSE)) if close < limit else (limit, limit)

    def _read_name(self) -> str:
        head = HEAD.match(self._text, self._known)
        if head is None:
            stop, _ = self._next_tag(self._known)
            empty = not self._text[self._known : stop].strip(SPACE)
            kind = MalformedKind.EMPTY if empty else MalformedKind.INVALID_TAGS
            raise Mistake(kind, f"the call {'is empty' if empty else 'does not begin with <function=NAME>'}; write {SHAPE}")
        self._known = head.end()
        name = head[1].strip()
        if not name:
            raise Mistake(MalformedKind.NO_NAME, f"the call has no name; write {SHAPE}")
        return name

    def _kinds(self, function: str) -> Mapping[str, frozenset[str]]:
        """Of the parameters that the tool of this name has; none where there is no such tool."""
        tool = self._offered.get(function)
        return {} if tool is None else parameter_kinds(signature_of(tool).schema_text)

    def _read_parameters(self, function: str) -> tuple[JsonObject, Mapping[str, str]]:
        """The arguments that stand next, by what the tool's schema says of them; and as they are written."""
        kinds = self._kinds(function)
        written: dict[str, str] = {}
        given: JsonObject = {}
        while head := PARAMETER.match(self._text, self._known):
            name = head[1].strip()
            self._known = head.end()
            stop, self._known = self._value_end(function, name)
            if not name or name in given:
                told = f"parameter {quote(name)} is there twice; write it once" if name else "a <parameter=…> has no name"
                raise Mistake(MalformedKind.BAD_ARGUMENTS, told)
            written[name] = self._text[head.end() : stop]
            try:
                given[name] = read_text_value(written[name], kinds.get(name, ALL))
            except NotJson as error:
                raise Mistake(MalformedKind.BAD_ARGUMENTS, f"parameter {quote(name)}: {error}") from error
        try:
            check_arguments(given)
        except NotJson as error:
            raise Mistake(MalformedKind.BAD_ARGUMENTS, str(error)) from error
        return given, written

    def _value_end(self, function: str, name: str) -> Span:
        """Where the value that begins here stops, and where its close tag ends: as the template writes it, if it is so written,
        else as near to that as there is."""
        at = self._known
        forms = (True, False) if self._text[at - 1] == "\n" else (False,)
        for own in forms:
            span = first_after(self._own_ends if own else self._any_ends, at)
            limit = min(first(self._lost_after(function, own=own), at), first(self._next_calls, at))
            if span is not None and limit >= span[0]:
                return span
        lost = first(self._lost_after(function, own=forms[0]), at)
        if first(self._value_closes, at) < min(lost, first(self._next_calls, at)):
            told = f"text follows where </function> or another <parameter=…> should be, after parameter {quote(name)}"
            raise Mistake(MalformedKind.INVALID_TAGS, told)
        raise Mistake(MalformedKind.INVALID_TAGS, f"parameter {quote(name)} is not closed; write </parameter> after its value")

    def _lost_after(self, function: str, *, own: bool) -> list[int]:
        """Where tags of the tool's own parameters are: within a value they say that its close tag is missing; in one that is
        written as the template does, those with which a line begins."""
        key = (function, own)
        if key not in self._lost:
            known = self._kinds(function)
            self._lost[key] = [at for at, name, alone in self._parameters if name in known and (alone or not own)]
        return self._lost[key]

    def _read_close(self, *, tagged: bool) -> int:
        """Where the call ends whose last parameter has been read."""
        text = self._text
        closed = FUNCTION_END.match(text, self._known)
        if closed is None:
            unfinished = NOTHING.match(text, self._known) is not None
            what = "the call is not finished" if unfinished else "text follows where a <parameter=…> or </function> should be"
            raise Mistake(MalformedKind.INVALID_TAGS, f"{what}; write </function> after the last </parameter>, then {CLOSE}")
        self._known = closed.end(1)
        end = closed.end()
        if text.startswith(CLOSE, end):
            return end + len(CLOSE)
        if tagged and text.startswith("<function=", end):
            raise Mistake(MalformedKind.INVALID_TAGS, f"more than one function in one call; write {OPEN} for each call")
        if tagged and end < len(text) and not text.startswith(OPEN, end):
            raise Mistake(MalformedKind.INVALID_TAGS, f"text follows </function>; write {CLOSE} right after it")
        return self._known


def as_texts_where_only_they_fit(given: JsonObject, written: Mapping[str, str], tool: Tool) -> JsonObject:
    """Schemas say in many ways that a value is a string: where another does not fit and the text does, it was text."""
    texts: JsonObject = {**given, **{name: written[name] for name in unfit(given, tool) & written.keys()}}
    still = unfit(texts, tool)
    return {name: given[name] if name in still else value for name, value in texts.items()}


def places(part: str, text: str) -> list[int]:
    return [match.start() for match in re.finditer(re.escape(part), text)]


def first(ordered: Sequence[int], at: int) -> int:
    """The first of the `ordered` places at or after `at`; BEYOND where there is none."""
    found = bisect_left(ordered, at)
    return ordered[found] if found < len(ordered) else BEYOND


def first_after(spans: Sequence[Span], at: int) -> Span | None:
    """The first of the sorted `spans` at or after `at`. One that begins with the very newline before `at` counts too: it ends
    an empty value."""
    found = bisect_left(spans, (at - 1, 0))
    return (max(spans[found][0], at), spans[found][1]) if found < len(spans) else None
