"""Calls in the form of Qwen3-Coder and Qwen3.5: what its templates write is read back, and what is wrong is told."""

from __future__ import annotations

from typing import Any

import pytest
from broken_outputs import ADD, BAD_ARGUMENTS, EMPTY, INVALID, NO_NAME, SCHEMA, TAGS, TOOLS, UNKNOWN
from broken_outputs import BROKEN as OF_JSON
from conversations import WITH_TOOLS, load

from art_mcp.core.function_tags import parse_functions
from art_mcp.core.parse import Parsed
from art_mcp.core.schemas import walk
from art_mcp.core.untyped import ALL, kinds_of, read_text_value
from art_mcp.types import Malformed, MalformedKind, Tool, ToolCall

NEWEST = ["qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8"]
KINDS = {
    "text": {"type": "string"},
    "number": {"type": "number"},
    "whole": {"type": "integer"},
    "yes": {"type": "boolean"},
    "list": {"type": "array"},
    "object": {"$ref": "#/$defs/thing"},
    "perhaps": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    "unit": {"enum": ["c", "f"]},
    "any": {},
}
EVERYTHING = Tool("all_kinds", "", {"type": "object", "properties": KINDS, "$defs": {"thing": {"type": "object"}}})
ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"text": "a heron"},
    {"text": ""},
    {"text": "12", "number": 12, "whole": -7, "yes": True, "perhaps": None, "unit": "c"},
    {"number": -0.5, "yes": False, "perhaps": 3, "list": [1, [2.5, "x", None, True]], "object": {"a": {"b": "é 🏔"}}},
    {"number": 1e30, "list": [], "object": {}, "any": {"deep": ["er"]}},
    {"text": "two\nlines\n", "unit": "f"},
    {"text": "\n\n edges \n"},
    {"text": '{"a": 1}', "any": [1]},
    {"text": "null", "any": 3},
    {"text": "</tool_call>\n<tool_call>\n<function=add>\n"},
    {"text": "<parameter=a>\n1\n</parameter>\nis how one writes a parameter", "number": 1},
    {"text": "a </parameter> b\n</parameter>\n"},
    {"text": "all on one line: <parameter=q>1</parameter></function></tool_call><tool_call><function=ping></function>"},
    {"object": {"a": "</parameter><parameter=text></parameter></function>"}, "text": "\r\n"},
    {"text": "<tool_call>\n<function=ping>\n</function>\n</tool_call>\nis a call"},
    {"text": "5 > 3 < 4 & “quoted” \\n"},
]


def written(name: str, reply: dict[str, Any]) -> str:
    template = load(next(path for path in WITH_TOOLS if path.stem == name))
    question = {"role": "user", "content": "Why?"}
    text = template.written([question], reply, tools=[EVERYTHING, *TOOLS])
    return text.removesuffix("<|im_end|>").removeprefix("\n</think>\n\n")


def replied(*given: dict[str, Any], content: str = "") -> dict[str, Any]:
    calls = [{"type": "function", "id": "", "function": {"name": "all_kinds", "arguments": one}} for one in given]
    return {"role": "assistant", "content": content, "tool_calls": calls}


@pytest.mark.skipif(not WITH_TOOLS, reason="trl is not installed: its wheel brings the templates")
@pytest.mark.parametrize("name", NEWEST)
def test_what_the_newest_templates_write_is_read_back_exactly(name: str) -> None:
    for arguments in ARGUMENTS:
        for content in ("", "I call it.", "two\n\nparagraphs"):
            parsed = parse_functions(written(name, replied(arguments, content=content)), [EVERYTHING])
            assert parsed == Parsed(content, (ToolCall("all_kinds", arguments),)), arguments
            assert repr(parsed.calls[0]) == repr(ToolCall("all_kinds", arguments))
    every = written(name, replied(*ARGUMENTS, content="All."))
    assert parse_functions(every, [EVERYTHING]) == Parsed("All.", tuple(ToolCall("all_kinds", one) for one in ARGUMENTS))


