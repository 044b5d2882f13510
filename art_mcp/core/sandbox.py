"""The sandboxed Jinja environment in which chat templates run, the same as transformers'. What is rendered is not known here.

Source of every rule: `transformers/utils/chat_template_utils.py` (5.23), `_compile_jinja_template` and the helpers below it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


def compile_template(source: str, now: datetime | None) -> jinja2.Template:
    """The template, compiled. `strftime_now` gives `now`; without one it raises. Raises jinja2.TemplateSyntaxError."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    known: Any = environment  # jinja2 leaves the types of its filters and globals open
    known.filters["tojson"] = to_json
    known.globals.update(raise_exception=refuse, strftime_now=clock(now), dict=PlainDict(), namespace=PlainNamespace)
    return environment.from_string(source)


class Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what the assistant wrote; a rendering only passes it through."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares a plain set

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("pass_through"), [], [], body).set_lineno(line)

    def pass_through(self, caller: Macro) -> str:
        return caller()


class PlainDict:
    """What templates call `dict`: it makes dicts, and shows nothing of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class PlainNamespace(Namespace):
    """What templates call `namespace`; names that begin with an underscore are refused (they lead into CPython)."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # pyright: ignore[reportSelfClsParameterName]  # `self` may be a name
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            check_name(name)
        Namespace.__init__(cast("PlainNamespace", args[0]), attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        check_name(name)
        super().__setitem__(name, value)


def check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name that begins with an underscore: {name!r}")


def refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def to_json(
    x: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # the parameters are the filter's, as templates pass them; Jinja's own would escape HTML
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def clock(now: datetime | None) -> Callable[[str], str]:
    def strftime_now(format: str) -> str:
        if now is None:
            raise jinja2.TemplateError("the template writes today's date: hand in `now`")
        return now.strftime(format)

    return strftime_now


def plain(value: object) -> Any:
    """`value` rebuilt of plain JSON types, so that a template meets no method that could do harm."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int | float):
        return int.__int__(value) if isinstance(value, int) else float.__float__(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in cast("Mapping[object, object]", value).items()}
    if isinstance(value, list | tuple):
        items = [plain(item) for item in cast("list[object]", value)]
        return tuple(items) if isinstance(value, tuple) else items
    return f"<{type(value).__name__}>"


def plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates see it: keys with None left out, reasoning under each of the names that templates read."""
    result: dict[str, Any] = plain({key: value for key, value in message.items() if value is not None})
    reasoning = next((result[key] for key in REASONING_FIELDS if result.get(key) is not None), None)
    return result if reasoning is None else {"thinking": reasoning, **result, "reasoning_content": reasoning}
