"""Endpoints for tests and who asks them: the real openai client, an agent written the usual way, samplers that do as told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx2
from openai import AsyncOpenAI

from art_mcp.serve.app import Desk
from art_mcp.serve.listen import Endpoint
from art_mcp.serve.turn import Voice
from art_mcp.types import Completion, Policy, SamplingParams, Span
from tests.agent.players import dialect, tokens

LOOK = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
USER = {"role": "user", "content": "What is 2 plus 3?"}


@dataclass
class Told:
    """A Sampler that writes `turns` (texts, or tokens) one after the other, whoever asks, and remembers what it was asked;
    `steps` are the policy versions that it samples under, the last one from then on."""

    turns: Sequence[str | Sequence[int]]
    steps: Sequence[int] = (0,)
    context_length: int = 100_000
    asked: list[tuple[tuple[int, ...], SamplingParams]] = field(default_factory=list)
    stopped: bool = True

    @property
    def policy(self) -> Policy:
        return Policy("told", self._step(len(self.asked)))

    def _step(self, number: int) -> int:
        return self.steps[min(number, len(self.steps) - 1)]

    async def sample(
        self, token_ids: Sequence[int], *, params: SamplingParams, stop: frozenset[int], shared: int = 0
    ) -> Completion:
        number = len(self.asked)
        self.asked.append((tuple(token_ids), params))
        said = self.turns[number % len(self.turns)]
        whole = tokens(said) if isinstance(said, str) else said
        turn = whole[: None if self.stopped else -1][: params.max_tokens]
        logprobs = tuple(-0.25 * (place + 1) for place in range(len(turn)))
        return Completion(Span(tuple(turn), logprobs, self._step(number)), bool(turn) and turn[-1] in stop)


@dataclass
class Slow:
    """A Sampler that waits until it is let go; `full` is set when so many wait, `freed` when so many were called off."""

    waits_for: int
    calls_off: int
    policy: Policy = field(default_factory=lambda: Policy("slow", 0))
    context_length: int = 100_000
    waiting: int = 0
    called_off: int = 0
    full: anyio.Event = field(default_factory=anyio.Event)
    freed: anyio.Event = field(default_factory=anyio.Event)
    go: anyio.Event = field(default_factory=anyio.Event)

    async def sample(
        self, token_ids: Sequence[int], *, params: SamplingParams, stop: frozenset[int], shared: int = 0
    ) -> Completion:
        self.waiting += 1
        if self.waiting == self.waits_for:
            self.full.set()
        try:
            await self.go.wait()
        except BaseException:
            self.called_off += 1
            if self.called_off == self.calls_off:
                self.freed.set()
            raise
        finally:
            self.waiting -= 1
        turn = tokens(str(params.seed))
        return Completion(Span(tuple(turn), (-0.5,) * len(turn), 0), stopped=True)


def voice_of(sampler: Any) -> Voice:
    return Voice(sampler, dialect())


@asynccontextmanager
async def opened(voice: Voice, **options: Any):
    """An endpoint of one model, and a client of it that asks once."""
    async with (
        Endpoint({voice.sampler.policy.name: voice}, **options) as endpoint,
        httpx2.AsyncClient(verify=False) as plain,  # certificates take a while to load, and there are none here
        AsyncOpenAI(base_url=endpoint.base_url, api_key=endpoint.token, max_retries=0, http_client=plain) as client,
    ):
        yield client, endpoint


@asynccontextmanager
async def direct(voice: Voice):
    """The same without a socket: a client whose requests go straight into the app, where a bug raises."""
    desk = Desk({voice.sampler.policy.name: voice})
    transport = httpx2.ASGITransport(app=desk.app(token="right", hosts=["localhost"]))
    async with (
        httpx2.AsyncClient(transport=transport) as straight,
        AsyncOpenAI(base_url="http://localhost/v1", api_key="right", max_retries=0, http_client=straight) as client,
    ):
        yield client, desk


@dataclass
class Call:
    """What an agent got for one call of the API."""

    prompt: tuple[int, ...]
    turn: tuple[int, ...]
    logprobs: tuple[float, ...]
    bridged: bool


async def agent(
    client: AsyncOpenAI,
    session: Any,
    *,
    model: str,
    messages: list[Any],
    tools: list[dict[str, Any]],
    seeds: Sequence[int],
    limit: int,
    temperature: float,
    mends: bool = False,
) -> list[Call]:
    """An agent loop as everybody writes it, over an MCP client; `mends` tells the model of calls that cannot be made in our
    runner's words, which the endpoint says in a field of its own."""
    calls: list[Call] = []
    for seed in seeds:
        answer = await client.chat.completions.create(
            model=model,
            messages=messages,
            tools=tools,
            seed=seed,
            max_tokens=limit,
            temperature=temperature,
            logprobs=True,
            extra_body={"return_token_ids": True},
        )
        (choice,) = answer.choices
        logprobs = tuple(entry.logprob for entry in choice.logprobs.content)
        calls.append(Call(tuple(answer.prompt_token_ids), tuple(choice.token_ids), logprobs, answer.art_mcp["bridged"]))
        messages.append(choice.message)
        results = []
        malformed = choice.art_mcp["malformed"] if mends else []
        wrong = {one["id"]: one["error"] for one in malformed if "id" in one}
        for call in choice.message.tool_calls or ():
            if call.id in wrong:
                text = wrong[call.id]
            else:
                result = await session.call_tool(call.function.name, json.loads(call.function.arguments))
                text = "\n".join(block.text for block in result.content)
            results.append({"role": "tool", "tool_call_id": call.id, "content": text})
        for one in malformed:
            if "id" not in one:
                results.insert(one["index"], {"role": "tool", "content": one["error"]})
        if not results or choice.finish_reason == "length":
            break
        messages += results
    return calls