def function(name: str, **parameters: str) -> str:
    given = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters.items())
    return f"<tool_call>\n<function={name}>\n{given}</function>\n</tool_call>"


SUM = function("add", a="1", b="2")
SUM_CALL = ToolCall("add", {"a": 1, "b": 2})
COMPACT = "<tool_call><function=add><parameter=a>1</parameter><parameter=b>2</parameter></function></tool_call>"
FOLLOWED = 'text follows where </function> or another <parameter=…> should be, after parameter "b"'
UNCLOSED_A = 'parameter "a" is not closed; write </parameter>'
ACCEPTED = {
    "as the template has it": SUM,
    "no line breaks": COMPACT,
    "some line breaks": SUM.replace("1\n</parameter>", "1</parameter>"),
    "windows line breaks": SUM.replace("\n", "\r\n"),
    "blanks": SUM.replace("\n", " \n "),
    "no close tag at the end": SUM.removesuffix("\n</tool_call>"),
    "no close tag at the end of a line": SUM.removesuffix("</tool_call>"),
    "another order": function("add", b="2", a="1.0"),
    "prose around": f"First:\n\n{SUM}\nand then I wait.",
    "stray close tags": f"</function></tool_call>{SUM}</parameter></tool_call>",
}


@pytest.mark.parametrize("text", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_other_spellings_of_a_complete_call_are_accepted(text: str) -> None:
    for lenient in (False, True):
        assert parse_functions(text, TOOLS, lenient=lenient).calls == (SUM_CALL,)


def test_a_call_without_its_close_tag_ends_where_the_next_one_begins() -> None:
    assert parse_functions(f"{SUM.removesuffix('</tool_call>')}{SUM}", TOOLS) == Parsed("", (SUM_CALL, SUM_CALL))


BROKEN: list[tuple[str, MalformedKind, str]] = [
    ("<tool_call>\n</tool_call>", EMPTY, "the call is empty; write <function=NAME>, then"),
    ("<tool_call>", EMPTY, "the call is empty"),
    (f"<tool_call>\n{ADD}\n</tool_call>", TAGS, "does not begin with <function=NAME>; write"),
    ("<tool_call>\nadd(1, 2)\n</tool_call>", TAGS, "does not begin with <function=NAME>; write"),
    (function(""), NO_NAME, "the call has no name; write"),
    (function("ad", a="1"), UNKNOWN, 'there is no tool "ad"; did you mean "add"?'),
    (function("add", a="1"), SCHEMA, 'missing argument "b"'),
    (function("add", a="1", b="two"), SCHEMA, '"b" must be a number, got the string "two"'),
    (function("add", a="1", b="True"), SCHEMA, '"b" must be a number, got'),
    (function("add", a="1", b="2", c="3"), SCHEMA, 'unknown argument "c"'),
    (function("weather", city="Rome", unit="k"), SCHEMA, '"unit" must be'),
    ("<tool_call>\n<function=add>\n<parameter=a>\n1\n", TAGS, UNCLOSED_A),
    (SUM.replace("1\n</parameter>\n", "1\n"), TAGS, UNCLOSED_A),
    (SUM.replace("2\n</parameter>\n", "2\n"), TAGS, 'parameter "b" is not closed; write </parameter>'),
    (SUM.replace("</parameter>\n", ""), TAGS, UNCLOSED_A),
    (COMPACT.replace("1</parameter>", "1"), TAGS, UNCLOSED_A),
    (
        SUM.replace("</function>\n", ""),
        TAGS,
        'text follows where </function> or another <parameter=…> should be, after parameter "b"',
    ),
    (COMPACT.replace("</function>", ""), TAGS, FOLLOWED),
    (function("ping").replace("</function>\n", ""), TAGS, "text follows where a <parameter=…> or </function> should be"),
    ("<tool_call>\n<function=ping>\n", TAGS, "the call is not finished; write </function>"),
    (SUM.replace("</tool_call>", "Done."), TAGS, "text follows </function>; write </tool_call> right after it"),
    (SUM.replace("</tool_call>", "<function=ping>\n</function>\n</tool_call>"), TAGS, "more than one function in one call"),
    (SUM.replace("=b>", "=a>"), BAD_ARGUMENTS, 'parameter "a" is there twice; write it once'),
    (SUM.replace("=b>", "=>"), BAD_ARGUMENTS, "a <parameter=…> has no name"),
    (function("search", query="q", filter="{'tags': []}"), BAD_ARGUMENTS, 'parameter "filter": invalid JSON at line 1'),
    (function("search", query="q", filter='{"tags": ['), BAD_ARGUMENTS, "the JSON is not finished; end it with ]}"),
    (function("search", query="half \ud800"), BAD_ARGUMENTS, "\\ud800 is half a character"),
    (function("run", deep="[" * 32 + "]" * 32), BAD_ARGUMENTS, "nested too deep"),
    (function("add", a="1.5", b="[2]"), SCHEMA, '"b" must be a number, got the list'),
    (function("add", **{"a" * 9999: "1"}), SCHEMA, "unknown argument"),
    (function("run", **{"x": "1"}).replace("=x>", f"={'x' * 9999}>").replace("</function>", ""), TAGS, "after parameter"),
]


@pytest.mark.parametrize(("text", "kind", "told"), BROKEN)
def test_what_is_wrong_with_a_call_is_told_and_the_next_one_is_read(text: str, kind: MalformedKind, told: str) -> None:
    (one,) = parse_functions(text, TOOLS).calls
    assert isinstance(one, Malformed)
    assert (one.kind, told in one.error) == (kind, True), one.error
    assert len(one.error.encode()) < 500
    assert one.text == text
    if text.endswith("</tool_call>"):
        assert parse_functions(f"{text}\n{SUM}", TOOLS).calls == (one, SUM_CALL)
    assert [type(call) for call in parse_functions(f"{SUM}\n{text}", TOOLS).calls] == [ToolCall, Malformed]


def test_every_kind_of_mistake_is_among_the_broken_outputs_of_one_form_or_the_other() -> None:
    assert {kind for _, kind, _ in BROKEN} | {kind for output in OF_JSON for kind in output.found} >= set(MalformedKind)


def test_a_call_that_is_right_but_for_the_tools_says_what_was_asked() -> None:
    (one,) = parse_functions(function("subtract", a="1", b="two"), TOOLS).calls
    assert isinstance(one, Malformed)
    assert one.asked == ("subtract", {"a": 1, "b": "two"})


TEXTUAL = Tool("say", "", {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]})
PING_CALL = ToolCall("ping", {})


