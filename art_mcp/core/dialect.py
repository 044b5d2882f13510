"""One model's conversations as tokens and its tokens as calls: a template, a tokenizer and a parser together are a Dialect."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeAlias

from art_mcp.core.parse import Parsed, parse_calls
from art_mcp.core.sandbox import plain
from art_mcp.core.template import ChatTemplate
from art_mcp.core.thoughts import opens_thoughts, split_thought, with_thought_told
from art_mcp.core.turns import Shape, shape_of
from art_mcp.ports import Tokenizer
from art_mcp.types import Malformed, Message, Tool, ToolCall

Parse: TypeAlias = Callable[[str, Sequence[Tool]], Parsed]

HEADS = 64
"""How many shared openings are kept as tokens: one for each system message and set of tools that is in use at a time."""
OPENINGS = 256
"""How many whole openings: the rollouts of a group have the same one."""
SPELLINGS = 4096
"""How many single tokens, whose texts clients of an endpoint ask for."""
BRIDGES = 256
"""How many bridges: rollouts of a group often make the same call and get the same result."""


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """Tools that are equal only if they are the very same ones: what they say of themselves is long."""

    tools: Sequence[Tool]

    def __hash__(self) -> int:
        return id(self.tools)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Offer) and other.tools is self.tools


class TemplateDialect:
    """The Dialect of a model with this template; `parse` reads the calls of a turn in the model's own form."""

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, *, stop_token_ids: Iterable[int], parse: Parse = parse_calls
    ) -> None:
        self._tokenizer, self._template, self._parse = tokenizer, template, parse
        self._stops = {token: tokenizer.decode([token]) for token in stop_token_ids}
        self._thinking = opens_thoughts(template)
        self._split = lru_cache(maxsize=HEADS)(self._find_split)
        self._opening = lru_cache(maxsize=OPENINGS)(self._find_opening)
        self._spelling = lru_cache(maxsize=SPELLINGS)(self._spell)
        self._bridge = lru_cache(maxsize=BRIDGES)(self._find_bridge)

    @property
    def stop_token_ids(self) -> frozenset[int]:
        return frozenset(self._stops)

    def opening(self, messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[list[int], list[int]]:
        """The first prompt: the shared part (empty where the tokenizer would not cut there), and the rest."""
        head, rest = self._opening(json.dumps(plain(messages)), Offer(tools))
        return list(head), list(rest)

    def _find_opening(self, messages: str, offer: Offer) -> tuple[tuple[int, ...], tuple[int, ...]]:
        shared, rest = self._template.opening_text(json.loads(messages), offer.tools)
        head = self._split(shared)
        return head, tuple(self._tokenizer.encode(rest if head else shared + rest))

    def bridge(self, reply: Message, following: Sequence[Message], last_token: int) -> list[int]:
        """The tokens between the policy's turn and its next one; only what is new is rendered and tokenized."""
        return list(self._bridge(shape_of(reply), json.dumps(plain(following)), last_token))

    def _find_bridge(self, shape: Shape, following: str, last_token: int) -> tuple[int, ...]:
        ended_with = self._stops.get(last_token, "")
        text = self._template.bridge_text(shape.stand_in(), json.loads(following), ended_with=ended_with)
        return tuple(self._tokenizer.encode(text))

    def written(self, before: Sequence[Message], reply: Message, tools: Sequence[Tool]) -> list[int]:
        """The tokens that the policy would have sampled for `reply` in the template's own form, its stop token included. A
        thought that the template leaves out stands before what is said, so that whoever learns the turn learns all of it."""
        stop_strings = tuple(self._stops.values())
        text = self._template.written(before, reply, tools=tools, stop_strings=stop_strings)
        if str(reply.get("reasoning_content") or "").strip() not in text:
            text = self._template.written(before, with_thought_told(reply), tools=tools, stop_strings=stop_strings)
        return self._tokenizer.encode(text)

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of a turn, without the stop token that it may end with."""
        stopped = bool(token_ids) and token_ids[-1] in self._stops
        return self._tokenizer.decode(token_ids[:-1] if stopped else token_ids)

    def spelling(self, token_id: int) -> str:
        """The text of one token; a token that is a part of a character has U+FFFD in it."""
        return self._spelling(token_id)

    def read(self, token_ids: Sequence[int], tools: Sequence[Tool]) -> tuple[Message, tuple[ToolCall | Malformed, ...]]:
        """The message of a sampled turn, and every call that the policy began in it, with ids that are unique in the turn.

        A turn in the template's own form is rendered back as exactly what was sampled. What cannot be called stays in the
        message's text: all of it where nothing can, the malformed calls alone where others can. A thought with which the turn
        begins stands apart, in whatever form it was written, and no call is read in it: what is weighed there is not made.
        """
        return self.read_text(self.text(token_ids), tools)

    def read_text(self, text: str, tools: Sequence[Tool]) -> tuple[Message, tuple[ToolCall | Malformed, ...]]:
        """`read` of a turn's text."""
        thought, said = split_thought(text, opened=self._thinking)
        parsed = self._parse(said, tools)
        calls = tuple(identified(call, index) for index, call in enumerate(parsed.calls))
        made = [call for call in calls if isinstance(call, ToolCall)]
        broken = [call.text for call in calls if isinstance(call, Malformed)]
        content = "\n".join(part for part in (parsed.content, *broken) if part) if made else said
        message: dict[str, Any] = {"role": "assistant", "content": content} | (
            {"reasoning_content": thought} if thought else {}
        )
        if made:
            message["tool_calls"] = [
                {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
                for call in made
            ]
        return message, calls

    def _spell(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id])

    def _find_split(self, shared: str) -> tuple[int, ...]:
        """The tokens of `shared`, if they stay the same whatever comes next: a few beginnings of a rest are tried."""
        head = self._tokenizer.encode(shared)
        for rest in ("user\nWhy?", "\n\nWhy?", " Why?", "Why?", "é"):
            if self._tokenizer.encode(shared + rest) != [*head, *self._tokenizer.encode(rest)]:
                return ()
        return tuple(head)


def identified(call: ToolCall | Malformed, index: int) -> ToolCall | Malformed:
    # nine letters and digits: the strictest template (Mistral's) takes no other ids
    return replace(call, id=f"call{index:05d}") if isinstance(call, ToolCall) else call
