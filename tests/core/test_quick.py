"""What is seen at once to fit does fit, by jsonschema's account; and what tools usually have is seen at once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from made_schemas import CLOSINGS, DEFINED, FLAT_RULES, NAMES, RULES, VALUES, schemas

from art_mcp.core.quick import quick_check
from art_mcp.core.schemas import close

USUAL = st.recursive(
    FLAT_RULES | st.just({"type": "string", "enum": ["a", "b"]}) | st.just({"$ref": "#/$defs/pair"}),
    lambda rules: (
        rules.map(lambda rule: {"type": "array", "items": rule, "maxItems": 1})
        | st.builds(lambda a, closing: {"type": "object", "properties": {"a": a}, **closing}, rules, CLOSINGS)
        | st.lists(rules, min_size=1, max_size=2).map(lambda each: {"anyOf": each})
    ),
    max_leaves=4,
)
WITHOUT_FLOATS = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.sampled_from([0.5, "a", "ab"]),
    lambda values: st.lists(values, max_size=2) | st.dictionaries(NAMES, values, max_size=2),
    max_leaves=3,
)


def accepts(schema: dict[str, Any], value: object) -> bool:
    return Draft202012Validator(schema).is_valid(value)


@settings(max_examples=500, deadline=None)
@given(rule=RULES, value=VALUES)
def test_what_fits_at_once_fits(rule: Any, value: object):
    schema = {"anyOf": [rule], "$defs": DEFINED}
    check = quick_check(schema)
    assume(check is not None)
    assert accepts(schema, value) or not check(value)


@settings(max_examples=300, deadline=None)
@given(schema=schemas(RULES), arguments=st.dictionaries(NAMES, VALUES, max_size=4))
def test_arguments_that_fit_at_once_fit(schema: dict[str, Any], arguments: dict[str, Any]):
    closed = close(schema)
    check = quick_check(closed)
    assert check is None or accepts(closed, arguments) or not check(arguments)


@settings(max_examples=300, deadline=None)
@given(schema=schemas(USUAL, st.just({})), arguments=st.dictionaries(NAMES, WITHOUT_FLOATS, max_size=4))
def test_usual_schemas_need_no_jsonschema_for_arguments_that_fit(schema: dict[str, Any], arguments: dict[str, Any]):
    closed = close(schema)
    check = quick_check(closed)
    assert check is not None
    assert check(arguments) == accepts(closed, arguments)


@pytest.mark.parametrize(
    "rule",
    [
        {"oneOf": [{"type": "string"}]},
        {"type": "objekt"},
        {"type": 5},
        {"enum": "a"},
        {"anyOf": {}},
        {"items": [{"type": "string"}]},
        {"required": "a"},
        {"required": [1]},
        {"properties": []},
        {"minimum": "0"},
        {"minLength": True},
        {"$ref": 5},
        {"$ref": "#"},
        {"$ref": "#/$defs/nothing"},
        {"$ref": "#/$defs/tree"},
        {"$ref": "elsewhere.json#/$defs/leaf"},
        {"$id": "x"},
        {"x-unknown": 1},
        "string",
    ],
)
def test_what_is_unusual_or_wrong_is_left_to_jsonschema(rule: Any):
    assert quick_check({"properties": {"a": rule}, "$defs": DEFINED}) is None


def test_rules_in_rules_are_followed_only_as_deep_as_arguments_may_be():
    rule: dict[str, Any] = {"type": "string"}
    for _ in range(2000):
        rule = {"anyOf": [rule]}
    assert quick_check(rule) is None


def test_numbers_in_a_list_of_values_are_left_to_jsonschema_for_which_true_is_not_one():
    check = quick_check({"enum": [1, "a", None]})
    assert check is not None
    assert [check(value) for value in ("a", None, 1, True, "b", [])] == [True, True, False, False, False, False]


def test_definitions_that_lead_to_each_other_in_many_ways_are_read_once_each():
    chain = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 9} for i in range(12)}
    check = quick_check({"$ref": "#/$defs/d0", "$defs": {**chain, "d12": {"type": "string"}}})
    assert check is not None
    assert check("a")