@pytest.mark.parametrize("forgotten", ["</function>\n", "</parameter>\n"])
def test_a_forgotten_tag_does_not_swallow_the_calls_after_it(forgotten: str) -> None:
    text = f"{function('say', text='x').replace(forgotten, '')}\n{function('ping')}\n{function('weather', city='Rome')}"
    one, *others = parse_functions(text, [*TOOLS, TEXTUAL]).calls
    assert isinstance(one, Malformed)
    assert others == [PING_CALL, ToolCall("weather", {"city": "Rome"})]


@pytest.mark.parametrize("after", ["<parameter=text>\ny\n</parameter>\n</function>\n</tool_call>", "</function>\nDone."])
def test_a_call_in_a_value_is_not_made_where_its_call_is_malformed(after: str) -> None:
    text = function("say", text=f"Write\n{function('ping')}").removesuffix("</function>\n</tool_call>") + after
    (one,) = parse_functions(text, [*TOOLS, TEXTUAL]).calls
    assert isinstance(one, Malformed)
    assert one.text == text


def test_leniently_a_call_may_lack_its_tags_or_be_json() -> None:
    bare = SUM.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    lenient = ToolCall("add", {"a": 1, "b": 2}, lenient=True)
    assert parse_functions(f"So:\n\n{bare}\n\nWell.", TOOLS) == Parsed(f"So:\n\n{bare}\n\nWell.", ())
    assert parse_functions(f"So:\n\n{bare}\n\nWell.", TOOLS, lenient=True) == Parsed("So:\nWell.", (lenient,))
    assert parse_functions(f"{bare}\n{bare}", TOOLS, lenient=True).calls == (lenient, lenient)
    broken, *after = parse_functions(f"{bare.replace('</function>', '')}\n{bare}", TOOLS, lenient=True).calls
    assert isinstance(broken, Malformed)
    assert after == [lenient]
    assert parse_functions(f"<tool_call>\n{ADD}\n</tool_call>", TOOLS, lenient=True).calls == (lenient,)
    assert parse_functions(f"<tool_call>\n[{ADD}, {ADD}]\n</tool_call>", TOOLS, lenient=True).calls == (lenient, lenient)
    quoting = '<tool_call>\n{"name": "weather", "arguments": {"city": "a</tool_call>"}}\n</tool_call>'
    assert parse_functions(quoting, TOOLS, lenient=True).calls == (
        ToolCall("weather", {"city": "a</tool_call>"}, lenient=True),
    )
    (broken,) = parse_functions("<tool_call>\n{name: add}\n</tool_call>", TOOLS, lenient=True).calls
    assert isinstance(broken, Malformed)
    assert broken.kind == INVALID


