"""JSON Schemas of the usual kinds as closures that see at once that a value fits; what they leave open, jsonschema decides."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

Check: TypeAlias = Callable[[Any], bool]
"""True only where jsonschema accepts too; False says nothing."""

TYPES: Mapping[str, frozenset[type]] = {
    "string": frozenset({str}),
    "integer": frozenset({int}),
    "number": frozenset({int, float}),
    "boolean": frozenset({bool}),
    "null": frozenset({type(None)}),
    "array": frozenset({list}),
    "object": frozenset({dict}),
}
"""Exact types, so a bool is no number. A float such as 1.0 is an integer too: that is left to jsonschema."""

NUMBERS, ARRAY, WORDS = TYPES["number"], TYPES["array"], frozenset({str, type(None)})
ANNOTATIONS = frozenset(
    {"$comment", "$schema", "default", "deprecated", "description", "examples", "format", "readOnly", "title", "writeOnly"}
)
OBJECT = frozenset({"properties", "required", "additionalProperties"})
LIMITS: Mapping[str, Callable[[Any], Check]] = {
    "minimum": lambda limit: lambda value: type(value) in NUMBERS and value >= limit,
    "maximum": lambda limit: lambda value: type(value) in NUMBERS and value <= limit,
    "exclusiveMinimum": lambda limit: lambda value: type(value) in NUMBERS and value > limit,
    "exclusiveMaximum": lambda limit: lambda value: type(value) in NUMBERS and value < limit,
    "minLength": lambda limit: lambda value: type(value) is str and len(value) >= limit,
    "maxLength": lambda limit: lambda value: type(value) is str and len(value) <= limit,
    "minItems": lambda limit: lambda value: type(value) is list and len(cast("list[Any]", value)) >= limit,
    "maxItems": lambda limit: lambda value: type(value) is list and len(cast("list[Any]", value)) <= limit,
}
HANDLED = ANNOTATIONS | OBJECT | LIMITS.keys() | {"$defs", "$ref", "anyOf", "const", "enum", "items", "type"}
REFERENCE = re.compile(r"#/\$defs/([A-Za-z0-9_.-]+)")
LEVELS = 32
"""Of rules in rules, references followed."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A schema within a schema. `types`, where it asks for no more: an object looks at its members' types itself."""

    check: Check
    types: frozenset[type] | None = None


class Unusual(Exception):
    """The schema says something that is left to jsonschema."""


class Definitions:
    """What references in a schema may mean. Each definition is read once: they may lead to each other in very many ways."""

    def __init__(self, definitions: object) -> None:
        self.definitions = cast("dict[str, object]", definitions) if isinstance(definitions, dict) else {}
        self.rules: dict[str, Rule | None] = {}

    def read(self, reference: object, *, levels: int) -> Rule:
        """Raises Unusual, also for a definition that refers to itself."""
        match = REFERENCE.fullmatch(reference) if isinstance(reference, str) else None
        if match is None or match[1] not in self.definitions:
            raise Unusual
        if match[1] not in self.rules:
            self.rules[match[1]] = None
            self.rules[match[1]] = read_rule(self.definitions[match[1]], self, levels=levels)
        rule = self.rules[match[1]]
        if rule is None:
            raise Unusual
        return rule


def quick_check(schema: Mapping[str, Any]) -> Check | None:
    """The closure for a schema; None where any part of it is unusual: a recursive or remote reference, a pattern, `oneOf`…"""
    try:
        return read_rule(schema, Definitions(schema.get("$defs")), levels=LEVELS).check
    except Unusual:
        return None


def read_rule(rule: object, named: Definitions, *, levels: int) -> Rule:
    """Raises Unusual. `named` are the definitions that references may mean, `levels` how many rules may be in one another."""
    if rule is True:
        return Rule(always)
    if not isinstance(rule, dict) or not levels:
        raise Unusual
    members = cast("dict[str, Any]", rule)
    if not members.keys() <= HANDLED:
        raise Unusual
    if members.keys() - ANNOTATIONS == {"anyOf"}:
        return either([read_rule(branch, named, levels=levels - 1) for branch in as_list(members["anyOf"])])
    checks = read_values(members, named, levels=levels - 1)
    if "type" not in members:
        return Rule(join(checks))
    types = read_types(members["type"])
    if not checks:
        return of_types(types)
    implied = ARRAY if "items" in members else TYPES["object"] if OBJECT & members.keys() else None
    return Rule(join(checks if types == implied else [lambda value: type(value) in types, *checks]))


