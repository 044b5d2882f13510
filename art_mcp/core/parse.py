"""A policy's turn as text → the calls that it began, each of them. Hermes/Qwen form; what tools do is not known here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

from art_mcp.core.bare import find_bare
from art_mcp.core.json_scan import SPACE
from art_mcp.core.read_call import Call, Mistake, by_name, read_body, read_call, read_usual
from art_mcp.types import Malformed, Tool, ToolCall

OPEN, CLOSE = "<tool_call>", "</tool_call>"

Pieces: TypeAlias = "tuple[list[str], list[Call]]"
"""Texts and calls, taking turns: there is one text (perhaps empty) before each call, and one after the last."""

BODY = re.compile(
    r"""(?: [^"<\\]++ | \\["\\]?+ | <(?!/?tool_call>)
          | "[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+" (?=\s*+(?:[,:}\]]|</tool_call>)) )*+""",
    re.VERBOSE,
)
"""Everything up to a tag that stands outside of strings. A quote opens a string only where the string has no line break and is
followed as JSON wants it: so a call that lost a quote does not swallow the next one. An escaped quote opens none: so no part of
the text is searched for the end of more than one string."""


@dataclass(slots=True)  # not frozen: that would be half of the time that a turn without a call takes
class Parsed:
    """A turn, read. `content` is the text outside of calls, `calls` is every call that the model began, in order.

    `content` is the text before the first call without the one newline that Qwen's template puts there, then, each on a line of
    its own, what text there is between and after calls (blank text and newlines at the edges dropped).
    """

    content: str
    calls: tuple[Call, ...]


def parse_calls(text: str, tools: Sequence[Tool], *, lenient: bool = False) -> Parsed:
    """Every `<tool_call>` outside of a string is one ToolCall, or one Malformed that says what to fix. Never raises.

    The close tag may be missing where the JSON is complete and another call or the end of the turn follows. `lenient`
    also reads calls that stand on lines of their own without tags, alone, in a list or in a ```json fence, `parameters` for
    `arguments`, and lists in one tag pair; such calls have `lenient=True`. Takes time in proportion to the text.
    """
    if not lenient and OPEN not in text:
        return Parsed(text, ())
    offered = by_name(tools)
    usual = None if lenient else parse_usual(text, offered)
    if usual is not None:
        return usual
    texts, calls = find_tagged(text, offered, lenient=lenient)
    if lenient:
        texts, calls = add_bare(texts, calls, offered)
    return Parsed(join_texts(texts) if calls else text, tuple(calls))


def parse_usual(text: str, offered: Mapping[str, Tool]) -> Parsed | None:
    """What nearly every turn is, read at once: all its calls are complete, in the usual form, and can be made. None where one
    needs a closer look."""
    before, *pieces = text.split(OPEN)
    texts: list[str] = []
    calls: list[Call] = []
    for piece in pieces:
        body, closed, after = piece.partition(CLOSE)
        call = read_usual(body, offered) if closed else None
        if call is None:
            return None
        calls.append(call)
        if after and not after.isspace():
            texts.append(after)
    return Parsed(join_texts([before, *texts]) if texts else before.removesuffix("\n"), tuple(calls))


def in_template_form(text: str, parsed: Parsed) -> bool:
    """Whether Qwen's template renders the message `parsed` (with all its calls) as exactly `text`."""
    calls = [call for call in parsed.calls if isinstance(call, ToolCall)]
    return len(calls) == len(parsed.calls) and render_turn(parsed.content, calls) == text


def render_turn(content: str, calls: Iterable[ToolCall]) -> str:
    """What Qwen2.5's template writes for an assistant message, between the generation prompt and the stop token."""
    written = [f'{OPEN}\n{{"name": "{call.name}", "arguments": {to_json(call.arguments)}}}\n{CLOSE}' for call in calls]
    return "\n".join([content, *written] if content or not written else written)


to_json = json.JSONEncoder(ensure_ascii=False).encode


def find_tagged(text: str, offered: Mapping[str, Tool], *, lenient: bool) -> Pieces:
    """Splits at each open tag that is not inside a call. A close tag without an open one is text."""
    texts: list[str] = []
    calls: list[Call] = []
    end = 0
    while (start := text.find(OPEN, end)) >= 0:
        texts.append(text[end:start])
        found, end = read_tagged(text, start, offered, lenient=lenient)
        calls.extend(found)
        if len(found) > 1:
            texts.extend([""] * (len(found) - 1))
    texts.append(text[end:])
    return texts, calls


def read_tagged(text: str, start: int, offered: Mapping[str, Tool], *, lenient: bool) -> tuple[list[Call], int]:
    """The call whose open tag is at `start` (in lenient mode perhaps several), and where it ends."""
    inside = start + len(OPEN)
    stop, end = next_tag(text, inside)
    try:
        value = read_body(text[inside:stop].strip(SPACE))
    except Mistake as mistake:
        beyond = skip_strings(text, inside)
        if beyond <= stop:
            return [Malformed(text[start:end], str(mistake), mistake.kind)], end
        stop, end = next_tag(text, beyond)  # the first tag was inside a string
        try:
            value = read_body(text[inside:stop].strip(SPACE))
        except Mistake as final:
            return [Malformed(text[start:end], str(final), final.kind)], end
    if lenient and isinstance(value, list) and value:
        several = cast("list[object]", value)
        return [read_call(each, to_json(each), offered, lenient=True, usual=False) for each in several], end
    return [read_call(cast(object, value), text[start:end], offered, lenient=lenient)], end


def next_tag(text: str, at: int) -> tuple[int, int]:
    """Where a call's body stops, the first tag at or after `at` or the end; and where the call ends, its close tag included."""
    limit = text.find(OPEN, at)
    if limit < 0:
        limit = len(text)
    close = text.find(CLOSE, at, limit)
    return (close, close + len(CLOSE)) if close >= 0 else (limit, limit)


def skip_strings(text: str, at: int) -> int:
    match = BODY.match(text, at)
    return match.end() if match else at


def add_bare(texts: Sequence[str], calls: Sequence[Call], offered: Mapping[str, Tool]) -> Pieces:
    """The pieces with the bare calls of each text found too."""
    all_texts: list[str] = []
    all_calls: list[Call] = []
    for index, text in enumerate(texts):
        found_texts, found_calls = find_bare(text, offered)
        all_texts += found_texts
        all_calls += [*found_calls, *calls[index : index + 1]]
    return all_texts, all_calls


def join_texts(texts: Sequence[str]) -> str:
    first = texts[0].removesuffix("\n")
    rest = [text.strip("\r\n") for text in texts[1:] if text.strip()]
    return "\n".join([first, *rest] if first else rest)
