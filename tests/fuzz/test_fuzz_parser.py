"""The parser of calls, on text of any kind: nothing begun is lost, nothing intact is lost, and no text is too much."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from broken_outputs import ADD, BROKEN, PING, TOOLS, tagged
from fuzzing import LONGEST, edits, fuzz, spoil, well_encoded
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from art_mcp.core.function_tags import parse_functions
from art_mcp.core.json_scan import MAX_DEPTH
from art_mcp.core.parse import CLOSE, OPEN, Parsed, in_template_form, parse_calls, render_turn
from art_mcp.types import Malformed, Tool, ToolCall

INTEGER = {"type": "integer"}
SHAPE: dict[str, Any] = {
    "type": "object",
    "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "additionalProperties": INTEGER}},
    "properties": {
        "node": {"$ref": "#/$defs/node"},
        "each": {"type": "array", "items": {"oneOf": [INTEGER, {"const": "a"}]}, "maxItems": 3, "uniqueItems": True},
        "code": {"type": "string", "pattern": "^[a-z]*$", "minLength": 1, "maxLength": 9},
        "part": {"type": "number", "multipleOf": 0.5, "exclusiveMinimum": 0, "maximum": 1e6},
        "any": {},
    },
    "patternProperties": {"^x-": {"enum": [1, "one", None]}},
    "dependentRequired": {"code": ["part"]},
}
OFFERED = (*TOOLS, Tool("shape", "Takes what fits", SHAPE))
SHAPED = '{"name": "shape", "arguments": {"node": {"next": {"a": 1}}, "each": [1, "a"], "part": 0.5, "x-y": null}}'
RUN = '{"name": "run", "arguments": {"a": 1, "b": {"a": [0.5, "x: y", null, true]}, "c": "é", "": -7}}'

PIECES = [OPEN, CLOSE, *"{}[]\",:'\\\n", " ", "\\u", "\\ud800", "\\u0000", '\\"', "\ud800", "\x00", "\r\n", "\u2028", "\x85"]
PIECES += ["\ufeff", "```json\n", "```", "```python\n", "null", "NaN", "-Infinity", "1e999", "-0", "0.1", "9" * 5000]
PIECES += ["1" + "0" * 400, "[" * 40, "]" * 40, '{"a":' * 40, "[" * 10_000, '{"a":' * 10_000, "//", "True", '"name"']
PIECES += ['"arguments": ', "parameters", "shape", "each", "code", "part", "x-z", "<tool_call", "tool_call>", ADD, PING]
PIECES += [SHAPED, tagged(ADD), tagged(f"[{PING}]"), '"a\u2028b"', '"\x7f"', '"a": 1, "a": 2', '"a":1,"a":":"', '"a:b"']
PIECES += ['"\\u003a"', '"\\ud83d\\ude00"', '"\\ud83d"', '"\\/\\b"', "-0.0", "1E5", "1e-400", "2" * 30]
PIECES += [*("[" * depth + "]" * depth for depth in (29, 30, 31)), *('{"a":' * depth + "1" + "}" * depth for depth in (30, 31))]
PIECES += ["1" * 4301, "1.", "00", "\xa0", '"a": 1, "\\u0061": 2', RUN]
TOKENS = re.compile(r'(</?tool_call>|```\w*|"(?:[^"\\\n]|\\.)*"|[{}\[\]:,"\\\n]|\s+|\w+)')
MEMBERS = re.compile(r'("(?:[^"\\\n]|\\.)*": (?:"(?:[^"\\\n]|\\.)*"|[^"{}\[\],\n]*)(?:, )?|[{}\[\]])')
WHOLE = [tagged(RUN), f"{tagged(RUN)}\n{tagged(RUN)}", tagged(ADD), tagged(SHAPED), f"I add.\n{tagged(ADD)}\n{tagged(PING)}"]
WHOLE += [tagged(RUN.replace("1", '"\\u003a"')), tagged(PING.replace("ping", "no\u2028such"))]
WHOLE += [tagged(f"[{RUN}]"), tagged(RUN.replace('"c"', '"c:d"'))]
WHOLE += [f"```json\n{ADD}\n{PING}\n```", f"[{ADD}, {SHAPED}]", f"{ADD}\nI add."]
WHOLE += [tagged(SHAPED.replace("null", '"one", "code": "abc"')), f"{tagged(SHAPED)}\n{tagged(SHAPED.replace('0.5', '1.5'))}"]
CORPUS = st.sampled_from(WHOLE) | st.sampled_from([output.text for output in BROKEN if len(output.text) < 1000])
SPOILT = st.builds(spoil, CORPUS, edits(PIECES), st.sampled_from([TOKENS, TOKENS, MEMBERS]))
TEXTS = SPOILT | SPOILT | st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text(max_size=40)

STRINGS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    [OPEN, CLOSE, f"\n{CLOSE}\n", '"}}', '{"name": ', "\\", "\\u0041", '"', ":", "```", "\x00", "\u2028", "😀", "x" * 3000, ADD]
)
DEEP = [json.loads("[" * depth + "]" * depth) for depth in (1, 2, 29)]
VALUES = st.one_of(
    STRINGS,
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([None, True, False, 0, -0.0, 1.0, 1e308, 5e-324, 10**4000, [], {}, [[{}]], {"": {"": ""}}, *DEEP]),
)
NESTED = st.lists(VALUES, max_size=2) | st.dictionaries(STRINGS, VALUES, max_size=2)
ARGUMENTS = st.dictionaries(STRINGS, VALUES | NESTED, max_size=3)
CALLS = st.builds(ToolCall, st.just("run"), ARGUMENTS)


def same(one: object, other: object) -> bool:
    """Equal, and 1, 1.0 and True are told apart."""
    return one == other and repr(one) == repr(other)


@fuzz(0.5, text=TEXTS)
def test_every_call_that_was_begun_is_answered_and_nothing_else_is_a_call(text: str):
    strict, blind = parse_calls(text, OFFERED), parse_calls(text, ())
    outside, rest = [], text
    for one in blind.calls:  # no tool is known, so every call shows its text
        assert one.text.startswith(OPEN)
        before, _, rest = rest.partition(one.text)
        outside.append(before)
    outside.append(rest)
    assert OPEN not in "\x00".join(outside)
    assert [line for piece in outside for line in lines(piece)] == lines(strict.content)
    assert strict.content == blind.content
    assert bool(strict.calls) or strict.content == text
    for one, shown in zip(strict.calls, blind.calls, strict=True):
        check_call(one)
        assert isinstance(one, Malformed) or same((one.name, one.arguments), plainly_read(shown.text))
    if len(made(strict.calls)) == len(strict.calls):
        assert same(parse_calls(render_turn(strict.content, made(strict.calls)), OFFERED), strict)


@fuzz(0.2, text=TEXTS)
def test_lenient_reading_loses_no_call_either(text: str):
    strict, lenient = parse_calls(text, OFFERED), parse_calls(text, OFFERED, lenient=True)
    assert OPEN not in lenient.content
    assert bool(lenient.calls) or lenient.content == text
    assert len(lenient.calls) >= len(strict.calls)
    for one in lenient.calls:
        check_call(one)
    assert same([one for one in made(lenient.calls) if not one.lenient], made(strict.calls))


def plainly_read(text: str) -> tuple[str, Any]:
    """The name and the arguments of a call that can be made, by Python's decoder."""
    value = json.loads(text.removeprefix(OPEN).removesuffix(CLOSE), object_pairs_hook=named_once)
    arguments = value.get("arguments", {})
    return value["name"], json.loads(arguments, object_pairs_hook=named_once) if isinstance(arguments, str) else arguments


