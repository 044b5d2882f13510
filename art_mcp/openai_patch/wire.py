"""Chat completions as they pass by: what is asked for in the agent's name, what an answer says. JSON alone; nothing is sent."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

from art_mcp.core.seeds import seed_of
from art_mcp.types import Malformed, MalformedKind, ToolCall, ToolResult, ToolUse

NARROWING = ("top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias")
"""What makes an endpoint sample from another distribution than the policy's own."""

TEXTS = ("content", "reasoning_content", "reasoning", "refusal")
"""The parts of an assistant message that a stream brings in pieces."""

CALLS = 1024
"""More calls than one answer may have: a stream numbers them as it likes."""

MISSHAPEN = (TypeError, AttributeError, LookupError, ValueError)
"""What reading an answer raises that is no chat completion."""


Read: TypeAlias = "dict[str, Any]"
"""A JSON object of somebody else's, whose shape is found out by reading it."""


class Unusable(ValueError):
    """Why a choice cannot be learned from."""


class Contradictory(Unusable):
    """A choice whose parts cannot all be true."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a rollout is sampled under, in place of what the agent asks for.

    `model`: the name that every call goes to (empty: the agent's own). `temperature`: for every call, which then samples from
    the whole distribution (None: as the agent asks). `key`: what the seeds of calls without one are made of, with their number.
    """

    model: str = ""
    temperature: float | None = None
    key: tuple[object, ...] | None = None

    def apply(self, body: Mapping[str, Any], turn: int) -> dict[str, Any]:
        """The body of the agent's call number `turn` (from 0) as it is sent."""
        sent = {**body, "logprobs": True, "return_token_ids": True}
        if self.model:
            sent["model"] = self.model
        if self.temperature is not None:
            sent = {name: value for name, value in sent.items() if name not in NARROWING}
            sent["temperature"] = self.temperature
        if self.key is not None and body.get("seed") is None:
            sent["seed"] = seed_of(*self.key, turn)
        return sent


@dataclass(frozen=True, slots=True)
class Unmade:
    """A call that could not be made: its place among all that the policy began in the turn, and its id where it stands among
    the message's calls all the same."""

    call: Malformed
    place: int
    id: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """One whole choice of an answer; `logprobs` in nats, one for each token. `malformed`: calls that could not be made, where
    the endpoint (this package's does) tells of them."""

    message: Mapping[str, Any]
    finish_reason: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    malformed: tuple[Unmade, ...] = ()


@dataclass(slots=True)
class Draft:
    """A choice while it arrives, whole or in pieces."""

    message: dict[str, Any] = field(default_factory=lambda: {"role": "assistant", "content": ""})
    finish_reason: str = ""
    token_ids: list[Any] | None = None
    logprobs: list[Any] | None = None
    malformed: tuple[Unmade, ...] = ()

    def add(self, choice: Mapping[str, Any]) -> None:
        """Takes in a choice of an answer, or of a chunk of one."""
        said: Read = choice.get("message") or choice.get("delta") or {}
        for name in TEXTS:
            if said.get(name):
                self.message[name] = self.message.get(name, "") + said[name]
        for place, piece in enumerate(said.get("tool_calls") or ()):
            self._add_call(piece, piece.get("index", place))
        if choice.get("token_ids") is not None:
            self.token_ids = [*(self.token_ids or ()), *choice["token_ids"]]
        entries: list[Read] | None = cast("Read", choice.get("logprobs") or {}).get("content")
        if entries is not None:
            self.logprobs = [*(self.logprobs or ()), *(entry["logprob"] for entry in entries)]
        broken: list[Read] = cast("Read", choice.get("art_mcp") or {}).get("malformed") or []
        for one in broken:
            call = Malformed(one["text"], one["error"], MalformedKind(one["kind"]))
            self.malformed += (Unmade(call, int(one.get("index", 0)), str(one.get("id") or "")),)
        self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def _add_call(self, piece: Mapping[str, Any], place: int) -> None:
        if not 0 <= place < CALLS:
            raise ValueError(f"a call of an answer has the index {place}")
        calls = self.message.setdefault("tool_calls", [])
        while len(calls) <= place:
            calls.append({"type": "function", "id": "", "function": {"name": "", "arguments": ""}})
        known: Read = calls[place]
        new: Read = piece.get("function") or {}
        known["id"] = piece.get("id") or known["id"]
        for name in ("name", "arguments"):
            known["function"][name] += new.get(name) or ""

    def whole(self) -> Choice:
        """The choice, when all of it is there. Raises Unusable where nothing can be learned from it."""
        if not self.finish_reason:
            raise Unusable("it was not read to its end")
        if self.token_ids is None:
            raise Unusable("the endpoint returned no token ids")
        if self.logprobs is None:
            raise Unusable("the endpoint returned no logprobs")
        if len(self.logprobs) != len(self.token_ids):
            raise Contradictory(f"the endpoint returned {len(self.token_ids)} token ids with {len(self.logprobs)} logprobs")
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in self.logprobs):
            raise Contradictory("the endpoint returned logprobs that are no finite numbers")
        token_ids, logprobs = checked_ids(self.token_ids), tuple(map(float, self.logprobs))
        return Choice(self.message, self.finish_reason, token_ids, logprobs, self.malformed)


