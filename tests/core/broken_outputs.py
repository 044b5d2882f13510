"""What models really write when a call goes wrong, and near misses: each text with what must be found in it, in order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from art_mcp.core.parse import Parsed
from art_mcp.types import MalformedKind, Tool, ToolCall

EMPTY, INVALID, NOT_AN_OBJECT, NO_NAME, BAD_ARGUMENTS, UNKNOWN, SCHEMA, TAGS = MalformedKind

NUMBER = {"type": "number"}
TOOLS = (
    Tool("add", "Adds", {"type": "object", "properties": {"a": NUMBER, "b": NUMBER}, "required": ["a", "b"]}),
    Tool("ping", "Answers", {"type": "object", "properties": {}}),
    Tool(
        "weather",
        "Tells the weather",
        {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["c", "f"]}},
            "required": ["city"],
        },
    ),
    Tool(
        "search",
        "Searches",
        {
            "type": "object",
            "properties": {
                "query": {"type": "string"},
                "limit": {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]},
                "filter": {
                    "type": "object",
                    "properties": {"tags": {"type": "array", "items": {"type": "string"}}, "exact": {"type": "boolean"}},
                    "required": ["tags"],
                },
            },
            "required": ["query"],
        },
    ),
    Tool("run", "Runs anything", {"type": "object", "properties": {}, "additionalProperties": True}),
)


@dataclass(frozen=True)
class Broken:
    """A text and what is in it: for each call the name of the tool if it can be made, otherwise the kind of mistake."""

    about: str
    text: str
    found: tuple[str, ...]


ADD = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
PING = '{"name": "ping", "arguments": {}}'


def found_in(parsed: Parsed) -> tuple[str, ...]:
    return tuple(one.name if isinstance(one, ToolCall) else one.kind for one in parsed.calls)


def tagged(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


def call(name: Any, arguments: Any) -> str:
    return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)


def spelled(name: str, arguments: str) -> str:
    return f'{{"name": "{name}", "arguments": {arguments}}}'


def then_ping(about: str, body: str, kind: str) -> Broken:
    """A broken call with an intact one behind it, which must not go down with it."""
    return Broken(about, f"{tagged(body)}\n{tagged(PING)}", (kind, "ping"))


def truncated() -> Iterator[Broken]:
    """The end of the turn, a close tag or the next call comes too early."""
    for length in range(len(ADD)):
        kind = INVALID if length else EMPTY
        yield Broken(f"cut after {length}", f"<tool_call>\n{ADD[:length]}", (kind,))
        yield Broken(f"closed after {length}", f"{tagged(ADD[:length])}\n{tagged(PING)}", (kind, "ping"))
        yield Broken(f"next call after {length}", f"<tool_call>\n{ADD[:length]}\n{tagged(PING)}", (kind, "ping"))


def without_one_character() -> Iterator[Broken]:
    for index, character in enumerate(ADD[:-2]):  # the last two are cut by `truncated`
        if character in '{}":,':
            body = ADD[:index] + ADD[index + 1 :]
            yield then_ping(f"without {character} at {index}", body, INVALID)


def values_that_are_no_json() -> Iterator[Broken]:
    values = ["NaN", "Infinity", "-Infinity", "1e999", "-1e400", "True", "False", "None", "undefined", "01", "+1", ".5", "1."]
    values += ["1_000", "1,000", "0x1F", "5 + 3", "1/3", "'1'", "“1”", "`1`", "<number>", "$a", "add(1, 2)", "...", "1 // one"]
    values += ["# one", "\\", '"\\x41"', '"\\u12"', '"a\tb"', '"a\nb"', '"a\x00b"', '"a', '"he said "no""', "9" * 5000]
    values += ['"\\ud800"', '"\\ud83d x"', '"\\udc00\\ud800"', '{"x": 1, "x": 2}', "[1, 2", "[1, 2,]", '{"x": 1,}', "{x: 1}"]
    for value in values:
        yield then_ping(f"the value {value[:20]}", spelled("run", f'{{"a": {value}}}'), INVALID)


def bodies_that_are_no_json() -> Iterator[Broken]:
    bodies = [
        "add(1, 2)",
        "add",
        "name: add\narguments:\n  a: 1",
        "{'name': 'add', 'arguments': {'a': 1, 'b': 2}}",
        '{name: "add", arguments: {a: 1, b: 2}}',
        "<function=add><parameter=a>1</parameter></function>",
        '{"name": "add", "arguments": {"a": 1, "b": 2,}}',
        '{"name": "add", "arguments": {"a": 1, "b": 2},}',
        '{"name": "add", "arguments": {"a": 1, "a": 2, "b": 2}}',
        '{"name": "add", "name": "ping", "arguments": {"a": 1, "b": 2}}',
        '{"name": "run", "arguments": {"a": "\\u003a", "a": "\\u003A"}}',
        f"```json\n{ADD}\n```",
        f"{ADD}\n```",
        f"{ADD}}}",
        f"{ADD}]",
        f"{ADD},",
        f"{ADD};",
        f"{ADD}\n{ADD}",
        f"{ADD}, {ADD}",
        f"{ADD} and then I wait",
        f"I call {ADD}",
        f"//{ADD}",
        f"\ufeff{ADD}",
        "}",
        "{{}}",
        '"',
        "nul",
        "\x00",
        "😀",
        '{"name": "add", "arguments": {"code": "</tool_call>",}}',
        '{"name": "add", "arguments": {"code": "<tool_call>",}}',
        '{"name": "add", "arguments": {"code": "a}</tool_call><tool_call>{", }}',
    ]
    for body in bodies:
        yield then_ping(f"the body {body[:40]}", body, INVALID)


def not_objects() -> Iterator[Broken]:
    for body in ["[]", f"[{ADD}]", "[1]", '"add"', '"</tool_call>"', "5", "-0.5", "null", "true", f"{json.dumps(ADD)}"]:
        yield then_ping(f"no object {body[:20]}", body, NOT_AN_OBJECT)


def names() -> Iterator[Broken]:
    for name in ["Add", "add ", " add", "addition", "functions.add", "add\n", "x" * 5000, "加", "</tool_call>", "\u0000"]:
        yield Broken(f"unknown tool {name[:20]!r}", tagged(call(name, {"a": 1, "b": 2})), (UNKNOWN,))
    for name in ["", None, 5, True, [], ["add"], {}, {"name": "add"}]:
        yield Broken(f"the name {name!r}", tagged(call(name, {})), (NO_NAME,))
    for body in ["{}", '{"arguments": {}}', '{"tool": "add", "arguments": {}}', '{"function": {"name": "add"}}']:
        yield Broken(f"no name in {body}", tagged(body), (NO_NAME,))


def arguments() -> Iterator[Broken]:
    strings = ["", "x", "[1]", "5", "null", "{", "{'a': 1}", '{"a": 1} x', '{"a": NaN}', '{"a":1,"a":2}']
    for value in [*strings, [], [1, 2], 5, None, True]:
        yield Broken(f"the arguments {value!r}", tagged(call("run", value)), (BAD_ARGUMENTS,))
    for key in ["parameters", "args", "input", "Arguments", "arguments "]:
        yield Broken(f"{key} for arguments", tagged(json.dumps({"name": "add", key: {"a": 1, "b": 2}})), (BAD_ARGUMENTS,))
    for extra in ["b", "id", "type", "parameters", "thought"]:
        body = json.dumps({"name": "add", "arguments": {"a": 1, "b": 2}, extra: 2})
        yield Broken(f"{extra} beside the arguments", tagged(body), (BAD_ARGUMENTS,))


def misfits() -> Iterator[Broken]:
    for value in ["12", "", True, None, [1], {"value": 1}]:
        yield Broken(f"{value!r} for a number", tagged(call("add", {"a": value, "b": 2})), (SCHEMA,))
    for given in [{}, {"a": 1}, {"x": 1, "y": 2}, {"a": 1, "b": 2, "c": 3}, {"A": 1, "B": 2}]:
        yield Broken(f"add with {given}", tagged(call("add", given)), (SCHEMA,))
    yield Broken("add without arguments", tagged('{"name": "add"}'), (SCHEMA,))
    yield Broken("add with {} as a string", tagged(call("add", "{}")), (SCHEMA,))
    yield Broken("ping with an argument", tagged(call("ping", {"host": "x"})), (SCHEMA,))
    for given in [{"city": 5}, {"city": "Rom", "unit": "k"}, {"city": "Rom", "unit": None}, {"unit": "c"}]:
        yield Broken(f"weather with {given}", tagged(call("weather", given)), (SCHEMA,))
    for given in [{"limit": 0}, {"limit": 1.5}, {"limit": "3"}, {"filter": {}}, {"filter": 1}]:
        yield Broken(f"search with {given}", tagged(call("search", {"query": "x", **given})), (SCHEMA,))
    for given in [{"tags": "x"}, {"tags": [1]}, {"tags": [], "exact": 1}]:
        yield Broken(f"search for {given}", tagged(call("search", {"query": "x", "filter": given})), (SCHEMA,))


def tags() -> Iterator[Broken]:
    ping = tagged(PING)
    yield Broken("nothing in the tags", "<tool_call></tool_call>", (EMPTY,))
    yield Broken("blank in the tags", "<tool_call> \r\n\t </tool_call>", (EMPTY,))
    yield Broken("only an open tag", "I call <tool_call>", (EMPTY,))
    yield Broken("open tags in a row", "<tool_call><tool_call>\n<tool_call>", (EMPTY, EMPTY, EMPTY))
    yield Broken("an open tag too many", f"<tool_call>\n{ping}\n</tool_call>", (EMPTY, "ping"))
    yield Broken("a tag in prose", f"I use <tool_call> to call.\n{ping}", (INVALID, "ping"))
    yield Broken("a call in a call", f"<tool_call>\n{ADD[:-1]}, \n{ping}\n}}\n</tool_call>", (INVALID, "ping"))
    yield Broken("prose for a close tag", f"<tool_call>\n{PING}\nNow I wait.", (INVALID,))
    yield Broken("another close tag", f"<tool_call>\n{PING}\n</tools>", (INVALID,))
    yield Broken("half a close tag", f"<tool_call>\n{PING}\n</tool_ca", (INVALID,))
    one_line = f'<tool_call>{{"name": "ping}}</tool_call><tool_call>{PING}</tool_call>'
    yield Broken("a quote lost, all on one line", one_line, (INVALID, "ping"))
    yield Broken("a quote lost, the tag near", f'<tool_call>{{"name": "</tool_call>{ping}', (INVALID, "ping"))
    yield Broken("a tag behind an escaped quote", '<tool_call>\\"<tool_call>", <tool_call>', (INVALID, INVALID, EMPTY))
    in_turn = "\n".join([ping, tagged("{"), ping, tagged("[]"), ping])
    yield Broken("good and bad in turn", in_turn, ("ping", INVALID, "ping", NOT_AN_OBJECT, "ping"))
    yield Broken("every kind at once", every_kind(), (EMPTY, INVALID, NOT_AN_OBJECT, NO_NAME, BAD_ARGUMENTS, UNKNOWN, SCHEMA))


def every_kind() -> str:
    bodies = ["", "{", "5", "{}", call("run", 5), call("nothing", {}), call("add", {})]
    return "\n".join(tagged(body) for body in bodies)


def extremes() -> Iterator[Broken]:
    for depth in (33, 500, 5_000, 50_000):
        lists, objects = "[" * depth + "]" * depth, '{"x":' * depth + "1" + "}" * depth
        yield then_ping(f"{depth} lists", spelled("run", f'{{"x": {lists}}}'), INVALID)
        yield then_ping(f"{depth} objects", spelled("run", objects), INVALID)
    yield Broken("lists in a string", tagged(call("run", "[" * 5_000)), (BAD_ARGUMENTS,))
    yield Broken("open lists", "<tool_call>" + "[" * 50_000, (INVALID,))
    yield Broken("open objects", "<tool_call>" + '{"a":' * 20_000, (INVALID,))


BROKEN = tuple(
    output
    for family in (
        truncated,
        without_one_character,
        values_that_are_no_json,
        bodies_that_are_no_json,
        not_objects,
        names,
        arguments,
        misfits,
        tags,
        extremes,
    )
    for output in family()
)