def named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def made(calls: Sequence[ToolCall | Malformed]) -> list[ToolCall]:
    return [one for one in calls if isinstance(one, ToolCall)]


def lines(text: str) -> list[str]:
    return [line.strip("\r") for line in text.split("\n") if line.strip()]


def check_call(one: ToolCall | Malformed) -> None:
    if isinstance(one, Malformed):
        assert 10 < len(one.error.encode()) < 500
        assert well_encoded(one.error)
        return
    (tool,) = [tool for tool in OFFERED if tool.name == one.name]
    json.dumps(one.arguments, ensure_ascii=False, allow_nan=False).encode()
    assert levels(one.arguments) < MAX_DEPTH  # the call around them is a level too
    assert Draft202012Validator(dict(tool.parameters)).is_valid(one.arguments)
    if "additionalProperties" not in tool.parameters:
        assert all(name in tool.parameters["properties"] or name.startswith("x-") for name in one.arguments)


def levels(value: object) -> int:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inside is None else 1 + max(map(levels, inside), default=0)


SPELLINGS = st.fixed_dictionaries(
    {
        "ensure_ascii": st.booleans(),
        "indent": st.sampled_from([None, 0, 2, "\t"]),
        "separators": st.sampled_from([(",", ":"), (", ", ": "), (" ,\r\n", "\n:\n")]),
    }
)
BLANKS = st.sampled_from(["", "\n", " ", "\r\n", "\t \n\n"])
ENDS = st.sampled_from(["", CLOSE, f"{CLOSE}\nand\n"])


