"""A policy's turn as a template sees it: its shape, a stand-in for it, how it ends. Nothing is rendered here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from art_mcp.errors import TemplateError
from art_mcp.types import Message


@dataclass(frozen=True, slots=True)
class Shape:
    """What the text around a turn can depend on: whether the turn has text, and the (name, id) of each of its calls."""

    has_text: bool
    calls: tuple[tuple[str, str], ...] = ()

    def stand_in(self, *, content: str = "Ok.", arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """An assistant message of this shape."""
        message: dict[str, Any] = {"role": "assistant", "content": content if self.has_text else ""}
        if self.calls:
            message["tool_calls"] = [
                {"type": "function", "id": id, "function": {"name": name, "arguments": arguments or {}}}
                for name, id in self.calls
            ]
        return message

    def stand_ins(self) -> list[dict[str, Any]]:
        """Messages of this shape that share nothing of what a policy would write, neither at their begin nor at their end."""
        contents = ("Apple", "Berry") if self.has_text else ("",)
        arguments: tuple[dict[str, Any], ...] = ({}, {"x": 1}, {"y": "two"}) if self.calls else ({},)
        return [self.stand_in(content=content, arguments=values) for content in contents for values in arguments]

    def following(self) -> list[dict[str, Any]]:
        """What naturally comes next: a result for each call, or the user."""
        if not self.calls:
            return [{"role": "user", "content": "Go."}]
        return [{"role": "tool", "name": name, "tool_call_id": id, "content": "ok"} for name, id in self.calls]

    @property
    def outline(self) -> Shape:
        """The shape without names, of at most two calls: all that a turn's ending can depend on."""
        return Shape(self.has_text, tuple((f"name{index}", f"call{index:05d}") for index in range(min(2, len(self.calls)))))


@dataclass(frozen=True, slots=True)
class Ending:
    """How a policy's turn ends: `stop` is the last thing that the policy writes.

    Where the template closes a turn itself, a rendering ends with `stop + after`. Where it does not (`closed` is False), `stop`
    is the beginning of the next message, which the policy writes to hand over.
    """

    stop: str
    after: str
    closed: bool

    def body(self, text: str) -> str:
        """`text`, which ends with a turn, without what closes that turn. Raises TemplateError where it ends otherwise."""
        if not self.closed:
            return text
        if not text.endswith(self.stop + self.after):
            raise TemplateError(f"a turn should end with {self.stop + self.after!r}, this one ends with {text[-60:]!r}")
        return text.removesuffix(self.stop + self.after)


def shape_of(reply: Message) -> Shape:
    """The shape of an assistant message; one without calls counts as text, even where it is empty."""
    calls = tuple((str(call["function"]["name"]), str(call.get("id", ""))) for call in reply.get("tool_calls") or ())
    return Shape(bool(reply.get("content")) or not calls, calls)


def stand_in_shapes(reply: Message, following: Sequence[Message]) -> Iterator[tuple[Shape, Sequence[Message]]]:
    """Turns with what follows them, from what happened to what every template takes: all calls, the first, none; then
    what follows as one message of the user's."""
    shape = shape_of(reply)
    yield shape, following
    if len(shape.calls) > 1:
        yield Shape(shape.has_text, shape.calls[:1]), following
    if shape.calls:
        yield Shape(has_text=True), following
    yield Shape(has_text=True), [{"role": "user", "content": "\n".join(str(m.get("content") or "") for m in following)}]


def find_any(strings: Iterable[str], text: str) -> list[re.Match[str]]:
    """Where any of `strings` stands in `text`, in order; where two begin together, the longer one."""
    alternatives = "|".join(re.escape(string) for string in sorted(strings, key=len, reverse=True) if string)
    return list(re.finditer(alternatives, text)) if alternatives else []


def common_prefix(texts: Sequence[str]) -> str:
    """The longest beginning that all texts share."""
    first, last = min(texts), max(texts)
    return first[: next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def common_suffix(texts: Sequence[str]) -> str:
    """The longest end that all texts share."""
    return common_prefix([text[::-1] for text in texts])[::-1]
