"""Whether a call's arguments fit the tool's JSON Schema, and what to change where they don't. Nothing is called or fetched."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, cast

from art_mcp.core.complaints import complain
from art_mcp.core.quick import Check, quick_check
from art_mcp.core.schemas import close, make_usable
from art_mcp.types import JsonObject, Tool

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError

REMEMBERED = 4096


class Validator(Protocol):
    """What is used of jsonschema's validators, whose own types have holes."""

    def iter_errors(self, instance: Any) -> Iterator[ValidationError]: ...


@dataclass(frozen=True, slots=True)
class Signature:
    """A tool's schema, closed to unknown arguments, as JSON text; and the closure that sees at once that arguments fit."""

    schema_text: str
    surely_fits: Check | None


def validate(arguments: JsonObject, tool: Tool) -> str | None:
    """None where the arguments fit, otherwise one or two short sentences for the model.

    They fit where JSON Schema (Draft 2020-12, `format` not asserted) accepts them and they hold no argument that the schema
    does not name: a schema that says nothing of additional properties is closed, at its top level only. Where a schema
    cannot be used, the tool's server judges: an invalid or endless schema accepts everything, so does a $ref that leads out
    of the schema (nothing is fetched), and from a pattern that Python cannot read on, nothing more is checked.
    """
    signature = signature_of(tool)
    if signature.surely_fits is not None and signature.surely_fits(arguments):
        return None
    errors = list(find_errors(signature.schema_text, arguments))
    return complain(errors, tool.name) if errors else None


def unfit(arguments: JsonObject, tool: Tool) -> set[str]:
    """The arguments whose values the tool's schema does not allow; none where they all fit, or where it cannot be used."""
    paths = (error.absolute_path for error in find_errors(signature_of(tool).schema_text, arguments))
    return {str(path[0]) for path in paths if path}


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
    return Signature(json.dumps(schema), quick_check(schema))


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