@fuzz(0.1, calls=st.lists(CALLS, min_size=1, max_size=3), spelling=SPELLINGS, swapped=st.booleans(), blank=BLANKS, end=ENDS)
def test_a_call_means_the_same_in_every_spelling_of_its_json(
    calls: list[ToolCall], spelling: dict[str, Any], swapped: bool, blank: str, end: str
):
    written = []
    for one in calls:
        arguments: Any = dict(one.arguments)
        if blank == "\r\n":
            arguments = json.dumps(arguments, **spelling)
        members = [("name", one.name), ("arguments", arguments)]
        written.append(OPEN + blank + json.dumps(dict(members[::-1] if swapped else members), **spelling) + blank)
    text = end.join([*written, ""])
    assert same(parse_calls(text, OFFERED).calls, tuple(calls))
    assert same(parse_calls(text, OFFERED, lenient=True).calls, tuple(calls))


@fuzz(0.1, content=st.text(max_size=20).filter(lambda text: OPEN not in text), calls=st.lists(CALLS, max_size=3))
def test_any_arguments_come_back_from_the_template_exactly(content: str, calls: list[ToolCall]):
    text = render_turn(content, calls)
    parsed = parse_calls(text, OFFERED)
    assert same(parsed, Parsed(content, tuple(calls)))
    assert in_template_form(text, parsed)


@fuzz(0.1, calls=st.lists(CALLS, min_size=1, max_size=2), noise=st.lists(TEXTS, min_size=3, max_size=3), lenient=st.booleans())
def test_intact_calls_survive_whatever_stands_between_them(calls: list[ToolCall], noise: list[str], lenient: bool):
    text = noise[0] + "".join(render_turn("", [one]) + between for one, between in zip(calls, noise[1:], strict=False))
    found = iter(parse_calls(text, OFFERED, lenient=lenient).calls)
    assert all(one in found for one in calls)  # each is found behind the one before it


MORE = [OPEN, OPEN, CLOSE, '\\"', *'"\\{[:,\n', '{"a":', '{"name": "', "```", "```json\n", "x", " ", ADD, tagged(ADD)]
HARD = [OPEN + '\\"', OPEN + '"', OPEN + '{"a": "', ADD[:25] + "\n", "```json\n{", '{"a":', "[{", '"\n', f"{ADD}\n"]
UNITS = st.lists(st.sampled_from(MORE), min_size=1, max_size=4).map("".join) | st.sampled_from(HARD)


@fuzz(0.002, start=UNITS, unit=UNITS, end=UNITS, lenient=st.booleans())
def test_long_texts_are_read_in_one_go(start: str, unit: str, end: str, lenient: bool):
    text = start + unit * (LONGEST // len(unit)) + end
    assert len(parse_calls(text, OFFERED, lenient=lenient).content) <= len(text)


HEADS = ["<function=add>", "<function=ping>", "<function=search>", "<function=run>", "<function=no such>", "<function=>"]
HEADS += ["<parameter=a>", "<parameter=b>", "<parameter=query>", "<parameter=x>", "<parameter=>", f"<parameter={'y' * 600}>"]
TAGS = [OPEN, CLOSE, *HEADS, "</function>", "</parameter>", "\n", " ", "1", "[1", "true", '"x"', "é", "\x00", "\ud800", ADD]
TAGS += ["[" * 32 + "]" * 32]
ADDED = f"{OPEN}\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n</function>\n{CLOSE}"
TAGGED = st.lists(st.sampled_from([*TAGS, *TAGS, ADDED]), max_size=16).map("".join)


@fuzz(0.3, text=TAGGED)
def test_calls_of_function_tags_are_answered_too(text: str):
    for lenient in (False, True):
        parsed = parse_functions(text, TOOLS, lenient=lenient)
        assert OPEN not in parsed.content
        assert bool(parsed.calls) or parsed.content == text
        for one in parsed.calls:
            check_call(one)
            assert not isinstance(one, Malformed) or one.text in text
    assert parse_functions(ADDED + text, TOOLS).calls[:1] == (ToolCall("add", {"a": 1, "b": 2}),)
