"""The turns that one request asks for: sampled under one policy, cut at the client's stops, read as the runner reads them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from secrets import randbits
from typing import Literal, TypeAlias

import anyio

from art_mcp.agent.group import first_failure
from art_mcp.core.seeds import seed_of
from art_mcp.errors import EngineError, TemplateError
from art_mcp.ports import Dialect, Sampler
from art_mcp.serve.asked import Asked
from art_mcp.serve.conversations import Conversations, Prompt
from art_mcp.serve.messages import read_messages, read_tools, thoughts_of
from art_mcp.serve.refusal import Refusal
from art_mcp.serve.shown import show
from art_mcp.types import Completion, Malformed, Message, Policy, SamplingParams, Span

Finish: TypeAlias = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class Voice:
    """A model that an endpoint speaks for, and what was said with it."""

    sampler: Sampler
    dialect: Dialect
    conversations: Conversations = field(default_factory=Conversations)


@dataclass(frozen=True, slots=True)
class Choice:
    """A sampled turn: `reply` as the dialect reads it, `message` as the client gets it, with calls that cannot be made among
    the others where they read as calls. `places` of the message's calls among all that the policy began; those that cannot be
    made with theirs."""

    reply: Message
    message: Message
    span: Span
    finish: Finish
    places: tuple[int, ...]
    malformed: tuple[tuple[int, Malformed], ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """All choices of a request, sampled under `policy` after `prompt`."""

    policy: Policy
    prompt: Prompt
    choices: tuple[Choice, ...]


async def answer(asked: Asked, voice: Voice) -> Answer:
    """Raises Refusal for what the client has to change, EngineError where the engine fails."""
    messages, tools = read_messages(asked.messages), read_tools(asked.tools or ())
    try:
        prompt = voice.conversations.prompt(messages, tools, dialect=voice.dialect, hints=thoughts_of(asked.messages))
    except TemplateError as error:
        raise Refusal(400, str(error), param="messages") from error
    room = voice.sampler.context_length - len(prompt.token_ids)
    if room <= 0:
        raise Refusal(
            400,
            f"the messages are {len(prompt.token_ids)} tokens, and the model's context of {voice.sampler.context_length} "
            "leaves no room for an answer",
            param="messages",
            code="context_length_exceeded",
        )
    temperature = 1.0 if asked.temperature is None else asked.temperature
    params = SamplingParams(min(asked.limit or room, room), temperature, randbits(63) if asked.seed is None else asked.seed)
    completions = await draw(prompt, params, voice, count=asked.n or 1)
    policy = Policy(voice.sampler.policy.name, version_of(completions[0]))
    choices: list[Choice] = []
    for completion in completions:
        choice = read(completion, asked, voice.dialect)
        turn = choice.span.token_ids
        shown = voice.conversations.remember(
            messages, tools, prompt=prompt, turn=turn, reply=choice.reply, shown=choice.message
        )
        choices.append(replace(choice, message=shown))
    return Answer(policy, prompt, tuple(choices))


async def draw(prompt: Prompt, params: SamplingParams, voice: Voice, *, count: int) -> list[Completion]:
    """`count` turns under one policy: where a new one was published in between, all are sampled again. The first turn's
    seed is that of `params`, so that a runner's turn can be asked for."""
    drawn: dict[int, Completion] = {}

    async def take(number: int) -> None:
        own = params if number == 0 else replace(params, seed=seed_of(params.seed, "choice", number))
        stop = voice.dialect.stop_token_ids
        drawn[number] = await voice.sampler.sample(prompt.token_ids, params=own, stop=stop, shared=prompt.shared)

    while not drawn or len({version_of(completion) for completion in drawn.values()}) > 1:
        with first_failure():
            async with anyio.create_task_group() as tasks:
                for number in range(count):
                    tasks.start_soon(take, number)
    return [drawn[number] for number in range(count)]


def version_of(completion: Completion) -> int:
    if completion.span.policy_version is None:
        raise EngineError("the engine did not say which policy it sampled from")
    return completion.span.policy_version


def read(completion: Completion, asked: Asked, dialect: Dialect) -> Choice:
    span, text, ended = cut(completion, asked.stops, dialect)
    offered = read_tools(asked.tools or ()) if asked.reads_calls else ()
    reply, calls = dialect.read_text(text, offered)
    message, places = show(reply, calls, asked)
    malformed = tuple((place, call) for place, call in enumerate(calls) if isinstance(call, Malformed))
    finish: Finish = "length" if not ended else "tool_calls" if places else "stop"
    return Choice(reply, message, span, finish, places, malformed if asked.reads_calls else ())


def cut(completion: Completion, stops: Sequence[str], dialect: Dialect) -> tuple[Span, str, bool]:
    """The turn up to the token with which the first of `stops` is complete, its text before that stop, and whether it ended by
    itself or with a stop. Tokens are sampled one after the other, so those before the cut are what a policy that is stopped
    there would have sampled."""
    span = completion.span
    whole = dialect.text(span.token_ids)
    if not any(stop in whole for stop in stops):
        return span, whole, completion.stopped

    def text_of(count: int) -> str:
        return dialect.text(span.token_ids[:count])

    counts = range(len(span.token_ids) + 1)
    count = bisect_left(counts, True, key=lambda count: any(stop in text_of(count) for stop in stops))
    text = text_of(count)
    logprobs = None if span.logprobs is None else span.logprobs[:count]
    before = text[: min(text.find(stop) for stop in stops if stop in text)]
    return Span(span.token_ids[:count], logprobs, span.policy_version), before, True
