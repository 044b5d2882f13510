"""Values that a model wrote as bare text → JSON values, by what a schema allows. Whether they fit is judged elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast
from urllib.parse import unquote

from art_mcp.core.json_scan import NotJson, read_whole
from art_mcp.core.schemas import members_of

ALL = frozenset({"string", "number", "integer", "boolean", "array", "object", "null"})
STRING = frozenset({"string"})
CONTAINERS = frozenset({"array", "object"})
PYTHON = {"True": True, "False": False, "None": None}
"""What templates write that put Python's own text of a value there, as Qwen3-Coder's and Qwen3.5's do."""
DEEPEST = 16
"""References and alternatives that are followed within one another."""


def kinds_of(schema: object, root: Mapping[str, Any], *, within: tuple[str, ...] = ()) -> frozenset[str]:
    """The JSON types that a part of the schema `root` allows, as far as it says so by `type`, `enum`, `const`, alternatives
    and references to its own parts; all of them where it says nothing. `within`: the references that led here."""
    members, found = members_of(schema), ALL
    named = members.get("type")
    several = cast("list[object]", named) if isinstance(named, list) else [named]
    names = frozenset(name for name in several if isinstance(name, str)) & ALL
    if names:
        found &= names | ({"integer"} if "number" in names else frozenset())
    values = [members["const"]] if "const" in members else members.get("enum")
    if isinstance(values, list):
        found &= frozenset(kind for value in cast("list[object]", values) for kind in kinds_of_value(value))
    reference = members.get("$ref")
    if isinstance(reference, str) and reference not in within and len(within) < DEEPEST:
        found &= kinds_of(aimed_at(reference, root), root, within=(*within, reference))
    for keyword in ("allOf", "anyOf", "oneOf"):
        parts = members.get(keyword)
        if isinstance(parts, list) and parts and len(within) < DEEPEST:
            each = [kinds_of(part, root, within=(*within, keyword)) for part in cast("list[object]", parts)]
            found &= ALL.intersection(*each) if keyword == "allOf" else frozenset[str]().union(*each)
    return found


def aimed_at(reference: str, root: Mapping[str, Any]) -> object:
    """The part of `root` that a `$ref` such as `#/$defs/Unit` means; True, which allows everything, where it is none."""
    if reference != "#" and not reference.startswith("#/"):
        return True
    part: object = root
    for step in unquote(reference).split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(part, list):
            items = cast("list[object]", part)
            part = items[int(name)] if name.isdecimal() and int(name) < len(items) else True
        else:
            part = members_of(part).get(name, True)
    return part


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
