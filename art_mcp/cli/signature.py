"""A tool's parameters in words, for people; what they must fit is decided by `core.arguments`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from art_mcp.core.complaints import clip, unique
from art_mcp.core.json_scan import quote
from art_mcp.types import JsonObject

SHOWN = 8
"""Values of an enum, at most."""
DEEPEST = 4
"""References and lists that are followed; a schema may refer to itself."""


def parameter_lines(schema: JsonObject, root: JsonObject | None = None, *, opened: frozenset[str] = frozenset()) -> list[str]:
    """One line a parameter: `name: type, required`, or its default, and what its server says of it; below it, indented, the
    parts of an object, also of one in a list. References lead into `root`, the whole schema; those that are `opened` are not
    followed again."""
    root = schema if root is None else root
    required = cast("list[str]", schema.get("required", []))
    lines: list[str] = []
    for name, rule in cast("Mapping[str, object]", schema.get("properties", {})).items():
        lines.append(describe_parameter(name, rule, root, required=name in required))
        for inner, path in objects_in(rule, root, opened):
            lines.extend(f"  {line}" for line in parameter_lines(inner, root, opened=path))
    return lines


def objects_in(rule: object, root: JsonObject, opened: frozenset[str]) -> list[tuple[JsonObject, frozenset[str]]]:
    """The schemas of objects whose parts are known, among those that `rule` allows, itself or in a list, each with the
    references that led there."""
    schema = as_schema(rule)
    if "$ref" in schema:
        reference = str(schema["$ref"])
        return [] if reference in opened else objects_in(referred(reference, root), root, opened | {reference})
    if schema.get("properties"):
        return [(schema, opened)]
    branches = cast("list[object]", schema.get("anyOf") or schema.get("oneOf") or [])
    parts = [*branches, *([schema["items"]] if "items" in schema else [])]
    return [found for part in parts for found in objects_in(part, root, opened)]


def describe_parameter(name: str, rule: object, root: JsonObject, *, required: bool) -> str:
    described = as_schema(rule)
    optional = f"default {quote(described['default'])}" if "default" in described else "optional"
    about = first_line(str(described.get("description") or ""))
    return f"{name}: {type_of(rule, root)}, {'required' if required else optional}{about and f'. {about}'}"


def type_of(rule: object, root: JsonObject, *, depth: int = 0) -> str:
    """The type that a schema asks for: `string`, `number or null`, `array of string`, `"a" or "b"`."""
    if depth > DEEPEST:
        return "anything"
    schema = as_schema(rule)
    if "$ref" in schema:
        return type_of(referred(str(schema["$ref"]), root), root, depth=depth + 1)
    if "const" in schema:
        return quote(schema["const"])
    if "enum" in schema:
        return values_of(cast("list[object]", schema["enum"]))
    branches = cast("list[object]", schema.get("anyOf") or schema.get("oneOf") or [])
    if branches:
        return " or ".join(unique(type_of(branch, root, depth=depth + 1) for branch in branches))
    kinds = schema.get("type", "anything")
    names = cast("list[str]", kinds) if isinstance(kinds, list) else [str(kinds)]
    items = f"array of {type_of(schema['items'], root, depth=depth + 1)}" if "items" in schema else "array"
    return " or ".join(items if name == "array" else name for name in names)


def as_schema(rule: object) -> JsonObject:
    """`rule`, or the empty schema where it is `true`, `false` or nothing that JSON Schema knows."""
    return cast("JsonObject", rule) if isinstance(rule, Mapping) else {}


def values_of(values: list[object]) -> str:
    shown = [quote(value) for value in values[:SHOWN]]
    return " or ".join([*shown, f"{len(values) - SHOWN} more"] if len(values) > SHOWN else shown)


def referred(reference: str, root: JsonObject) -> object:
    """What a `#/…` reference leads to in `root`; None where it leads nowhere."""
    found: object = root
    for part in reference.removeprefix("#").strip("/").split("/"):
        found = as_schema(found).get(part)
    return found


def first_line(text: str) -> str:
    """The first paragraph of a description in one line, cut where it is very long."""
    return clip(" ".join(text.strip().partition("\n\n")[0].split()))
