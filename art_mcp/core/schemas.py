"""A tool's JSON Schema made safe to validate with: what cannot be used in it is left out. Arguments are not known here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias, cast
from urllib.parse import unquote

Path: TypeAlias = "tuple[str, ...]"

IN_PLACE = frozenset({"allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas"})
"""Keywords whose schemas judge the same value again."""

MAPS = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})
LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
SINGLE = frozenset(
    {"additionalProperties", "unevaluatedProperties", "items", "unevaluatedItems", "contains", "propertyNames", "not", "if"}
    | {"then", "else", "contentSchema"}
)
NAMING = frozenset({"$id", "$anchor", "$dynamicAnchor", "$schema", "$vocabulary"})


def close(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with unknown arguments refused, unless it says itself what to do with them."""
    closed = dict(schema)
    if "additionalProperties" not in closed and "unevaluatedProperties" not in closed:
        elsewhere = (IN_PLACE | {"$ref", "$dynamicRef"}) - {"not"}  # keywords that may name arguments beside `properties`
        closed["unevaluatedProperties" if elsewhere & closed.keys() else "additionalProperties"] = False
    return closed


def make_usable(schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """The schema without names of its own and with `true` in place of each part that refers to anything but a part of it by
    `#/…`; None where a part would have to judge the same value by itself forever."""
    parts = dict(walk((), schema))
    if has_loop(parts):
        return None
    usable = rewrite((), schema, parts)
    return usable if isinstance(usable, dict) else {}


def walk(path: Path, schema: object) -> Iterator[tuple[Path, object]]:
    """Every schema in a schema, with where it stands."""
    yield path, schema
    for step, inner in inner_schemas(schema):
        yield from walk((*path, *step), inner)


def inner_schemas(schema: object) -> Iterator[tuple[Path, object]]:
    for keyword, value in cast("Mapping[str, object]", schema).items() if isinstance(schema, Mapping) else ():
        if keyword in MAPS and isinstance(value, Mapping):
            yield from (((keyword, name), inner) for name, inner in cast("Mapping[str, object]", value).items())
        elif keyword in LISTS and isinstance(value, list):
            yield from (((keyword, str(index)), inner) for index, inner in enumerate(cast("list[object]", value)))
        elif keyword in SINGLE:
            yield (keyword,), value


def target(schema: Mapping[str, object], parts: Mapping[Path, object]) -> Path | None:
    """Which part a `$ref` means; None where it means none, or nothing that can be known beforehand."""
    reference = schema.get("$ref")
    if "$dynamicRef" in schema or not isinstance(reference, str) or (reference != "#" and not reference.startswith("#/")):
        return None
    steps = unquote(reference).split("/")[1:]
    path = tuple(step.replace("~1", "/").replace("~0", "~") for step in steps)
    return path if path in parts else None


def refers(schema: object) -> bool:
    return isinstance(schema, Mapping) and bool({"$ref", "$dynamicRef"} & cast("Mapping[str, object]", schema).keys())


def rewrite(path: Path, schema: object, parts: Mapping[Path, object]) -> object:
    if not isinstance(schema, Mapping):
        return schema
    members = cast("Mapping[str, object]", schema)
    if refers(members) and target(members, parts) is None:
        return True
    usable = {keyword: value for keyword, value in members.items() if keyword not in NAMING}
    for step, inner in inner_schemas(members):
        place = usable
        for name in step[:-1]:
            place[name] = place[name]
    return usable


def has_loop(parts: Mapping[Path, object]) -> bool:
    return False
