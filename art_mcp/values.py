"""What a setting's annotation does not allow is refused where the setting is made, not where it would do something else."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import isfinite
from operator import ge, gt
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from art_mcp.errors import ConfigError

Bound: TypeAlias = tuple[Callable[[float, float], bool], float, str]
"""How a number is compared, with what, and that in words."""

AboveZero: TypeAlias = Annotated[float, (gt, 0, "a finite number above 0")]
FromZero: TypeAlias = Annotated[float, (ge, 0, "a finite number from 0 on")]
CountFromZero: TypeAlias = Annotated[int, (ge, 0, "a whole number from 0 on")]
CountFromOne: TypeAlias = Annotated[int, (ge, 1, "a whole number from 1 on")]


def check_values(settings: object) -> None:
    """Raises ConfigError for a field of a dataclass that is none of its Literal's words, or a number out of its bounds (NaN and
    infinity always are). Fields whose annotation says neither are passed over."""
    for name, allowed in rules(type(settings)).items():
        value = getattr(settings, name)
        if not any(fits(value, rule) for rule in allowed):
            wanted = " or ".join(worded(rule) for rule in allowed)
            raise ConfigError(f"{type(settings).__name__}: {name} is {value!r}; write {wanted}")


@cache
def rules(kind: type) -> dict[str, tuple[Any, ...]]:
    """What each field with a rule may be: Literals, bounded numbers, NoneType."""
    members = {name: alternatives(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}
    return {name: found for name, found in members.items() if any(has_rule(member) for member in found)}


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union; the hint itself where it is none."""
    return (hint,) if has_rule(hint) else get_args(hint) or (hint,)


def has_rule(hint: Any) -> bool:
    return get_origin(hint) in (Literal, Annotated)


def fits(value: Any, rule: Any) -> bool:
    if get_origin(rule) is Literal:
        return value in get_args(rule)
    if not has_rule(rule):
        return isinstance(value, rule)
    kind, (compare, limit, _) = bounded(rule)
    is_number = type(value) is int or (kind is float and isinstance(value, float))
    return is_number and isfinite(value) and compare(value, limit)


def worded(rule: Any) -> str:
    if get_origin(rule) is Literal:
        return ", ".join(map(repr, get_args(rule)))
    return bounded(rule)[1][2] if has_rule(rule) else "None"


def bounded(rule: Any) -> tuple[type, Bound]:
    """The parts of an Annotated number."""
    kind, bound = get_args(rule)
    return kind, bound
