from __future__ import annotations

import json

import pytest
from broken_outputs import ADD, PING, TOOLS, found_in, tagged

from art_mcp.core.parse import Parsed, parse_calls
from art_mcp.types import ToolCall

LENIENT = {
    "bare": ADD,
    "indented": json.dumps(json.loads(ADD), indent=4),
    "after prose": f"I add them.\n\n{ADD}",
    "before prose": f"{ADD}\nThat was it.",
    "in a json fence": f"```json\n{ADD}\n```",
    "in a plain fence": f"So:\n```\n{ADD}\n```\nDone.",
    "in a fence on one line": f"```json {ADD} ```",
    "in a fence without an end": f"```json\n{ADD}",
    "behind a fence with other JSON": f'```json\n{{"a": 1}}\n```\n{ADD}',
    "behind a fence with code": f"```python\nprint({{}})\n```\n{ADD}",
    "with a comma behind": f"{ADD},",
    "with parameters": ADD.replace("arguments", "parameters"),
    "with parameters in tags": tagged(ADD.replace("arguments", "parameters")),
    "a list of one": f"[{ADD}]",
    "a list of one in tags": tagged(f"[{ADD}]"),
}


@pytest.mark.parametrize("text", LENIENT.values(), ids=LENIENT.keys())
def test_lenient_parsing_reads_a_call_outside_the_form_and_says_so(text: str):
    assert parse_calls(text, TOOLS, lenient=True).calls == (ToolCall("add", {"a": 1, "b": 2}, lenient=True),)
    assert not any(isinstance(one, ToolCall) for one in parse_calls(text, TOOLS).calls)


@pytest.mark.parametrize(
    "text", [f"{ADD}\n{PING}", f"[{ADD}, {PING}]", f"```json\n{ADD}\n{PING}\n```", f"{ADD},\n\n```\n{PING}\n```"]
)
def test_lenient_parsing_reads_several_calls_in_order(text: str):
    parsed = parse_calls(text, TOOLS, lenient=True)
    assert (found_in(parsed), parsed.content) == (("add", "ping"), "")


def test_lenient_parsing_keeps_the_order_of_bare_and_tagged_calls_and_marks_only_the_bare_ones():
    parsed = parse_calls(f"one\n{PING}\n{tagged(ADD)}\ntwo\n{PING}", TOOLS, lenient=True)
    assert parsed.calls == (
        ToolCall("ping", {}, lenient=True),
        ToolCall("add", {"a": 1, "b": 2}),
        ToolCall("ping", {}, lenient=True),
    )
    assert parsed.content == "one\ntwo"


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Ada", "age": 36}',
        '{"name": "Ada", "arguments": "none", "age": 36}',
        '{"name": 5, "arguments": {}}',
        '{"arguments": {}}',
        f"The model would write {ADD} here.",
        f"```python\n{ADD}\n```",
        f'[{ADD}, {{"x": 1}}]',
        '```json\n{"result": [1, 2, 3]}\n```\n```\n{"name": "x"}\n```',
        '{"a": 1,\n"b": ',
        "{\n{\n[{",
    ],
)
def test_ordinary_json_and_code_in_an_answer_are_no_calls(text: str):
    assert parse_calls(text, TOOLS, lenient=True) == Parsed(text, ())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"name": "nothing", "arguments": {}}', ("unknown_tool",)),
        ('{"name": "add", "arguments": {"a": 1}}', ("schema",)),
        ('{"name": "add", "arguments": {"a": 1, "b": 2}, "id": 7}', ("bad_arguments",)),
        (ADD[:-1], ("invalid_json",)),
        (f"{ADD[:-1]},}}", ("invalid_json",)),
        (f"```json\n{ADD[:-1]},}}\n```\n{PING}", ("invalid_json", "ping")),
        (f"{ADD[:30]}\n{PING}", ("invalid_json", "ping")),
        (f"[{ADD},\n{PING[:20]}\n\n{PING}", ("invalid_json", "ping")),
        ('{"name": "run", "arguments": {"a": 1, "a": 2}}', ("invalid_json",)),
    ],
)
def test_a_bare_call_that_cannot_be_made_is_malformed_not_prose(text: str, found: tuple[str, ...]):
    assert found_in(parse_calls(text, TOOLS, lenient=True)) == found
