from __future__ import annotations

import json

import pytest
from broken_outputs import ADD, BROKEN, PING, TOOLS, Broken, call, found_in, tagged

from art_mcp.core.parse import Parsed, in_template_form, parse_calls, render_turn
from art_mcp.types import Malformed, MalformedKind, ToolCall

ADD_CALL = ToolCall("add", {"a": 1, "b": 2})
PING_CALL = ToolCall("ping", {})
CALLS = (
    ADD_CALL,
    PING_CALL,
    ToolCall("add", {"a": -0.5, "b": 12345678901234567890}),
    ToolCall("weather", {"city": "Zürich 🏔 東京", "unit": "c"}),
    ToolCall("search", {"query": '}{][ " \\ \n\t </tool_call> <tool_call>\n{', "limit": None}),
    ToolCall("search", {"query": "a</tool_call>", "filter": {"tags": ["<tool_call>", "</tool_call>"], "exact": True}}),
    ToolCall("run", {"deep": {"er": [{"and": [[], {}, [1, [2.5, "x"]]]}]}, "": "no name", "name": "run", "arguments": {}}),
    ToolCall("run", {"null byte": "\u0000", "colons": "a: b: c", "control": "\u001f", "half open": '{"name": "add'}),
)
CONTENTS = (
    "",
    "I call a tool.",
    "two lines\nand a blank one\n",
    " ",
    "\n",
    "</tool_call>, says the model",
    "Grüße 👋 {not: json}",
)
WELL_FORMED = [(content, CALLS[first : first + count]) for content in CONTENTS for first, count in ((0, 1), (3, 2), (0, 5))]
WELL_FORMED += [(content, (one,)) for content in CONTENTS[:3] for one in CALLS] + [(content, ()) for content in CONTENTS]
WELL_FORMED += [("", CALLS[first:] * 2) for first in range(len(CALLS))]

ACCEPTED = {
    "no line breaks": f"<tool_call>{ADD}</tool_call>",
    "windows line breaks": f"<tool_call>\r\n{ADD}\r\n</tool_call>\r\n",
    "no close tag at the end": f"<tool_call>\n{ADD}",
    "no close tag at the end of a line": f"<tool_call>\n{ADD}\n",
    "no close tag before another call": f"<tool_call>\n{ADD}\n<tool_call>\n{ADD}\n</tool_call>",
    "compact": '<tool_call>{"name":"add","arguments":{"a":1,"b":2}}</tool_call>',
    "indented": f"<tool_call>\n{json.dumps(json.loads(ADD), indent=2)}\n</tool_call>",
    "arguments first": tagged('{"arguments": {"b": 2, "a": 1}, "name": "add"}'),
    "unicode escapes": tagged('{"\\u006eame": "\\u0061dd", "arguments": {"\\u0061": 1, "b": 2}}'),
    "arguments as a string": tagged('{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 2}"}'),
    "arguments as a string with blanks": tagged('{"name": "add", "arguments": " {\\"a\\": 1,\\n\\"b\\": 2}\\n"}'),
    "floats": tagged('{"name": "add", "arguments": {"a": 1.0, "b": 20e-1}}'),
    "prose around": f"First:\n\n{tagged(ADD)}\nand then I wait.",
    "a stray close tag before": f"</tool_call>{tagged(ADD)}",
    "stray close tags after": f"{tagged(ADD)}</tool_call>\n</tool_call>",
}


@pytest.mark.parametrize(("content", "calls"), WELL_FORMED)
def test_what_the_template_writes_is_read_back_exactly(content: str, calls: tuple[ToolCall, ...]):
    text = render_turn(content, calls)
    parsed = parse_calls(text, TOOLS)
    assert parsed == Parsed(content, calls)
    assert in_template_form(text, parsed)


