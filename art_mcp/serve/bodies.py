"""Answers as OpenAI's clients read them: one object, or chunks of a stream. Beyond that: `art_mcp`, and vLLM's token ids."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from art_mcp.ports import Dialect
from art_mcp.serve.asked import Asked
from art_mcp.serve.turn import Answer, Choice
from art_mcp.types import Malformed, Message, Span

LEAST = -9999.0
"""What OpenAI writes for a log probability that JSON has no number for."""


@dataclass(frozen=True, slots=True)
class Body:
    """An answer with what its request wants to see of it; `id` and `created` are new for each."""

    answer: Answer
    asked: Asked
    dialect: Dialect
    id: str
    created: int

    def whole(self) -> dict[str, Any]:
        """A chat.completion."""
        choices = [
            {
                "index": index,
                "message": message_of(choice.message) | {"refusal": None},
                "finish_reason": choice.finish,
                **self._of_tokens(choice.span),
                "art_mcp": about(choice),
            }
            for index, choice in enumerate(self.answer.choices)
        ]
        return {**self._head("chat.completion"), **self._prompt(), "choices": choices, "usage": self._usage()}

    def chunks(self) -> Iterator[dict[str, Any]]:
        """The same as chat.completion.chunk objects. A turn is streamed when it is complete: samplers give whole turns."""
        counted = self.asked.stream_options is not None and bool(self.asked.stream_options.include_usage)
        head = self._head("chat.completion.chunk") | ({"usage": None} if counted else {})
        prompt = self._prompt()
        for index, choice in enumerate(self.answer.choices):
            more = self._of_tokens(choice.span)
            for delta in deltas(message_of(choice.message)):
                part = {"index": index, "delta": delta, "finish_reason": None, "logprobs": None, **more}
                yield {**head, **prompt, "choices": [part]}
                more, prompt = {}, {}
            last = {"index": index, "delta": {}, "finish_reason": choice.finish, "logprobs": None, "art_mcp": about(choice)}
            yield {**head, "choices": [last]}
        if counted:
            yield {**head, "choices": [], "usage": self._usage()}

    def _head(self, kind: str) -> dict[str, Any]:
        own = {"bridged": self.answer.prompt.bridged, "policy": str(self.answer.policy)}
        return {"id": self.id, "object": kind, "created": self.created, "model": str(self.answer.policy), "art_mcp": own}

    def _prompt(self) -> dict[str, Any]:
        return {"prompt_token_ids": self.answer.prompt.token_ids} if self.asked.return_token_ids else {}

    def _of_tokens(self, span: Span) -> dict[str, Any]:
        logprobs = {"content": self._logprobs(span), "refusal": None} if self.asked.logprobs else None
        return {"logprobs": logprobs} | ({"token_ids": span.token_ids} if self.asked.return_token_ids else {})

    def _logprobs(self, span: Span) -> list[dict[str, Any]]:
        """One entry a sampled token, the stop token included."""
        pairs = zip(span.token_ids, span.logprobs or (), strict=True)
        return [spelled(self.dialect.spelling(token), logprob) for token, logprob in pairs]

    def _usage(self) -> dict[str, int]:
        prompt = len(self.answer.prompt.token_ids)
        completion = sum(len(choice.span.token_ids) for choice in self.answer.choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def spelled(text: str, logprob: float) -> dict[str, Any]:
    whole = "\N{REPLACEMENT CHARACTER}" not in text  # otherwise a part of a character, whose bytes are not known here
    return {
        "token": text,
        "logprob": LEAST if math.isnan(logprob) else max(logprob, LEAST),
        "bytes": list(text.encode()) if whole else None,
        "top_logprobs": [],
    }


def message_of(message: Message) -> dict[str, Any]:
    """The message with its calls' arguments as JSON text; `content` is null where there are calls alone."""
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in message.get("tool_calls") or ()
    ]
    content = None if calls and not message["content"] else message["content"]
    return {**message, "content": content} | ({"tool_calls": calls} if calls else {})


def deltas(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"role": "assistant", "content": "" if message["content"] is not None else None}
    for field in ("reasoning_content", "content"):
        if message.get(field):
            yield {field: message[field]}
    for index, call in enumerate(message.get("tool_calls") or ()):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        function = {"name": name, "arguments": ""}
        yield {"tool_calls": [{"index": index, "id": call["id"], "type": "function", "function": function}]}
        yield {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}


def about(choice: Choice) -> dict[str, Any]:
    """The calls that the policy began and that cannot be made. Those with an `id` are among the message's calls, the others
    stand in its content as they were written."""
    ids = {place: call["id"] for place, call in zip(choice.places, choice.message.get("tool_calls") or (), strict=True)}
    return {"malformed": [malformed(place, call, id=ids.get(place)) for place, call in choice.malformed]}


def malformed(place: int, call: Malformed, *, id: str | None) -> dict[str, Any]:
    named = {} if id is None else {"id": id}
    return {"index": place, **named, "text": call.text, "error": call.error, "kind": call.kind.value}