def checked_ids(value: Any) -> tuple[int, ...]:
    """Token ids. Raises Unusable for anything else."""
    tokens = cast("list[Any]", value) if isinstance(value, list) else []
    if not tokens:
        raise Unusable("the endpoint returned no token ids")
    for token in tokens:
        if type(token) is not int or token < 0:
            raise Contradictory(f"the endpoint returned {token!r} in place of a token id")
    return tuple(tokens)


def hide(answer: dict[str, Any], *, asked: Mapping[str, Any]) -> bool:
    """Takes out of an answer, or a chunk of one, what the agent did not ask for; whether anything was there."""
    changed = False
    parts = [answer, *answer["choices"]]
    if not asked.get("return_token_ids"):
        for part in parts:
            for name in ("prompt_token_ids", "token_ids"):
                changed |= part.pop(name, None) is not None
    if not asked.get("logprobs"):
        for part in parts[1:]:
            if part.get("logprobs") is not None:
                part["logprobs"], changed = None, True
    return changed


def as_read(messages: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Messages of the wire as this package writes them: arguments are objects, tool messages have their tool's name."""
    names: dict[str, str] = {}
    read: list[dict[str, Any]] = []
    for message in messages:
        mine = {name: value for name, value in message.items() if value is not None}
        mine["content"] = plain_text(message.get("content"))
        if message.get("tool_calls"):
            mine["tool_calls"] = [{**call, "function": parsed(call["function"])} for call in message["tool_calls"]]
            names |= {call["id"]: call["function"]["name"] for call in message["tool_calls"]}
        if message["role"] == "tool" and message.get("tool_call_id") in names:
            mine["name"] = names[message["tool_call_id"]]
        read.append(mine)
    return tuple(read)


def plain_text(content: Any) -> Any:
    """The text of a message's content, which may come in parts; content with other parts stays as it is."""
    if content is None:
        return ""
    parts = cast("list[Read]", content) if isinstance(content, list) else []
    texts = [str(part["text"]) for part in parts if part.get("type") == "text"]
    return "".join(texts) if texts and len(texts) == len(parts) else cast("Any", content)


def parsed(function: Mapping[str, Any]) -> dict[str, Any]:
    """A call with its arguments as an object, where they are one."""
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (TypeError, ValueError):
        arguments = None
    return {**function, "arguments": arguments if isinstance(arguments, dict) else function["arguments"]}


def uses_of(messages: Sequence[Mapping[str, Any]], malformed: Mapping[int, Sequence[Unmade]]) -> tuple[ToolUse, ...]:
    """The calls of a conversation (as `as_read` gives it) that came back, in the order of their results, and in their places
    those that could not be made (by the turn): with what the agent said to them, or with what there is to fix."""
    turns: list[list[ToolUse]] = []
    waiting, broken = dict[str, Mapping[str, Any]](), dict[str, Unmade]()
    for message in messages:
        if message["role"] == "assistant":  # ids are told apart within a turn only
            waiting = {call["id"]: call["function"] for call in message.get("tool_calls") or ()}
            broken = {one.id: one for one in malformed.get(len(turns), ()) if one.id}
            turns.append([])
        id = str(message.get("tool_call_id") or "")
        call = waiting.pop(id, None) if message["role"] == "tool" else None
        if call is None:
            continue
        said, turn = str(message["content"]), len(turns) - 1
        if id in broken:
            turns[-1].append(ToolUse(broken[id].call, ToolResult(said, is_error=True), turn))
        elif isinstance(call["arguments"], dict):
            arguments: dict[str, Any] = call["arguments"]
            turns[-1].append(ToolUse(ToolCall(call["name"], arguments, id), ToolResult(said), turn))
    for turn, uses in enumerate(turns):
        answered = [use.call for use in uses]
        for one in malformed.get(turn, ()):
            if not any(one.call is call for call in answered):
                uses.insert(one.place, ToolUse(one.call, ToolResult(one.call.error, is_error=True), turn))
    return tuple(use for uses in turns for use in uses)
