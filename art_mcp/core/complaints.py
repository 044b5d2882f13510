"""What jsonschema found wrong with a call's arguments, said shortly to a small model. Decides nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from art_mcp.core.json_scan import quote

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError

NOUNS = {
    "string": "a string",
    "number": "a number",
    "integer": "an integer",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
LIMITS = {
    "minimum": "must be at least {}",
    "maximum": "must be at most {}",
    "exclusiveMinimum": "must be more than {}",
    "exclusiveMaximum": "must be less than {}",
    "multipleOf": "must be a multiple of {}",
    "minLength": "must have at least {} characters",
    "maxLength": "must have at most {} characters",
    "minItems": "must have at least {} items",
    "maxItems": "must have at most {} items",
    "const": "must be {}",
    "pattern": "must match the pattern {}",
}
SHOWN = 2
"""How many problems besides missing and unknown arguments one message names: a small model fixes little at once."""


def complain(errors: Sequence[ValidationError], tool: str) -> str:
    """One or two sentences for all `errors`: names first, then the first few values."""
    missing = unique(name for error in errors for name in missing_names(error))
    unknown = unique(name for error in errors for name in unknown_names(error))
    values = [error for error in errors if not missing_names(error) and not unknown_names(error)]
    values = [error for error in values if error.validator != "unevaluatedProperties"] or values  # often an echo of others
    told = [f"{plural('missing argument', missing)}"] if missing else []
    told += [f"{plural('unknown argument', unknown)}"] if unknown else []
    if told:
        told.append(describe_tool(errors, tool, only_required=not unknown))
    first_of_each = {tuple(error.absolute_path): error for error in reversed(values)}
    told += [describe(sharpest(error)) for error in list(reversed(first_of_each.values()))[: SHOWN - bool(told)]]
    return "; ".join(told)


def describe(error: ValidationError) -> str:
    """One problem: where, what must be there, and what was."""
    where = quote_path(error.absolute_path)
    if error.validator == "type":
        return f"{where} must be {either(as_names(error.validator_value))}, got {show(error.instance)}"
    if error.validator in ("anyOf", "oneOf") and (names := branch_types(error)):
        return f"{where} must be {either(names)}, got {show(error.instance)}"
    if error.validator == "enum":
        return f"{where} must be one of {listed(cast('list[object]', error.validator_value))}, got {show(error.instance)}"
    if error.validator in LIMITS:
        return f"{where} {LIMITS[str(error.validator)].format(quote(error.validator_value))}, got {show(error.instance)}"
    if missing := missing_of(error):
        return f"{where}: {plural('missing', missing)}"
    return f"{where}: {clip(error.message)}"


def sharpest(error: ValidationError) -> ValidationError:
    """Of a failed `anyOf` or `oneOf`, the problem in the branch that was meant most likely: the deepest, and rather no type."""
    while error.context and not branch_types(error):
        error = max(error.context, key=lambda inner: (len(inner.absolute_path), inner.validator != "type"))
    return error


def describe_tool(errors: Sequence[ValidationError], tool: str, *, only_required: bool) -> str:
    """Which arguments there are: `add needs "a" and "b"`, or `add takes …` where a name was unknown."""
    top = [cast("Any", error.schema) for error in errors if not error.absolute_path]
    schemas = [cast("Mapping[str, Any]", schema) for schema in top if isinstance(schema, Mapping)]
    keyword = "required" if only_required else "properties"
    names = unique(name for schema in schemas for name in schema.get(keyword, ()))
    verb = "needs" if only_required else "takes"
    return f"{tool} {verb} {listed(names, last='and')}" if names else f"{tool} takes no arguments"


def missing_names(error: ValidationError) -> list[str]:
    """The arguments that a top-level `required` misses."""
    return [] if error.absolute_path else missing_of(error)


def missing_of(error: ValidationError) -> list[str]:
    if error.validator != "required":
        return []
    return [name for name in cast("list[str]", error.validator_value) if name not in cast("Any", error.instance)]


def unknown_names(error: ValidationError) -> list[str]:
    """The arguments that the top level of a closed schema does not name."""
    if error.absolute_path or error.validator != "additionalProperties" or error.validator_value is not False:
        return []
    schema = cast("Mapping[str, Any]", error.schema)
    patterns = list(schema.get("patternProperties", ()))
    names = [name for name in cast("Mapping[str, Any]", error.instance) if name not in schema.get("properties", ())]
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]


def branch_types(error: ValidationError) -> list[str]:
    """The types of all branches, where each failed for its type alone; empty otherwise."""
    branches = list(error.context or ())
    if not branches or any(branch.validator != "type" or branch.path for branch in branches):
        return []
    return unique(name for branch in branches for name in as_names(branch.validator_value))


def show(value: object) -> str:
    """A value with its kind, so that `12` and `"12"` are told apart."""
    if isinstance(value, str):
        return f"the string {quote(value)}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"the number {quote(value)}"
    if isinstance(value, list):
        return f"the list {quote(cast('object', value))}"
    return f"the object {quote(cast('object', value))}" if isinstance(value, dict) else quote(value)


def quote_path(path: Iterable[str | int]) -> str:
    """`"items[0].id"`; the arguments as a whole where the path is empty."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")
    return quote(text) if text else "the arguments"


def plural(noun: str, names: Sequence[str]) -> str:
    plain = noun if len(names) == 1 or " " not in noun else f"{noun}s"
    return f"{plain} {listed(names, last='and')}"


def listed(values: Iterable[object], last: str = "or", limit: int = 12) -> str:
    """`"a", "b" or "c"`, with the rest counted behind `limit` values."""
    shown = [quote(value) for value in values] or ["nothing"]
    if len(shown) > limit:
        shown = [*shown[:limit], f"{len(shown) - limit} more"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} {last} {shown[-1]}"


def either(names: Sequence[str]) -> str:
    return " or ".join(NOUNS.get(name, name) for name in names)


def as_names(value: object) -> list[str]:
    return cast("list[str]", value) if isinstance(value, list) else [str(value)]


def unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def clip(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
