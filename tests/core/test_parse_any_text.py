from __future__ import annotations

import json

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
CUTS = st.lists(st.floats(0, 1), min_size=3, max_size=3)
FREE_CALLS = st.dictionaries(JSON_TEXT, JSON_VALUES, max_size=4).map(lambda arguments: ToolCall("free", arguments))


@settings(max_examples=200, deadline=None)
@given(text=TEXTS, lenient=st.booleans())
def test_no_text_makes_the_parser_raise_or_lose_a_tag(text: str, lenient: bool):
    parsed = parse_calls(text, TOOLS, lenient=lenient)
    assert bool(parsed.calls) or parsed.content == text
    assert "<tool_call>" not in parsed.content
    for one in parsed.calls:
        json.dumps(one.arguments if isinstance(one, ToolCall) else one.error, ensure_ascii=False, allow_nan=False).encode()


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_calls_and_content_are_the_whole_text(text: str):
    parsed = parse_calls(text, tools=())  # no tool is known, so every call shows its text
    outside: list[str] = []
    rest = text
    for one in parsed.calls:
        assert isinstance(one, Malformed)
        before, _, rest = rest.partition(one.text)
        outside.append(before)
    outside.append(rest)
    assert not any("<tool_call>" in piece for piece in outside)
    assert [line for piece in outside for line in lines(piece)] == lines(parsed.content)


def lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


@settings(max_examples=200, deadline=None)
@given(content=st.text(max_size=20).filter(lambda text: "<tool_call>" not in text), calls=st.lists(FREE_CALLS, max_size=4))
def test_any_arguments_come_back_from_the_template_exactly(content: str, calls: list[ToolCall]):
    text = render_turn(content, calls)
    parsed = parse_calls(text, [FREE])
    assert parsed == Parsed(content, tuple(calls))
    assert in_template_form(text, parsed)


@settings(max_examples=150, deadline=None)
@given(
    calls=st.lists(FREE_CALLS, min_size=1, max_size=3),
    noise=st.lists(TEXTS, min_size=4, max_size=4),
    cuts=CUTS,
    lenient=st.booleans(),
)
def test_intact_calls_survive_whatever_stands_between_them(
    calls: list[ToolCall], noise: list[str], cuts: list[float], lenient: bool
):
    written = [render_turn("", [one]) for one in calls]
    noise[0] += damage(written[0], cuts)
    noise[1] = damage(written[-1], cuts[::-1]) + noise[1]
    text = noise[0] + "".join(one + between for one, between in zip(written, noise[1:], strict=False))
    found = iter(parse_calls(text, [FREE], lenient=lenient).calls)
    assert all(one in found for one in calls)  # each is found behind the one before it


def damage(text: str, cuts: list[float]) -> str:
    """`text` with a slice left out, doubled, or changed with its neighbour, depending on the order of the cuts."""
    first, second, third = (int(cut * len(text)) for cut in cuts)
    return text[:first] + text[second:third] + text[min(first, second) :]