@pytest.mark.parametrize(
    "text", ["Never write <function=ping></function> inline.", "<function=NAME> is Qwen's form.", "<function="]
)
def test_leniently_a_function_that_is_only_spoken_of_is_no_call(text: str) -> None:
    assert parse_functions(text, TOOLS, lenient=True) == Parsed(text, ())


@pytest.mark.parametrize("text", ["", "Hello.", "</tool_call>", "<function=add>", "a <tool_cal"])
def test_a_turn_without_a_call_is_its_text(text: str) -> None:
    assert parse_functions(text, TOOLS) == Parsed(text, ())


ROOT: dict[str, Any] = {
    "$defs": {
        "unit": {"enum": ["c", 1]},
        "same": {"$ref": "#/$defs/same"},
        "many": {"anyOf": [{"$ref": "#/$defs/many"}] * 30},
        "a/b": {"type": "null"},
        "a b": {"type": "array"},
    },
    "properties": {"from": {"anyOf": [{"type": "string"}, {"type": "null"}]}},
}


SCHEMAS: list[tuple[Any, Any]] = [
    (True, ALL),
    ({}, ALL),
    ({"type": "string"}, {"string"}),
    ({"type": "number"}, {"number", "integer"}),
    ({"type": ["integer", "null"]}, {"integer", "null"}),
    ({"const": 1.5}, {"number"}),
    ({"enum": ["a", 2, None, False]}, {"string", "integer", "number", "null", "boolean"}),
    ({"type": "string", "enum": ["a", 2]}, {"string"}),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, {"string", "null"}),
    ({"oneOf": [{"type": "object"}, {"anyOf": [{"type": "array"}, {"const": True}]}]}, {"object", "array", "boolean"}),
    ({"allOf": [{"type": ["string", "null"]}, {"type": ["null", "array"]}]}, {"null"}),
    ({"$ref": "#/$defs/unit"}, {"string", "integer", "number"}),
    ({"$ref": "#/$defs/a~1b"}, {"null"}),
    ({"$ref": "#/$defs/same"}, ALL),
    ({"$ref": "#/$defs/a%20b"}, {"array"}),
    ({"$ref": "#/$defs/many"}, ALL),
    ({"$ref": "#/properties/from/anyOf/0"}, {"string"}),
    ({"$ref": "#/properties/from/anyOf/7"}, ALL),
    ({"$ref": "#/$defs/missing"}, ALL),
    ({"$ref": "#anchor"}, ALL),
    ({"$ref": 5}, ALL),
    ({"type": [["a"], {}, "null"]}, {"null"}),
    ({"type": "any"}, ALL),
    ({"anyOf": []}, ALL),
    ({"$ref": "https://elsewhere/schema"}, ALL),
]


