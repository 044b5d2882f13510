"""Whether a call's arguments fit the tool's JSON Schema, and what to change where they don't. Nothing is called or fetched."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, cast

from art_mcp.core.complaints import complain
from art_mcp.core.schemas import close, make_usable
from art_mcp.types import JsonObject, Tool

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError

SCALARS: Mapping[str, frozenset[type]] = {
    "string": frozenset({str}),
    "integer": frozenset({int}),
    "number": frozenset({int, float}),
    "boolean": frozenset({bool}),
    "null": frozenset({type(None)}),
}
"""Exact types, so a bool is no number. A float such as 1.0 is an integer too: that is left to jsonschema."""

ANNOTATIONS = frozenset(
    {"$comment", "$schema", "default", "deprecated", "description", "examples", "format", "readOnly", "title", "writeOnly"}
)
FLAT = ANNOTATIONS | {"type", "properties", "required", "additionalProperties"}
REMEMBERED = 4096


class Validator(Protocol):
    """What is used of jsonschema's validators, whose own types have holes."""

    def iter_errors(self, instance: Any) -> Iterator[ValidationError]: ...


@dataclass(frozen=True, slots=True)
class Signature:
    """A tool's schema, closed to unknown arguments, as JSON text; and its quick form where the schema is flat and scalar."""

    schema_text: str
    types: Mapping[str, frozenset[type]] | None
    required: frozenset[str]

    def surely_fits(self, arguments: JsonObject) -> bool:
        """True only where jsonschema accepts too; False means that jsonschema must decide."""
        types = self.types
        if types is None:
            return False
        for name, value in arguments.items():
            allowed = types.get(name)
            if allowed is None or type(value) not in allowed:
                return False
        return self.required <= arguments.keys()


def validate(arguments: JsonObject, tool: Tool) -> str | None:
    """None where the arguments fit, otherwise one or two short sentences for the model.

    They fit where JSON Schema (Draft 2020-12, `format` not asserted) accepts them and they hold no argument that the schema
    does not name: a schema that says nothing of additional properties is closed, at its top level only. Where a schema
    cannot be used, the tool's server judges: an invalid or endless schema accepts everything, so does a $ref that leads out
    of the schema (nothing is fetched), and from a pattern that Python cannot read on, nothing more is checked.
    """
    signature = signature_of(tool)
    if signature.surely_fits(arguments):
        return None
    errors = list(find_errors(signature.schema_text, arguments))
    return complain(errors, tool.name) if errors else None


def signature_of(tool: Tool) -> Signature:
    known = _signatures.get(id(tool))
    if known is not None and known[0] is tool:
        return known[1]
    signature = read_signature(json.dumps(dict(tool.parameters)))
    if len(_signatures) >= REMEMBERED:
        _signatures.clear()
    _signatures[id(tool)] = (tool, signature)
    return signature


_signatures: dict[int, tuple[Tool, Signature]] = {}
"""By identity, because a tool holds a dict and has no hash; it keeps the tool alive, so that no id is used twice."""


@lru_cache(REMEMBERED)
def read_signature(parameters: str) -> Signature:
    schema = close(json.loads(parameters))
    types, required = flat_types(schema), schema.get("required", ())
    return Signature(json.dumps(schema), types, frozenset(required if types is not None else ()))


def flat_types(schema: Mapping[str, Any]) -> dict[str, frozenset[type]] | None:
    """The types by argument name, where the schema says nothing else; None otherwise."""
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not schema.keys() <= FLAT or schema.get("type") != "object" or schema["additionalProperties"] is not False:
        return None
    if not isinstance(properties, dict) or not isinstance(required, list):
        return None
    if not all(isinstance(name, str) for name in cast("list[object]", required)):
        return None
    types = {name: scalar_types(rule) for name, rule in cast("dict[str, object]", properties).items()}
    known = {name: allowed for name, allowed in types.items() if allowed is not None}
    return known if len(known) == len(types) else None


def scalar_types(rule: object) -> frozenset[type] | None:
    """What a property may be, where its rule is a scalar type, a list of those, or `anyOf` of those."""
    if not isinstance(rule, dict):
        return None
    keys = cast("dict[str, Any]", rule).keys() - ANNOTATIONS
    if keys == {"type"}:
        names = cast("Any", rule["type"])
        return union([SCALARS.get(name) if isinstance(name, str) else None for name in as_list(names)])
    if keys == {"anyOf"}:
        return union([scalar_types(branch) for branch in as_list(cast("Any", rule["anyOf"]))])
    return None


def union(kinds: list[frozenset[type] | None]) -> frozenset[type] | None:
    known = [kind for kind in kinds if kind is not None]
    return frozenset[type]().union(*known) if known and len(known) == len(kinds) else None


def as_list(value: object) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else [value]


def find_errors(schema_text: str, arguments: JsonObject) -> Iterator[ValidationError]:
    """What jsonschema finds, up to the first part of the schema that Python cannot compute."""
    validator = compiled(schema_text)
    if validator is None:
        return
    try:
        yield from validator.iter_errors(arguments)
    except (re.error, OverflowError, RecursionError):
        return


@lru_cache(REMEMBERED)
def compiled(schema_text: str) -> Validator | None:
    """The validator of a schema, with nothing outside of it in reach; None where the schema is invalid."""
    from jsonschema import Draft202012Validator
    from referencing import Registry

    nothing_remote = Registry[Any]()
    meta = cast("Validator", Draft202012Validator(Draft202012Validator.META_SCHEMA, registry=nothing_remote))
    schema = make_usable(json.loads(schema_text))
    if schema is None or next(iter(meta.iter_errors(schema)), None) is not None:
        return None
    return cast("Validator", Draft202012Validator(schema, registry=nothing_remote))
