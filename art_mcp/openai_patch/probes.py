"""What a check asks of an endpoint, one function a line of its report. Each says what it found, or raises Missing or Wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from art_mcp.openai_patch.desk import FORCED, QUESTION, TOOLS, TRIES, WHAT, Desk, Missing, Wrong
from art_mcp.openai_patch.patch import record
from art_mcp.openai_patch.wire import Choice, Draft, Read, checked_ids
from art_mcp.types import Span


async def models(desk: Desk) -> str:
    found = [model.id for model in (await desk.client.models.list()).data]
    if not found:
        raise Missing("the endpoint lists none")
    desk.model = desk.model or found[0]
    if desk.model not in found:
        raise Missing(f"{desk.model!r} is not listed; there is {', '.join(found)}")
    return ", ".join(found)


async def chat(desk: Desk) -> str:
    answer: Any = await desk.client.chat.completions.create(model=desk.model, messages=[QUESTION], max_tokens=16)
    try:
        choice = answer.model_dump()["choices"][0]
        text = str(choice["message"]["content"])
        return f"{answer.model!r} answered with finish_reason {choice['finish_reason']!r}: {text[:40]!r}"
    except (AttributeError, LookupError, TypeError) as error:
        raise Wrong(f"the answer is no chat completion: {str(answer)[:60]!r}") from error


async def token_ids(desk: Desk) -> str:
    prompt, (choice,) = await desk.read()
    again, (same,) = await desk.read()
    if prompt != again:
        raise Wrong("the prompt's token ids change from one call to the next with the same messages")
    for seed in range(2, 6):  # other turns, in which tokens that were seen must stand for the same text
        await desk.read(seed=seed)
    how = "decode to the text" if desk.tokenizer else "spell the text in their logprobs' own tokens"
    return f"{len(prompt)} of the prompt, {len(choice.token_ids)} and {len(same.token_ids)} sampled; they {how}"


async def logprobs(desk: Desk) -> str:
    _, (choice,) = await desk.read(seed=3)
    return f"one for each sampled token, from {min(choice.logprobs):.3f} to {max(choice.logprobs):.3f} nats"


async def usage(desk: Desk) -> str:
    answer = await desk.ask()
    counts = answer.get("usage")
    if not counts:
        raise Missing("no usage comes with an answer")
    prompt, completion = len(answer["prompt_token_ids"]), len(answer["choices"][0]["token_ids"])
    told = tuple(counts[f"{name}_tokens"] for name in ("prompt", "completion", "total"))
    if told != (prompt, completion, prompt + completion):
        raise Wrong(f"it counts {told[0]} + {told[1]} = {told[2]} tokens, and there are {prompt} + {completion}")
    return f"{prompt} + {completion} tokens, as there are"


async def seed(desk: Desk) -> str:
    drawn = [(await desk.read(seed=number))[1][0].token_ids for number in (5, 5, 6, 7, 8)]
    if drawn[0] != drawn[1]:
        raise Missing("the same seed gave two different turns")
    if len(set(drawn)) == 1:
        raise Missing("four seeds gave one and the same turn at temperature 1")
    return "the same seed gives the same turn, others give others"


async def max_tokens(desk: Desk) -> str:
    _, (choice,) = await desk.read(max_tokens=2)
    if len(choice.token_ids) > 2:
        raise Wrong(f"max_tokens=2 gave {len(choice.token_ids)} tokens")
    if len(choice.token_ids) == 2 and choice.finish_reason != "length":
        raise Missing(f"a turn that was cut has finish_reason {choice.finish_reason!r}")
    return f"max_tokens=2 gave {len(choice.token_ids)} tokens, finish_reason {choice.finish_reason!r}"


async def stop(desk: Desk) -> str:
    answer = await desk.ask(temperature=0)
    text = str(answer["choices"][0]["message"]["content"] or "")
    if len(text) < 3:
        raise Missing(f"the answer {text!r} is too short to try it")
    mark = text[len(text) // 2 : len(text) // 2 + 2]
    cut = str((await desk.ask(temperature=0, stop=[mark]))["choices"][0]["message"]["content"] or "")
    if mark in cut or not text.startswith(cut):
        raise Wrong(f"stop={[mark]} gave {cut[:60]!r}; without it the text is {text[:60]!r}")
    return f"{text[:30]!r} ends before {mark!r}"


async def several(desk: Desk) -> str:
    answer = await desk.ask(n=3)
    if len(answer["choices"]) != 3 or [choice["index"] for choice in answer["choices"]] != [0, 1, 2]:
        raise Wrong(f"n=3 gave {len(answer['choices'])} choices")
    examined = [desk.examined(choice) for choice in answer["choices"]]
    return f"3 choices, {len({choice.token_ids for choice in examined})} of them different"


async def gather_stream(desk: Desk, **body: Any) -> Choice:
    """A streamed choice, put together."""
    draft = Draft()
    prompt: Any = None
    async for chunk in await desk.create(stream=True, **body):
        piece: Read = chunk.model_dump()
        prompt = prompt or piece.get("prompt_token_ids")
        for choice in piece["choices"]:
            draft.add(choice)
    if not draft.finish_reason:
        raise Wrong("the stream ended before the answer did")
    checked_ids(prompt)
    return draft.whole()


async def streaming(desk: Desk) -> str:
    _, (whole,) = await desk.read()
    streamed = await gather_stream(desk)
    if streamed.token_ids == whole.token_ids and streamed.message["content"] != whole.message["content"]:
        raise Wrong(f"the deltas say {streamed.message['content']!r}, and the whole answer {whole.message['content']!r}")
    return f"{len(streamed.token_ids)} token ids and logprobs come with the deltas"


async def first_call(desk: Desk) -> tuple[tuple[int, ...], Choice]:
    """A prompt and the first answer to it with a call, made by itself or where one is forced. Raises Missing where there was
    none."""
    for number in range(2 * TRIES):
        if number == TRIES:
            desk.calling = FORCED
        prompt, (choice,) = await desk.read(seed=number, **desk.calling)
        if choice.message.get("tool_calls") and choice.finish_reason != "length":
            return prompt, choice
    raise Missing(f"none of {TRIES} answers had a call, nor a whole one of {TRIES} where it was forced")


async def tools(desk: Desk) -> str:
    _, choice = await first_call(desk)
    call: Read = choice.message["tool_calls"][0]
    arguments: Any = json.loads(call["function"]["arguments"])
    if not isinstance(arguments, dict) or not call["id"] or call["function"]["name"] not in WHAT:
        raise Wrong(f"the call is {call}")
    if choice.finish_reason != "tool_calls":
        raise Wrong(f"an answer with a call has finish_reason {choice.finish_reason!r}")
    return f"{call['function']['name']}({call['function']['arguments']})"


async def streamed_tools(desk: Desk) -> str:
    await first_call(desk)
    for number in range(TRIES):
        streamed = await gather_stream(desk, seed=number, **desk.calling)
        if streamed.message.get("tool_calls") and streamed.finish_reason != "length":
            call: Read = streamed.message["tool_calls"][0]["function"]
            json.loads(call["arguments"])
            return f"{call['name']}({call['arguments']}), put together from its deltas"
    raise Missing(f"none of {TRIES} streamed answers had a whole call, while one that was not streamed had")


async def parallel(desk: Desk) -> str:
    pairs = (("call00001", "add", '{"a": 1, "b": 2}'), ("call00002", "multiply", '{"a": 3, "b": 4}'))
    calls = [{"id": id, "type": "function", "function": {"name": name, "arguments": text}} for id, name, text in pairs]
    results = [
        {"role": "tool", "tool_call_id": id, "content": value} for (id, _, _), value in zip(pairs, ("3", "12"), strict=True)
    ]
    history = [QUESTION, {"role": "assistant", "content": None, "tool_calls": calls}, *results]
    prompt, _ = await desk.read(messages=history, tools=TOOLS)
    return f"two calls in one turn and their results are read, in {len(prompt)} tokens"


def next_messages(choice: Choice) -> list[Any]:
    """A conversation that goes on after an answer."""
    calls: Sequence[Mapping[str, Any]] = choice.message.get("tool_calls") or ()
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "117"} for call in calls]
    return [QUESTION, dict(choice.message), *(results or [{"role": "user", "content": "And then?"}])]


async def bridged(desk: Desk) -> str:
    prompt, (choice,) = await desk.read(tools=TOOLS, seed=4)
    longer, _ = await desk.read(messages=next_messages(choice), tools=TOOLS)
    before = (*prompt, *choice.token_ids)
    if longer[: len(before)] == before:
        return f"the next prompt begins with the {len(before)} tokens of the turn before, exactly as they were"
    if longer[: len(prompt)] != prompt:
        raise Missing("the next prompt begins otherwise than the one before: every turn becomes a trajectory of its own")
    thinks = "reasoning_content" in choice.message or "</think>" in choice.message["content"]  # which templates leave out
    if not thinks and not any(a == b for a, b in zip(choice.token_ids, longer[len(prompt) :], strict=False)):
        count = len(choice.token_ids)
        raise Wrong(
            f"none of the {count} sampled token ids stands in its place in the next prompt, which has the same text there"
        )
    place = next(at for at, (a, b) in enumerate(zip(longer, before, strict=False)) if a != b)
    raise Missing(
        f"the next prompt parts from what was sampled at token {place - len(prompt)} of the turn: it becomes a branch"
    )


async def pinned(desk: Desk) -> str:
    name = str((await desk.ask())["model"])
    again = str((await desk.ask(model=name))["model"])
    if again != name:
        raise Wrong(f"{name!r} was asked, and {again!r} answered")
    if not name.rpartition("@")[2].isdigit():
        raise Missing(f"{name!r} tells of no step: a new version in the middle of a rollout would go unnoticed")
    return f"{name} answers to its exact name"


async def recorded(desk: Desk) -> str:
    with record(desk.client) as recording:
        for number in range(TRIES):
            messages: list[Any] = [QUESTION]
            for _ in range(2):
                answer = await desk.client.chat.completions.create(
                    model=desk.model, messages=messages, tools=TOOLS, max_tokens=48, temperature=1.0, seed=number
                )
                if answer.choices[0].logprobs is not None:
                    raise Wrong("an agent that asks for no logprobs would see some")
                messages = next_messages(Choice(answer.choices[0].message.model_dump(exclude_none=True), "", (), ()))
    if recording.dropped:
        raise Wrong(f"dropped: {recording.dropped[0]}")
    spans: list[Span] = [span for one in recording.trajectories for span in one.spans if span.logprobs is not None]
    if len(spans) != 2 * TRIES:
        raise Wrong(f"{2 * TRIES} turns were sampled, and {len(spans)} recorded")
    return f"{TRIES} conversations of two turns are {len(recording.trajectories)} trajectories, every sampled token once"
