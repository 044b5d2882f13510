"""Calls outside the template's own form: bare JSON on lines of its own, or in a ```json fence. Strict parsing stays away."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any, cast

from art_mcp.core.json_scan import NotJson, Unfinished, check_value, read_value
from art_mcp.core.read_call import Call, read_call
from art_mcp.types import Malformed, MalformedKind, Tool

JSON_LINE = re.compile(r'^[ \t]*+ (?:```(?:json|tool_call)?\s*+)? (?=(?:\[\s*+)?\{\s*+")', re.VERBOSE | re.MULTILINE)
"""A line on which JSON may start, perhaps after a fence. No such line is inside a JSON string, which has no line breaks."""

START = re.compile(
    r"""^[ \t]*+ (?: (?P<fence>```(?:json|tool_call)?\s*+)? (?=(?:\[\s*+)?\{\s*+")
                   | (?P<code>```[^`\n]*+\n (?s:.*?) (?:^[ \t]*+```|\Z)) )""",
    re.VERBOSE | re.MULTILINE,
)
"""Such a line, or a whole fence with something else in it, where nothing is a call."""

BEGUN = re.compile(
    r'(?:\[\s*+)?\{\s*+"name"\s*+:\s*+"(?P<name>[^"\\]*+)"\s*+(?P<arguments>,\s*+"(?:arguments|parameters)"\s*+:)?'
)
LINE_END = re.compile(r"[ \t]*+[,;]?[ \t]*+(?=\n|\Z|```)")
FENCE_END = re.compile(r"\s*+```[ \t]*+")
FENCE_REST = re.compile(r"(?s:.*?)(?:^[ \t]*+```|\Z)", re.MULTILINE)
PARAGRAPH_END = re.compile(r"\n[ \t]*+(?=\n|```)|\Z")
SHAPES = ({"name", "arguments"}, {"name", "parameters"})


def find_bare(text: str, offered: Mapping[str, Tool]) -> tuple[list[str], list[Call]]:
    """Splits text at its bare calls: one text before each call, and one after the last.

    JSON on lines of its own is a call where it has a `name` that is a string, `arguments` or `parameters`, and is fenced,
    names a tool or has no other member; a list, where each of its elements is. Broken JSON is one where it begins like that.
    """
    places = Places(text)
    texts: list[str] = []
    calls: list[Call] = []
    done = decided = 0
    fence_open = False
    while start := START.search(text, decided):
        if fence_open and (start["code"] or start["fence"] or text[done : start.start()].strip()):
            decided, fence_open = leave_fence(text, decided), False
            continue
        if start["code"]:
            decided = start.end()
            continue
        fence_open = fence_open or start["fence"] is not None
        found, decided = read_at(places, start.end(), offered, fenced=fence_open)
        if found:
            texts += [text[done : start.start()], *[""] * (len(found) - 1)]
            calls += found
            if fence_open and (closed := FENCE_END.match(text, decided)):
                decided, fence_open = closed.end(), False
            done = decided
    return [*texts, text[done:]], calls


def leave_fence(text: str, at: int) -> int:
    rest = FENCE_REST.match(text, at)
    return rest.end() if rest else len(text)


class Places:
    """Where JSON may begin in a text, in order, and where the line of each starts, its fence included."""

    def __init__(self, text: str) -> None:
        self.text = text
        lines: dict[int, int] = {}
        for match in JSON_LINE.finditer(text):
            lines.setdefault(match.end(), match.start())
        self.begins = list(lines)
        self.lines = list(lines.values())

    def read(self, begin: int) -> tuple[Any, int]:
        """The JSON value at `begin`, which is one of the places, and its end. Raises Broken.

        It is read up to the next place, then, while it is merely unfinished there, twice as far: every place that a reading
        went over is inside its JSON and not tried again, so that the whole takes time in proportion to the text.
        """
        index, reach = bisect_left(self.begins, begin), 1
        while True:
            last = index + reach >= len(self.begins)
            stop = len(self.text) if last else self.begins[index + reach]
            try:
                value, length = read_value(self.text[begin:stop])
                return value, begin + length
            except Unfinished as error:
                if last:
                    raise Broken(str(error), len(self.text)) from error
                reach *= 2
            except NotJson as error:
                raise Broken(str(error), self.end_of_broken(index, reach)) from error

    def end_of_broken(self, index: int, reach: int) -> int:
        """Up to where to take what broke within `reach` places: the next place that it surely did not go over."""
        following = index + max(1, reach // 2)
        end = self.lines[following] if following < len(self.lines) else len(self.text)
        paragraph = PARAGRAPH_END.search(self.text, self.begins[index], end) if reach == 1 else None
        return paragraph.start() if paragraph else end


def read_at(places: Places, begin: int, offered: Mapping[str, Tool], *, fenced: bool) -> tuple[list[Call], int]:
    """The calls of the JSON at `begin`, if it is any, and up to where the text is decided."""
    text = places.text
    try:
        value, end = places.read(begin)
    except Broken as broken:
        return read_broken(text[begin : broken.end], str(broken), offered), broken.end
    members = cast("list[Any]", value) if isinstance(value, list) else [value]
    line_end = LINE_END.match(text, end)
    if line_end is None or not members or not all(is_call(member, offered, fenced=fenced) for member in members):
        return [], end
    try:
        check_value(value, text[begin:end])
    except NotJson as error:
        return [Malformed(text[begin:end], str(error), MalformedKind.INVALID_JSON)], line_end.end()
    spelled = [json.dumps(member, ensure_ascii=False) for member in members] if members is value else [text[begin:end]]
    called = [read_call(m, t, offered, lenient=True, usual=False) for m, t in zip(members, spelled, strict=True)]
    return called, line_end.end()


def is_call(value: object, offered: Mapping[str, Tool], *, fenced: bool) -> bool:
    if not isinstance(value, dict):
        return False
    members = cast("dict[str, Any]", value)
    name = members.get("name")
    if not isinstance(name, str) or not ("arguments" in members or "parameters" in members):
        return False
    return fenced or name in offered or members.keys() in SHAPES


class Broken(Exception):
    """What was begun as JSON and is none, up to `end`."""

    def __init__(self, message: str, end: int) -> None:
        super().__init__(message)
        self.end = end


def read_broken(written: str, message: str, offered: Mapping[str, Tool]) -> list[Call]:
    """One Malformed if what was written begins as a call does; nothing if it is ordinary text with a bracket."""
    begun = BEGUN.match(written)
    if begun is None or not (begun["arguments"] or begun["name"] in offered):
        return []
    return [Malformed(written, message, MalformedKind.INVALID_JSON)]
