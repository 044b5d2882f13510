"""A tool's JSON Schema as the model is told of it: the same text, whoever asked its server. Arguments are not known here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
SCHEMAS = frozenset(
    {"items", "prefixItems", "additionalProperties", "anyOf", "oneOf", "allOf", "not", "if", "then", "else", "contains"}
)


def parameters_of(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema in one order of keys: a server sends them in another one in each protocol era, and the model reads them."""
    cleaned = without_titles(schema)
    cleaned.pop("title", None)
    required = {"required": cleaned["required"]} if "required" in cleaned else {}
    return {"type": "object", "properties": cleaned.get("properties", {}), **required, **cleaned}


def without_titles(schema: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """A JSON Schema without the titles that pydantic makes of names; a title that says something else stays, and so does a
    property called "title"."""
    cleaned: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "title" and isinstance(value, str) and plain(value) == plain(name):
            continue
        if key in NAMED_SCHEMAS and isinstance(value, Mapping):
            named = cast("Mapping[str, Any]", value)
            cleaned[key] = {inner: clean(part, inner) for inner, part in named.items()}
        else:
            cleaned[key] = clean(value, name) if key in SCHEMAS else value
    return cleaned


def clean(part: Any, name: str) -> Any:
    """`without_titles` of whatever stands where a schema, or a list of schemas, may stand."""
    if isinstance(part, Mapping):
        return without_titles(cast("Mapping[str, Any]", part), name)
    if isinstance(part, list):
        return [clean(member, name) for member in cast("list[Any]", part)]
    return part


def plain(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())
