"""Values that a model wrote as bare text → JSON values, by what a schema allows. Whether they fit is judged elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from art_mcp.core.json_scan import NotJson, read_whole
from art_mcp.core.schemas import members_of

ALL = frozenset({"string", "number", "integer", "boolean", "array", "object", "null"})
STRING = frozenset({"string"})
PYTHON = {"True": True, "False": False, "None": None}
"""What templates write that put Python's own text of a value there, as Qwen3-Coder's and Qwen3.5's do."""
DEEPEST = 8
"""References and alternatives that are followed within one another."""


def kinds_of(schema: object, root: Mapping[str, Any], *, depth: int = 0) -> frozenset[str]:
    """The JSON types that a part of the schema `root` allows, as far as it says so by `type`, `enum`, `const`, alternatives
    and references to its own parts; all of them where it says nothing."""
    if depth > DEEPEST:
        return ALL
    members, found = members_of(schema), ALL
    if "type" in members:
        named = members["type"]
        found &= frozenset(cast("list[str]", named) if isinstance(named, list) else [str(named)])
        found |= {"integer"} if "number" in found else frozenset()
    values = [members["const"]] if "const" in members else members.get("enum")
    if isinstance(values, list):
        found &= frozenset(kind for value in cast("list[object]", values) for kind in kinds_of_value(value))
    inner = [aimed_at(members["$ref"], root)] if "$ref" in members else []
    every = members.get("allOf")
    for part in [*inner, *(cast("list[object]", every) if isinstance(every, list) else [])]:
        found &= kinds_of(part, root, depth=depth + 1)
    for keyword in ("anyOf", "oneOf"):
        some = members.get(keyword)
        if isinstance(some, list):
            found &= frozenset[str]().union(*(kinds_of(part, root, depth=depth + 1) for part in cast("list[object]", some)))
    return found


def aimed_at(reference: object, root: Mapping[str, Any]) -> object:
    """The part of `root` that a `$ref` such as `#/$defs/Unit` means; True, which allows everything, where it is none."""
    part: object = root if isinstance(reference, str) and reference.startswith("#") else True
    for step in str(reference).split("/")[1:]:
        part = members_of(part).get(step.replace("~1", "/").replace("~0", "~"), True)
    return part


def kinds_of_value(value: object) -> tuple[str, ...]:
    """Its JSON type; two of them for a whole number."""
    if isinstance(value, bool):
        return ("boolean",)
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return ("integer", "number")
    kinds: dict[type, str] = {str: "string", float: "number", list: "array", dict: "object", type(None): "null"}
    return (kinds[type(value)],)


def read_text_value(text: str, kinds: frozenset[str]) -> Any:
    """The value of these `kinds` that `text` stands for; the text itself where it stands for none of them, or where only
    a string may be there. (This form has no string "12" where a number may be there too, and no string "null" beside null.)"""
    if kinds == STRING:
        return text
    bare = text.strip()
    try:
        value = PYTHON[bare] if bare in PYTHON else read_whole(bare)
    except NotJson:
        return text
    return value if set(kinds_of_value(value)) & (kinds - STRING) else text
