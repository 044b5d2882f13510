"""A tool's JSON Schema made safe to validate with: what cannot be used in it is left out. Arguments are not known here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any, TypeAlias, cast
from urllib.parse import unquote

Path: TypeAlias = "tuple[str, ...]"
Parts: TypeAlias = "Mapping[Path, object]"

IN_PLACE = frozenset({"allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas"})
"""Keywords whose schemas judge the same value again."""

MAPS = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})
LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
SINGLE = frozenset(
    {"additionalProperties", "unevaluatedProperties", "items", "unevaluatedItems", "contains", "propertyNames", "not", "if"}
    | {"then", "else", "contentSchema"}
)
ANYTHING: Mapping[str, Any] = {"additionalProperties": True, "items": True}
"""Accepts everything, and says of all members that they are known."""

NAMING = frozenset({"$id", "$anchor", "$dynamicAnchor", "$schema", "$vocabulary"})


def close(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with unknown arguments refused, unless it says itself what to do with them."""
    closed = dict(schema)
    if "additionalProperties" not in closed and "unevaluatedProperties" not in closed:
        elsewhere = (IN_PLACE | {"$ref", "$dynamicRef"}) - {"not"}  # keywords that may name arguments beside `properties`
        closed["unevaluatedProperties" if elsewhere & closed.keys() else "additionalProperties"] = False
    return closed


def make_usable(schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """The schema with references to its own parts only (`#`, `#/…`): any other accepts everything, and nothing has a name.

    None where a part would have to judge a value by judging it, which never ends.
    """
    parts = dict(walk((), schema))
    try:
        TopologicalSorter({path: list(judges_by(path, part, parts)) for path, part in parts.items()}).prepare()
    except CycleError:
        return None
    return rewrite(schema, parts)


def walk(path: Path, schema: object) -> Iterator[tuple[Path, object]]:
    """Every schema in a schema, with where it stands."""
    yield path, schema
    for step, inner in inner_schemas(schema):
        yield from walk((*path, *step), inner)


def inner_schemas(schema: object) -> Iterator[tuple[Path, object]]:
    for keyword, value in members_of(schema).items():
        if keyword in MAPS:
            yield from (((keyword, name), inner) for name, inner in members_of(value).items())
        elif keyword in LISTS and isinstance(value, list):
            yield from (((keyword, str(index)), inner) for index, inner in enumerate(cast("list[object]", value)))
        elif keyword in SINGLE:
            yield (keyword,), value


def members_of(schema: object) -> Mapping[str, object]:
    return cast("Mapping[str, object]", schema) if isinstance(schema, Mapping) else {}


def judges_by(path: Path, schema: object, parts: Parts) -> Iterator[Path]:
    """The parts that judge the same value as this one."""
    yield from ((*path, *step) for step, _ in inner_schemas(schema) if step[0] in IN_PLACE)
    aim = target(members_of(schema), parts)
    if aim is not None:
        yield aim


def target(schema: Mapping[str, object], parts: Parts) -> Path | None:
    """Which part a `$ref` means; None where there is none, or it means something else."""
    reference = schema.get("$ref")
    if not isinstance(reference, str) or (reference != "#" and not reference.startswith("#/")):
        return None
    steps = unquote(reference).split("/")[1:]
    path = tuple(step.replace("~1", "/").replace("~0", "~") for step in steps)
    return path if path in parts else None


def rewrite(schema: object, parts: Parts) -> Any:
    """A schema without names, and with what a reference cannot mean turned into what accepts everything."""
    if not isinstance(schema, Mapping):
        return schema
    members = members_of(cast("object", schema))
    usable = {keyword: rewrite_value(keyword, value, parts) for keyword, value in members.items() if keyword not in NAMING}
    if "$dynamicRef" in members or ("$ref" in members and target(members, parts) is None):
        usable.pop("$ref", None)
        usable.pop("$dynamicRef", None)
        others = usable.get("allOf", [])
        usable["allOf"] = [*cast("list[object]", others), ANYTHING] if isinstance(others, list) else others
    return usable


def rewrite_value(keyword: str, value: object, parts: Parts) -> Any:
    if keyword in MAPS and isinstance(value, Mapping):
        return {name: rewrite(inner, parts) for name, inner in members_of(cast("object", value)).items()}
    if keyword in LISTS and isinstance(value, list):
        return [rewrite(inner, parts) for inner in cast("list[object]", value)]
    return rewrite(value, parts) if keyword in SINGLE else value
