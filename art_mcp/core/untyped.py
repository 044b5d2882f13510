"""Values that a model wrote as bare text → JSON values, by what a schema allows. Whether they fit is judged elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

from art_mcp.core.arguments import REMEMBERED
from art_mcp.core.json_scan import NotJson, read_whole
from art_mcp.core.schemas import Parts, members_of, target, walk

ALL = frozenset({"string", "number", "integer", "boolean", "array", "object", "null"})
STRING = frozenset({"string"})
CONTAINERS = frozenset({"array", "object"})
PYTHON = {"True": True, "False": False, "None": None}
"""What templates write that put Python's own text of a value there, as Qwen3-Coder's and Qwen3.5's do."""
DEEPEST = 16
"""References and alternatives that are followed within one another."""


@lru_cache(REMEMBERED)
def parameter_kinds(schema_text: str) -> Mapping[str, frozenset[str]]:
    """The `kinds_of` each argument that a tool's schema, given as JSON, has a property for."""
    schema = json.loads(schema_text)
    parts = dict(walk((), schema))
    return {name: kinds_of(part, parts) for name, part in members_of(schema.get("properties")).items()}


def kinds_of(schema: object, parts: Parts, *, within: tuple[str, ...] = ()) -> frozenset[str]:
    """The JSON types that one of the `parts` of a schema allows, as far as it says so by `type`, `enum`, `const`, alternatives
    and references to other parts; all of them where it says nothing. `within`: the references that led here."""
    members, found = members_of(schema), ALL
    named = members.get("type")
    several = cast("list[object]", named) if isinstance(named, list) else [named]
    names = frozenset(name for name in several if isinstance(name, str)) & ALL
    if names:
        found &= names | ({"integer"} if "number" in names else frozenset())
    values = [members["const"]] if "const" in members else members.get("enum")
    if isinstance(values, list):
        found &= frozenset(kind for value in cast("list[object]", values) for kind in kinds_of_value(value))
    aim = target(members, parts)
    if aim is not None and (name := str(members["$ref"])) not in within and len(within) < DEEPEST:
        found &= kinds_of(parts[aim], parts, within=(*within, name))
    for keyword in ("allOf", "anyOf", "oneOf"):
        branches = members.get(keyword)
        if isinstance(branches, list) and branches and len(within) < DEEPEST:
            each = [kinds_of(part, parts, within=(*within, keyword)) for part in cast("list[object]", branches)]
            found &= ALL.intersection(*each) if keyword == "allOf" else frozenset[str]().union(*each)
    return found


def kinds_of_value(value: object) -> tuple[str, ...]:
    """Its JSON type; two of them for a whole number."""
    if isinstance(value, bool):
        return ("boolean",)
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return ("integer", "number")
    kinds: dict[type, str] = {str: "string", float: "number", list: "array", dict: "object", type(None): "null"}
    return (kinds.get(type(value), "object"),)


def read_text_value(text: str, kinds: frozenset[str]) -> Any:
    """The value of these `kinds` that `text` stands for. Where a string may be there, the text itself if it stands for none of
    the others; where none may, whatever JSON it is, and the text if it is none. (So there is no string "12" where a number may
    be too, and no string "null" or "None" beside null.) Raises NotJson where only a list or an object may be there."""
    if kinds <= STRING:
        return text
    bare = text if "string" in kinds else text.strip()
    try:
        value = PYTHON[bare] if bare in PYTHON else read_whole(bare)
    except NotJson:
        if kinds <= CONTAINERS:
            raise
        return text
    return value if "string" not in kinds or set(kinds_of_value(value)) & (kinds - STRING) else text