@pytest.mark.parametrize(("schema", "kinds"), SCHEMAS)
def test_the_kinds_that_a_schema_allows(schema: object, kinds: frozenset[str]) -> None:
    assert kinds_of(schema, dict(walk((), ROOT))) == kinds


TEXT_OR_NUMBER = frozenset({"string", "number", "integer"})


@pytest.mark.parametrize(
    ("text", "kinds", "value"),
    [
        ("1", {"string"}, "1"),
        ("1", {"integer"}, 1),
        (" 1 ", {"number", "integer"}, 1),
        ("1.0", {"integer"}, 1.0),
        ("1.5", {"integer"}, 1.5),
        ("1,5", {"number"}, "1,5"),
        ("1e999", {"number"}, "1e999"),
        ("True", {"boolean"}, True),
        ("false", {"boolean"}, False),
        ("True", {"number"}, True),
        (" null", {"string", "null"}, " null"),
        ("one", {"number"}, "one"),
        ("None", {"string", "null"}, None),
        ("null", {"string", "null"}, None),
        ("none", {"string", "null"}, "none"),
        ('"quoted"', {"string", "null"}, '"quoted"'),
        ("[1, 2]", {"array"}, [1, 2]),
        ("[1, 2", {"array", "string"}, "[1, 2"),
        ("[1, 2", {"array", "null"}, "[1, 2"),
        ("12", TEXT_OR_NUMBER, 12),
        ("twelve", TEXT_OR_NUMBER, "twelve"),
        ("12", ALL, 12),
        ("", ALL, ""),
        ("", {"null"}, ""),
    ],
)
def test_a_text_stands_for_the_value_that_its_kinds_allow(text: str, kinds: set[str], value: Any) -> None:
    assert repr(read_text_value(text, frozenset(kinds))) == repr(value)


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"not": {"type": "number"}}}},
        {"properties": {"a": {"enum": ["12", 2]}}},
        {"additionalProperties": {"type": "string"}},
        {"patternProperties": {"^a$": {"type": "string"}}, "additionalProperties": False},
        {"allOf": [{"properties": {"a": {"type": "string"}}}]},
        {"$ref": "#/$defs/all", "$defs": {"all": {"properties": {"a": {"type": "string"}}}}},
    ],
)
def test_a_text_stays_one_where_the_schema_wants_one_in_another_way(schema: dict[str, Any]) -> None:
    tool = Tool("say", "", {"type": "object", **schema})
    assert parse_functions(function("say", a="12"), [tool]).calls == (ToolCall("say", {"a": "12"}),)


@pytest.mark.parametrize(
    "schema", [{"properties": 5}, {"properties": {"a": True}}, {"properties": {"a": {"type": [["x"]]}}}, {}]
)
def test_an_odd_schema_is_the_servers_to_judge(schema: dict[str, Any]) -> None:
    tool = Tool("odd", "", {"type": "object", "additionalProperties": True, **schema})
    assert parse_functions(function("odd", a="[1]"), [tool]).calls == (ToolCall("odd", {"a": [1]}),)


def test_a_text_of_many_calls_is_read_whole() -> None:
    many = "".join(function("ping") for _ in range(3000))
    assert parse_functions(many, TOOLS).calls == (PING_CALL,) * 3000
    unclosed = "<tool_call><function=add><parameter=a>" * 3000
    assert {type(call) for call in parse_functions(unclosed, TOOLS).calls} == {Malformed}
    assert len(parse_functions(unclosed, TOOLS).calls) == 3000
