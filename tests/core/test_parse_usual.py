"""The usual turn, read at once, is read as a closer look would read it; whatever is unusual is left to the closer look."""

from __future__ import annotations

import json

import pytest
from broken_outputs import ADD, BROKEN, PING, TOOLS, call, tagged
from hypothesis import given, settings
from hypothesis import strategies as st

from art_mcp.core.json_scan import MAX_DEPTH
from art_mcp.core.parse import OPEN, Parsed, find_tagged, join_texts, parse_calls, parse_usual, render_turn
from art_mcp.core.read_call import by_name
from art_mcp.types import ToolCall

OFFERED = by_name(TOOLS)
USUAL = (
    tagged(ADD),
    f"First.\n{tagged(PING)}\n{tagged(ADD)}\nI wait.\n",
    f"{tagged(ADD)}</tool_call>",
    tagged(call("search", {"query": "at 09:30, see https://example.org \\ \" '"})),
    tagged(call("search", {"query": "Zürich 東京 🏔", "limit": None})),
    tagged(call("run", {"deep": [{"er": [{"and": [1, 2.5, "a:b", {"c": []}]}]}]})),
    f"{OPEN}{ADD}</tool_call>",
    f"{OPEN} \r\n\t{json.dumps(json.loads(ADD), indent=1)} </tool_call>",
)
NAME = '{"name": "run", "arguments": '
UNUSUAL = {
    "a name twice": NAME + '{"a": 1, "a": 2}}',
    "a name twice, spaced": NAME + '{"a" : 1, "a"\n: 2}}',
    "a name twice, within": NAME + '{"a": [{"b": 1, "b": 1}]}}',
    "the tool's name twice": '{"name": "add", "name": "run", "arguments": {}}',
    "a name twice, and an escaped colon": NAME + '{"a": 1, "a": "\\u003a"}}',
    "a name with a colon": NAME + '{"a:b": 1}}',
    "a number too large": NAME + '{"a": [1e999]}}',
    "no number": NAME + '{"a": NaN}}',
    "half a character": NAME + '{"a": "\\ud800"}}',
    "half a character, written out": NAME + '{"a": "\ud800"}}',
    "too deep": NAME + '{"a": ' + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1) + "}}",
    "a tag in a string": NAME + '{"a": "</tool_call>"}}',
    "something beside": NAME + '{}, "id": 1}',
    "arguments as text": NAME + '"{}"}',
    "arguments as a list": NAME + '["a"]}',
    "no arguments": '{"name": "ping"}',
    "no object": "[1]",
    "text": '"name"',
    "a tool that is not there": '{"name": "runs", "arguments": {}}',
    "a name that is none": '{"name": ["run"], "arguments": {}}',
    "wrong arguments": '{"name": "add", "arguments": {"a": "1", "b": 2}}',
    "nothing": "",
}


def look_closer(text: str) -> Parsed:
    texts, calls = find_tagged(text, OFFERED, lenient=False)
    return Parsed(join_texts(texts), tuple(calls))


@pytest.mark.parametrize("text", USUAL)
def test_the_usual_turn_is_read_at_once_as_a_closer_look_reads_it(text: str):
    parsed = parse_usual(text, OFFERED)
    assert parsed is not None
    assert parsed == look_closer(text) == parse_calls(text, TOOLS)
    assert [type(call) for call in parsed.calls] == [ToolCall] * text.count(OPEN)


@pytest.mark.parametrize("body", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_what_is_unusual_is_left_to_the_closer_look(body: str):
    for text in (tagged(body), f"{tagged(PING)}\n{tagged(body)}\n{tagged(ADD)}"):
        assert parse_usual(text, OFFERED) is None
        assert parse_calls(text, TOOLS) == look_closer(text)


def test_as_deep_as_is_allowed_is_not_too_deep():
    text = tagged(NAME + '{"a": ' + "[" * (MAX_DEPTH - 2) + "]" * (MAX_DEPTH - 2) + "}}")
    assert parse_usual(text, OFFERED) == look_closer(text)


def test_broken_turns_are_never_read_at_once():
    for output in BROKEN:
        parsed = parse_usual(output.text, OFFERED) if OPEN in output.text else None
        assert parsed is None or parsed == look_closer(output.text), output.about


SNIPPETS = st.sampled_from(
    [":", '"', "\\", "\\u003a", '"a": 1,', ",", "{", "}", "[", "]", "e99", " ", "\n", "<tool_call>", "</tool_call>"]
)


@settings(max_examples=500, deadline=None)
@given(text=st.sampled_from(USUAL), cuts=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 3), SNIPPETS), max_size=3))
def test_spoiled_turns_are_read_as_a_closer_look_reads_them(text: str, cuts: list[tuple[int, int, str]]):
    for at, length, snippet in cuts:
        text = text[:at] + snippet + text[at + length :]
    parsed = parse_usual(text, OFFERED) if OPEN in text else None
    assert parsed is None or parsed == look_closer(text)


def test_a_call_that_is_read_at_once_is_a_whole_toolcall():
    (one,) = parse_calls(render_turn("", [ToolCall("ping", {})]), TOOLS).calls
    assert repr(one) == repr(ToolCall("ping", {}))
    assert hash(one.id) == hash("")


def test_tools_that_change_are_not_remembered():
    tools = list(TOOLS)
    assert by_name(tools).keys() == {tool.name for tool in TOOLS}
    tools.clear()
    assert by_name(tools) == {}