def read_values(members: Mapping[str, Any], named: Definitions, *, levels: int) -> list[Check]:
    """A check for each keyword but `type`."""
    checks: list[Check] = []
    if OBJECT & members.keys():
        checks.append(read_object(members, named, levels=levels))
    if "items" in members:
        checks.append(every_item(read_rule(members["items"], named, levels=levels)))
    if "anyOf" in members:
        checks.append(either([read_rule(branch, named, levels=levels) for branch in as_list(members["anyOf"])]).check)
    if "$ref" in members:
        checks.append(named.read(members["$ref"], levels=levels).check)
    if "enum" in members:
        checks.append(one_of(as_list(members["enum"])))
    if "const" in members:
        checks.append(one_of([members["const"]]))
    for keyword in LIMITS.keys() & members.keys():
        if type(members[keyword]) not in NUMBERS:
            raise Unusual
        checks.append(LIMITS[keyword](members[keyword]))
    return checks


def read_object(members: Mapping[str, Any], named: Definitions, *, levels: int) -> Check:
    properties, required = members.get("properties", {}), as_list(members.get("required", []))
    if not isinstance(properties, dict) or not all(isinstance(name, str) for name in required):
        raise Unusual
    others = members.get("additionalProperties", True)
    beyond = None if others is False else read_rule(others, named, levels=levels).check
    rules = {name: read_rule(rule, named, levels=levels) for name, rule in cast("dict[str, object]", properties).items()}
    return object_check(rules, frozenset(cast("list[str]", required)), beyond)


def object_check(rules: Mapping[str, Rule], required: frozenset[str], beyond: Check | None) -> Check:
    """For an object with these members; `beyond` is for those that have no rule, None where there may be none."""
    type_for = {name: rule.types for name, rule in rules.items() if rule.types is not None}.get
    check_for = {name: rule.check for name, rule in rules.items() if rule.types is None}.get

    def check(value: Any) -> bool:
        if type(value) is not dict:
            return False
        members = cast("dict[str, Any]", value)
        for name, member in members.items():
            allowed = type_for(name)
            if allowed is not None:
                if type(member) not in allowed:
                    return False
            else:
                rule = check_for(name, beyond)
                if rule is None or not rule(member):
                    return False
        return required.issubset(members)

    return check


def every_item(rule: Rule) -> Check:
    check, types = rule.check, rule.types
    if types is not None:
        return lambda value: type(value) is list and types.issuperset(map(type, cast("list[Any]", value)))
    return lambda value: type(value) is list and all(map(check, cast("list[Any]", value)))


def either(rules: list[Rule]) -> Rule:
    checks, types = [rule.check for rule in rules], [rule.types for rule in rules if rule.types is not None]
    if len(types) == len(rules):
        return of_types(frozenset[type]().union(*types))
    return Rule(lambda value: any(check(value) for check in checks))


def of_types(types: frozenset[type]) -> Rule:
    return Rule(lambda value: type(value) in types, types)


def one_of(values: list[Any]) -> Check:
    """Of texts and null alone: when numbers are equal is left to jsonschema, for which true is not 1."""
    known = frozenset(value for value in values if type(value) in WORDS)
    return lambda value: type(value) in WORDS and value in known


def join(checks: list[Check]) -> Check:
    match checks:
        case []:
            return always
        case [check]:
            return check
        case [first, second]:
            return lambda value: first(value) and second(value)
        case _:
            return lambda value: all(check(value) for check in checks)


def always(value: Any) -> bool:
    return True


def read_types(names: object) -> frozenset[type]:
    allowed: set[type] = set()
    for name in cast("list[object]", names) if isinstance(names, list) else [names]:
        if not isinstance(name, str) or name not in TYPES:
            raise Unusual
        allowed |= TYPES[name]
    return frozenset(allowed)


def as_list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise Unusual
    return cast("list[Any]", value)
