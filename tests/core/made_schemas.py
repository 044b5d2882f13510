"""JSON Schemas of all kinds that tools have, and values that fit them about half of the time, drawn by hypothesis."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

NUMBER = {"type": "number"}
NAMES = st.sampled_from("abcd")
SCALARS = st.sampled_from(["string", "integer", "number", "boolean", "null"])
ANNOTATED = st.sampled_from([{}, {"title": "T"}, {"description": "d", "default": None}, {"format": "email"}])
FLAT_RULES = st.builds(
    lambda rule, notes: rule | notes,
    SCALARS.map(lambda kind: {"type": kind})
    | st.lists(SCALARS, min_size=1, max_size=3, unique=True).map(lambda kinds: {"type": kinds})
    | st.lists(SCALARS.map(lambda kind: {"type": kind}), min_size=1, max_size=3).map(lambda rules: {"anyOf": rules}),
    ANNOTATED,
)
LIMITS = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength", "minItems", "maxItems"]
LIMITED = st.builds(
    lambda kind, limits: kind | limits,
    st.sampled_from([{}, *({"type": kind} for kind in ("string", "integer", "number", "array", "null"))]),
    st.dictionaries(st.sampled_from(LIMITS), st.integers(0, 2) | st.just(1.0), min_size=1, max_size=2),
)
LISTED = [{"enum": ["a", 1, None]}, {"type": "string", "enum": ["a", "b"]}, {"enum": [1, True, 0.0]}, {"enum": [["a"], {}]}]
REFERENCES = [{"$ref": "#/$defs/leaf"}, {"$ref": "#/$defs/leaf", "type": "string"}, {"$ref": "#/$defs/pair"}]
CONSTANTS = [{"const": 1}, {"const": "a"}, {"const": None}]
UNUSUAL = [
    *[{}, {"not": {"type": "null"}}, {"type": "string", "pattern": "^a"}, {"type": "integer", "multipleOf": 2}],
    *[{"type": ["object", "array"], "items": {"type": "string"}}, {"uniqueItems": True}, {"$ref": "#/$defs/tree"}],
]
ODD = st.sampled_from([*LISTED, *REFERENCES, *CONSTANTS, *UNUSUAL])
DEFINED = {
    "leaf": {"type": ["integer", "string"], "description": "A leaf."},
    "pair": {"type": "object", "properties": {"a": {"$ref": "#/$defs/leaf"}, "b": NUMBER}, "required": ["a"]},
    "tree": {"type": "array", "items": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"$ref": "#/$defs/tree"}]}},
}
CLOSINGS = st.sampled_from(
    [{}, {}, {"additionalProperties": False}, {"additionalProperties": True}, {"additionalProperties": NUMBER}]
)


def nested(rules: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Rules with these rules in them."""
    required = st.lists(NAMES, max_size=1)
    inner = st.builds(lambda a, names: {"type": "object", "properties": {"a": a}, "required": names}, rules, required)
    return (
        st.builds(lambda rule: {"type": "array", "items": rule}, rules)
        | st.builds(lambda schema, closing: schema | closing, inner, CLOSINGS)
        | st.lists(rules, min_size=1, max_size=2).map(lambda each: {"anyOf": each})
        | st.lists(rules, min_size=1, max_size=2).map(lambda each: {"type": ["object", "string"], "anyOf": each})
    )


RULES = st.recursive(FLAT_RULES | LIMITED | ODD | st.booleans(), nested, max_leaves=4)
EITHER = {"anyOf": [{"required": ["a"]}, {"properties": {"d": NUMBER}}]}
MORE = [{"patternProperties": {"^d": NUMBER}}, EITHER, {"minProperties": 1}, {"propertyNames": {"enum": ["a", "b"]}}]
EXTRAS = st.sampled_from([{}, {}, {}, *MORE])


def schemas(rules: st.SearchStrategy[Any], extras: st.SearchStrategy[Any] = EXTRAS) -> st.SearchStrategy[dict[str, Any]]:
    """Schemas of arguments, whose properties have these rules."""
    properties, required = st.dictionaries(NAMES, rules, max_size=3), st.lists(NAMES, max_size=2, unique=True)
    whole = st.builds(lambda p, r: {"type": "object", "properties": p, "required": r, "$defs": DEFINED}, properties, required)
    return st.builds(lambda schema, closing, extra: schema | closing | extra, whole, CLOSINGS, extras)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.sampled_from([0.0, 1.0, 1.5, "", "a", "ab"]),
    lambda values: st.lists(values, max_size=2) | st.dictionaries(NAMES, values, max_size=2),
    max_leaves=3,
)
