from __future__ import annotations

import json
import re

from broken_outputs import ADD, PING, TOOLS, tagged
from hypothesis import given, settings
from hypothesis import strategies as st

from art_mcp.core.parse import Parsed, in_template_form, parse_calls, render_turn
from art_mcp.types import Malformed, Tool, ToolCall

FREE = Tool("free", "Takes anything", {"type": "object", "additionalProperties": True})

PIECES = """<tool_call> </tool_call> { } [ ] " \\ \\u ' , : " name" "name" "arguments" ```json ``` ```python null NaN 1e999"""
FRAGMENTS = st.sampled_from([*PIECES.split(" "), "\n", " ", "\ud800", "```\n", ADD, PING, tagged(ADD), ADD[:25]])
TEXTS = st.lists(FRAGMENTS | st.text(max_size=5), max_size=25).map("".join)
JSON_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    ["<tool_call>", "</tool_call>", "\n</tool_call>\n", '"}}', '{"name": ', "\\", "\\u0041", '"', ":", "```"]
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | JSON_TEXT,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(JSON_TEXT, values, max_size=3),
    max_leaves=8,
)
FREE_CALLS = st.dictionaries(JSON_TEXT, JSON_VALUES, max_size=4).map(lambda arguments: ToolCall("free", arguments))


@settings(max_examples=300, deadline=None)
@given(text=TEXTS, lenient=st.booleans())
def test_no_text_makes_the_parser_raise_or_lose_a_tag(text: str, lenient: bool):
    parsed = parse_calls(text, TOOLS, lenient=lenient)
    assert bool(parsed.calls) or parsed.content == text
    assert "<tool_call>" not in parsed.content
    for one in parsed.calls:
        json.dumps(one.arguments if isinstance(one, ToolCall) else one.error, ensure_ascii=False, allow_nan=False).encode()


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_every_open_tag_is_a_call_or_inside_one_and_all_visible_text_is_kept(text: str):
    parsed = parse_calls(text, TOOLS)
    rest = text
    for one in parsed.calls:
        if isinstance(one, Malformed):
            before, _, rest = rest.partition(one.text)
            assert_kept(before, parsed.content)
    assert_kept(rest, parsed.content)
    assert len(parsed.calls) <= text.count("<tool_call>")


def assert_kept(text: str, content: str) -> None:
    """What stands outside of the tag pairs of `text` stands in `content`."""
    for piece in re.split(r"(?s)<tool_call>.*?(?:</tool_call>|(?=<tool_call>)|\Z)", text):
        assert piece.strip() in content


@settings(max_examples=300, deadline=None)
@given(content=st.text(max_size=20).filter(lambda text: "<tool_call>" not in text), calls=st.lists(FREE_CALLS, max_size=4))
def test_any_arguments_come_back_from_the_template_exactly(content: str, calls: list[ToolCall]):
    text = render_turn(content, calls)
    parsed = parse_calls(text, [FREE])
    assert parsed == Parsed(content, tuple(calls))
    assert in_template_form(text, parsed)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), calls=st.lists(FREE_CALLS, min_size=1, max_size=4), lenient=st.booleans())
def test_intact_calls_survive_whatever_stands_between_them(data: st.DataObject, calls: list[ToolCall], lenient: bool):
    damaged = st.sampled_from([render_turn("", [one]) for one in calls]).flatmap(mutations)
    text = data.draw(damaged)
    for one in calls:
        text += render_turn("", [one]) + data.draw(damaged | TEXTS)
    found = iter(parse_calls(text, [FREE], lenient=lenient).calls)
    assert all(one in found for one in calls)  # each is found behind the one before it


def mutations(text: str) -> st.SearchStrategy[str]:
    """`text` with one slice deleted, doubled or put elsewhere."""
    places = st.tuples(*[st.integers(0, len(text))] * 3).map(sorted)
    return places.flatmap(
        lambda at: st.sampled_from(
            [
                text[: at[0]] + text[at[1] :],
                text[: at[1]] + text[at[0] :],
                text[: at[0]] + text[at[1] : at[2]] + text[at[0] : at[1]] + text[at[2] :],
            ]
        )
    )