@pytest.mark.parametrize("text", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_other_spellings_of_a_complete_call_are_accepted_and_are_not_in_template_form(text: str):
    parsed = parse_calls(text, TOOLS)
    assert all(one == ADD_CALL for one in parsed.calls)
    assert len(parsed.calls) == text.count("<tool_call>")
    assert not in_template_form(text, parsed)


@pytest.mark.parametrize("output", BROKEN, ids=lambda output: output.about)
def test_every_call_that_the_model_began_is_found_and_classified(output: Broken):
    assert found_in(parse_calls(output.text, TOOLS)) == output.found


@pytest.mark.parametrize("output", BROKEN, ids=lambda output: output.about)
def test_a_mistake_is_told_shortly_with_the_text_that_was_written(output: Broken):
    for one in parse_calls(output.text, TOOLS).calls:
        if isinstance(one, Malformed):
            assert one.text.startswith("<tool_call>")
            assert one.text in output.text
            assert 10 < len(one.error.encode()) < 300
            assert "\n" not in one.error


def test_lenient_parsing_loses_no_call_either():
    for output in BROKEN:
        assert len(parse_calls(output.text, TOOLS, lenient=True).calls) >= len(output.found), output.about


def test_the_corpus_is_large_and_knows_every_kind():
    assert len(BROKEN) >= 200
    assert len({output.text for output in BROKEN}) == len(BROKEN)
    assert {kind for output in BROKEN for kind in output.found} >= set(MalformedKind) - {MalformedKind.INVALID_TAGS}
    assert len(WELL_FORMED) + len(ACCEPTED) >= 60


@pytest.mark.parametrize(
    ("body", "advice"),
    [
        ("{'name': 'ping'}", "line 1, column 2: use double quotes"),
        ('{"name": "run",\n "arguments": {"x": y}}', "line 2, column 21: a value is missing or is not JSON"),
        ('{"name": "ping",\n "arguments": {},}', "remove the comma before the closing bracket"),
        ('{"name": "run", "arguments": {"x": True}}', "column 36: write true, false and null in lower case"),
        ('{"name": "run", "arguments": {"x": "a\nb"}}', "write a line break inside a string as \\n"),
        ('{"name": "run", "arguments": {"x": NaN}}', "NaN is not a JSON value"),
        ('{"name": "run", "arguments": {"x": [1', "the JSON is not finished; end it with ]}}"),
        ('{"name": "run", "arguments": {"x": 1}}}', "remove the extra }"),
        (f"{PING}\n{PING}", "write a <tool_call> for each call"),
        ('{"name": "ad", "arguments": {}}', 'did you mean "add"? The tools are "add", "ping", "weather", "search" and "run"'),
        ('{"name": "add", "arguments": {"a": 1}}', 'missing argument "b"; add needs "a" and "b"'),
        ('{"name": "add"}', 'missing arguments "a" and "b"; add needs "a" and "b"'),
        ('{"name": "add", "arguments": {"a": "12", "b": 2}}', '"a" must be a number, got the string "12"'),
        ('{"name": "add", "parameters": {"a": 1, "b": 2}}', 'write "arguments" instead of "parameters"'),
        ('{"name": "add", "arguments": {"a": 1}, "b": 2}', 'unknown "b" beside "name" and "arguments"'),
    ],
)
def test_the_message_says_what_to_fix(body: str, advice: str):
    (one,) = parse_calls(tagged(body), TOOLS).calls
    assert isinstance(one, Malformed)
    assert advice in one.error


def test_a_message_has_one_line_whatever_it_quotes():
    (one,) = parse_calls(tagged(call("line\u2028, \x85, \x7f", {})), TOOLS).calls
    assert isinstance(one, Malformed)
    assert 'there is no tool "line\\u2028, \\u0085, \\u007f"' in one.error


def test_without_tools_the_model_is_told_to_answer():
    (one,) = parse_calls(tagged(PING), ()).calls
    assert isinstance(one, Malformed)
    assert (one.kind, "answer without a call" in one.error) == (MalformedKind.UNKNOWN_TOOL, True)


def test_a_tool_without_required_arguments_needs_no_arguments():
    assert parse_calls(tagged('{"name": "ping"}'), TOOLS).calls == (PING_CALL,)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (f"before\n{tagged(PING)}", "before"),
        (f"before\n\n{tagged(PING)}", "before\n"),
        (f"before {tagged(PING)}", "before "),
        (f"\n{tagged(PING)}\n", ""),
        (f"one\n{tagged(PING)}\ntwo\n{tagged(PING)}three{tagged('{')}\n\n  four\n", "one\ntwo\nthree\n  four"),
        (f"{tagged(PING)}\n\n{tagged(PING)} \n", ""),
        ("no call\n", "no call\n"),
        ("a < b and </tool_call>", "a < b and </tool_call>"),
    ],
)
def test_text_around_calls_is_kept_without_the_line_breaks_that_set_calls_off(text: str, content: str):
    assert parse_calls(text, TOOLS).content == content


def test_a_turn_that_the_template_would_write_otherwise_is_not_in_template_form():
    for text in [f"\n{tagged(PING)}", f"{tagged(PING)}\n", f"{tagged(PING)}{tagged(PING)}", tagged("{}"), f"x{tagged(PING)}"]:
        assert not in_template_form(text, parse_calls(text, TOOLS)), text


@pytest.mark.parametrize(
    "unit", ["<tool_call>", "{", '<tool_call>{"', '<tool_call>{"a":', '{"name": "add", "arguments": \n', "```json\n{"]
)
@pytest.mark.parametrize("lenient", [False, True])
def test_long_nonsense_is_read_whole(unit: str, lenient: bool):
    text = unit * (100_000 // len(unit))
    parsed = parse_calls(text, TOOLS, lenient=lenient)
    assert len(parsed.calls) >= text.count("<tool_call>")
