from __future__ import annotations

import socket
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from made_schemas import FLAT_RULES, NAMES, RULES, VALUES, schemas

from art_mcp.core.arguments import validate
from art_mcp.core.complaints import complain
from art_mcp.core.json_scan import MAX_DEPTH
from art_mcp.core.schemas import close
from art_mcp.types import Tool

NUMBER = {"type": "number"}


def tool(schema: dict[str, Any]) -> Tool:
    return Tool("tool", "", schema)


def taking(**properties: Any) -> Tool:
    return tool({"type": "object", "properties": properties})


ADD = Tool("add", "", {"type": "object", "properties": {"a": NUMBER, "b": NUMBER}, "required": ["a", "b"]})
ITEMS = {
    "type": "array",
    "items": {"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]},
    "minItems": 1,
}


@pytest.mark.parametrize(
    ("the_tool", "arguments", "complaint"),
    [
        (ADD, {}, 'missing arguments "a" and "b"; add needs "a" and "b"'),
        (ADD, {"a": 1}, 'missing argument "b"; add needs "a" and "b"'),
        (ADD, {"a": 1, "b": 2, "c": 3}, 'unknown argument "c"; add takes "a" and "b"'),
        (ADD, {"a": 1, "c": 3}, 'missing argument "b"; unknown argument "c"; add takes "a" and "b"'),
        (ADD, {"a": "12", "b": 2}, '"a" must be a number, got the string "12"'),
        (ADD, {"a": True, "b": None}, '"a" must be a number, got true; "b" must be a number, got null'),
        (ADD, {"a": 1, "b": {"x": [1]}}, '"b" must be a number, got the object {"x": [1]}'),
        (taking(), {"x": 1}, 'unknown argument "x"; tool takes no arguments'),
        (tool({"type": "object"}), {"x": 1}, 'unknown argument "x"; tool takes no arguments'),
        (taking(n={"type": "integer"}), {"n": 1.5}, '"n" must be an integer, got the number 1.5'),
        (taking(n={"type": ["integer", "null"]}), {"n": "x"}, '"n" must be an integer or null, got the string "x"'),
        (taking(n={"anyOf": [NUMBER, {"type": "null"}]}), {"n": "x"}, '"n" must be a number or null, got the string "x"'),
        (taking(u={"enum": ["c", "f"]}), {"u": "k"}, '"u" must be one of "c" or "f", got the string "k"'),
        (taking(n={"type": "integer", "minimum": 1}), {"n": 0}, '"n" must be at least 1, got the number 0'),
        (
            taking(s={"type": "string", "maxLength": 2}),
            {"s": "xyz"},
            '"s" must have at most 2 characters, got the string "xyz"',
        ),
        (taking(rows=ITEMS), {"rows": [{"id": 1}, {"id": "2"}]}, '"rows[1].id" must be an integer, got the string "2"'),
        (taking(rows=ITEMS), {"rows": [{}]}, '"rows[0]": missing "id"'),
        (taking(rows=ITEMS), {"rows": []}, '"rows" must have at least 1 items, got the list []'),
        (
            taking(n={"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]}),
            {"n": 0},
            '"n" must be at least 1, got the number 0',
        ),
        (taking(**{"größe": NUMBER}), {"größe": "1"}, '"größe" must be a number, got the string "1"'),
    ],
)
def test_the_complaint_names_what_to_change(the_tool: Tool, arguments: dict[str, Any], complaint: str):
    assert validate(arguments, the_tool) == complaint


@pytest.mark.parametrize(
    ("the_tool", "arguments"),
    [
        (ADD, {"a": 1, "b": 2.5}),
        (taking(n={"type": "integer"}), {"n": 1.0}),
        (taking(n={"type": "integer"}), {"n": 10**400}),
        (taking(n={"type": "string", "format": "email"}), {"n": "no email"}),
        (tool({"type": "object", "additionalProperties": True}), {"x": 1}),
        (tool({"type": "object", "additionalProperties": NUMBER}), {"x": 1}),
        (tool({"type": "object", "patternProperties": {"^x-": NUMBER}}), {"x-1": 1}),
        (tool({"type": "object", "allOf": [{"properties": {"a": NUMBER}}, {"properties": {"b": NUMBER}}]}), {"a": 1, "b": 2}),
        (tool({"$ref": "#/$defs/pair", "$defs": {"pair": {"properties": {"a": NUMBER}}}}), {"a": 1}),
        (taking(inner={"type": "object"}), {"inner": {"anything": "goes"}}),
    ],
)
def test_what_the_schema_allows_is_accepted(the_tool: Tool, arguments: dict[str, Any]):
    assert validate(arguments, the_tool) is None


@pytest.mark.parametrize(
    ("schema", "arguments"),
    [
        ({"type": "object", "additionalProperties": NUMBER}, {"x": "1"}),
        ({"type": "object", "patternProperties": {"^x-": NUMBER}}, {"y": 1}),
        ({"type": "object", "allOf": [{"properties": {"a": NUMBER}}]}, {"z": 1}),
        ({"$ref": "#/$defs/pair", "$defs": {"pair": {"properties": {"a": NUMBER}}}}, {"a": "x"}),
        ({"$ref": "#/$defs/pair", "$defs": {"pair": {"properties": {"a": NUMBER}}}}, {"z": 1}),
        ({"type": "object", "properties": {"a": False}}, {"a": 1}),
        ({"allOf": [False]}, {}),
        ({"type": "object", "properties": {"a": {"enum": []}}}, {"a": 1}),
    ],
)
def test_what_the_schema_forbids_is_refused_wherever_it_says_so(schema: dict[str, Any], arguments: dict[str, Any]):
    assert validate(arguments, tool(schema))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "objekt"},
        {"type": "object", "properties": 5},
        {"type": "object", "required": "a"},
        {"type": "object", "properties": {"a": {"type": "number", "minimum": "0"}}},
        {"$ref": "#/$defs/nothing"},
        {"$ref": "#"},
        {"$ref": "somewhere.json"},
        {"$id": "http://[", "$ref": "x"},
        {"$id": "tree", "$ref": "tree#/$defs/a", "$defs": {"a": NUMBER}},
        {"$dynamicRef": "#node"},
        {"allOf": {"$ref": "#"}},
        {"allOf": 5, "$ref": "x"},
        {"anyOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"allOf": [{"$ref": "#"}]}}},
        {"allOf": [{"$ref": "#/title"}], "title": "no schema"},
        {"additionalProperties": {"pattern": "("}},
        {"additionalProperties": {"multipleOf": 0.5}, "patternProperties": {"(": True}},
    ],
)
def test_where_a_schema_cannot_be_used_the_server_judges(schema: dict[str, Any]):
    assert validate({"a": "x", "b": 10**400}, tool(schema)) is None


def test_beside_a_reference_that_cannot_be_followed_everything_else_counts():
    lost = taking(b={"$ref": "elsewhere.json", "type": "string"}, c={"$ref": "#/$defs/nothing"}, a=NUMBER)
    assert validate({"a": 1, "b": "x", "c": {"any": "thing"}}, lost) is None
    assert validate({"a": "x", "c": 1}, lost) == '"a" must be a number, got the string "x"'
    assert validate({"b": 1}, lost) == '"b" must be a string, got the number 1'
    assert validate({"d": 1}, lost) == 'unknown argument "d"; tool takes "b", "c" and "a"'


def test_a_schema_of_trees_is_followed_as_deep_as_json_may_be():
    leaf_or_pair = {"anyOf": [NUMBER, {"allOf": [{"$ref": "#/$defs/pair"}]}]}
    pair = {"type": "object", "properties": {"left": {"$ref": "#/$defs/tree"}}, "unevaluatedProperties": False}
    trees = tool(
        {"type": "object", "properties": {"t": {"$ref": "#/$defs/tree"}}, "$defs": {"tree": leaf_or_pair, "pair": pair}}
    )
    good, bad = 1, "x"
    for _ in range(MAX_DEPTH - 2):
        good, bad = {"left": good}, {"left": bad}
    assert validate({"t": good}, trees) is None
    assert validate({"t": bad}, trees) is not None


def test_a_name_of_a_keyword_is_a_name_like_any_other():
    odd = taking(**{"$ref": NUMBER, "$id": {"type": "string"}, "properties": {"enum": [{"$ref": "x"}]}})
    assert validate({"$ref": 1, "$id": "x", "properties": {"$ref": "x"}}, odd) is None
    assert validate({"$ref": "1"}, odd) == '"$ref" must be a number, got the string "1"'


def test_a_remote_reference_is_not_fetched():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        there = f"http://127.0.0.1:{server.getsockname()[1]}/schema.json"
        assert validate({"a": 1}, taking(a={"$ref": there})) is None
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_tool_that_takes_the_place_of_another_is_judged_by_its_own_schema():
    for kind, value in [("string", "x"), ("integer", 1), ("boolean", True)] * 50:
        assert validate({"a": value}, taking(a={"type": kind})) is None
        assert validate({"a": [value]}, taking(a={"type": kind})) is not None


# --- for all schemas


ARGUMENTS = st.dictionaries(NAMES, VALUES, max_size=4)


@settings(max_examples=400, deadline=None)
@given(schema=schemas(FLAT_RULES) | schemas(RULES), arguments=ARGUMENTS)
def test_verdict_and_complaint_are_those_of_jsonschema_on_the_closed_schema(schema: dict[str, Any], arguments: dict[str, Any]):
    errors = list(Draft202012Validator(close(schema)).iter_errors(arguments))
    assert validate(arguments, tool(schema)) == (complain(errors, "tool") if errors else None)


@settings(max_examples=200, deadline=None)
@given(schema=schemas(RULES), arguments=ARGUMENTS)
def test_a_complaint_is_one_short_line(schema: dict[str, Any], arguments: dict[str, Any]):
    complaint = validate(arguments, tool(schema))
    assert complaint is None or (0 < len(complaint) < 500 and "\n" not in complaint)


WORDS = """type properties required additionalProperties unevaluatedProperties patternProperties items prefixItems contains
anyOf allOf oneOf not if then else dependentSchemas propertyNames uniqueItems enum const minimum multipleOf pattern minLength
$ref $dynamicRef $id $anchor $schema $defs a b"""
KEYWORDS = st.sampled_from(WORDS.split())
ANYTHING = st.recursive(
    st.sampled_from(
        ["object", "string", "#", "#/$defs/a", "#/properties/a", "#a", "http://127.0.0.1:9/x", "(", "a", 1, 0.5, -1, None]
    )
    | st.booleans(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYWORDS, inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(schema=st.dictionaries(KEYWORDS, ANYTHING, max_size=5), arguments=ARGUMENTS)
def test_no_schema_however_odd_makes_validation_raise(schema: dict[str, Any], arguments: dict[str, Any]):
    complaint = validate(arguments, tool(schema))
    assert complaint is None or complaint
