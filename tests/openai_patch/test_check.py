"""`python -m art_mcp.openai_patch`: what it says of our own endpoint, and of endpoints that lie or break."""

import json
import re
import subprocess
import sys
from itertools import count
from pathlib import Path

import anyio
import pytest
from openai import AsyncOpenAI
from starlette.responses import Response

from art_mcp.openai_patch.check import PROBES, examine
from art_mcp.openai_patch.desk import compare
from art_mcp.openai_patch.wire import Choice
from tests.agent.players import tokenizer
from tests.clocks import skip
from tests.openai_patch.agents import Between, forged

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).resolve().parents[2]
NAMES = [name for name, _, _ in PROBES]
NUMBERS = count(1)  # tiny@0 is there


async def findings_of(client, **options):
    return {finding.name: finding async for finding in examine(client, **{"seconds": 60.0, **options})}


def test_the_command_starts_the_tiny_policy_and_finds_all_that_is_needed():
    command = [sys.executable, "-m", "art_mcp.openai_patch"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    *lines, verdict = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert [re.split(r"\s{2,}", line)[:2] for line in lines] == [[name, "yes"] for name in NAMES]
    assert verdict == "an agent on this endpoint can be trained"


def test_the_command_says_that_nobody_answers():
    command = [sys.executable, "-m", "art_mcp.openai_patch", "--base-url", "http://127.0.0.1:9/v1", "--model", "x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert re.search(r"chat +fails +the connection fails", done.stdout)
    assert done.stdout.splitlines()[-1] == "not trainable through this endpoint: models, chat"
    assert done.stderr == ""


def shift_ids(body, asked):
    for choice in body["choices"]:
        choice["token_ids"] = [token + 1 for token in choice["token_ids"]]


def mix_ids(body, asked):
    for choice in body["choices"]:
        choice["token_ids"] = [token + asked.get("seed", 0) for token in choice["token_ids"]]


def lose_a_logprob(body, asked):
    body["choices"][0]["logprobs"]["content"].pop()


def raise_logprobs(body, asked):
    body["choices"][0]["logprobs"]["content"][0]["logprob"] = 0.5


def change_the_prompt(body, asked):
    body["prompt_token_ids"][0] = next(NUMBERS)


def know_no_token_ids(body, asked):
    del body["prompt_token_ids"]
    for choice in body["choices"]:
        del choice["token_ids"]


def know_no_logprobs(body, asked):
    for choice in body["choices"]:
        choice["logprobs"] = None


def say_something_else(body, asked):
    body["choices"][0]["message"]["content"] = "As an AI model, I could not say."


def miscount(body, asked):
    body["usage"]["completion_tokens"] += 1


def ignore_n(body, asked):
    del body["choices"][1:]


def break_arguments(body, asked):
    for call in body["choices"][0]["message"].get("tool_calls") or ():
        call["function"]["arguments"] = call["function"]["arguments"][:-1]


def count_up(body, asked):
    body["model"] = f"tiny@{next(NUMBERS)}"


LIES = [
    (shift_ids, "bridged", "fails", r"none of the \d+ sampled token ids stands in its place in the next prompt"),
    (mix_ids, "token ids", "fails", r"token id \d+ stands for '.*' and for '.*'"),
    (lose_a_logprob, "token ids", "fails", r"the endpoint returned 11 token ids with 10 logprobs"),
    (raise_logprobs, "logprobs", "fails", r"a logprob is 0\.5, more than 0"),
    (change_the_prompt, "token ids", "fails", "the prompt's token ids change from one call to the next"),
    (know_no_token_ids, "token ids", "no", "the endpoint returned no token ids"),
    (know_no_logprobs, "logprobs", "no", "the endpoint returned no logprobs"),
    (say_something_else, "token ids", "fails", "the tokens of the logprobs spell .*, and the message says 'As an AI"),
    (miscount, "usage", "fails", r"it counts 41 \+ 12 = 52 tokens, and there are 41 \+ 11"),
    (ignore_n, "n > 1", "fails", "n=3 gave 1 choices"),
    (break_arguments, "tools", "fails", "the answer is not whole JSON"),
    (count_up, "recorded", "no", r"404: .*tiny@\d+"),
]


@pytest.mark.parametrize(("lie", "name", "verdict", "words"), LIES, ids=[lie.__name__ for lie, *_ in LIES])
async def test_an_endpoint_that_lies_is_told_so_in_words(model, lie, name, verdict, words):
    async with Between(*model.backend.endpoint(model), forge=forged(lie)).client() as client:
        found = (await findings_of(client, only=[name]))[name]
    assert found.verdict == verdict
    assert re.search(words, found.words), found.words
    assert found.stands_in_the_way


async def test_with_the_models_tokenizer_ids_that_decode_to_another_text_are_found_out_at_once(model):
    async with Between(*model.backend.endpoint(model), forge=forged(shift_ids)).client() as client:
        found = (await findings_of(client, tokenizer=tokenizer(), only=["token ids"]))["token ids"]
    assert found.verdict == "fails"
    assert re.search("the token ids decode to .*, and the message says", found.words)


async def hang(asked, answer):
    skip(60)
    await anyio.sleep_forever()


BREAKS = [
    (lambda asked, answer: Response("out of memory", 500), r"the endpoint answers 500: .*out of memory"),
    (lambda asked, answer: Response(bytes(answer.body)[:40], media_type="application/json"), "the answer is not whole JSON"),
    (lambda asked, answer: Response("<html>", media_type="text/html"), "the answer is no chat completion: '<html>'"),
    (lambda asked, answer: Response("{}", media_type="application/json"), "the answer is no chat completion"),
    (lambda asked, answer: Response('{"detail": "no"}', 401), r"the endpoint answers 401"),
    (hang, "no answer within 60 s"),
]


@pytest.mark.parametrize(("forge", "words"), BREAKS, ids=["500", "half", "html", "empty", "401", "hang"])
async def test_an_endpoint_that_breaks_is_told_so_in_words_and_not_asked_further(model, forge, words):
    async with Between(*model.backend.endpoint(model), forge=forge).client() as client:
        found = await findings_of(client)
    assert list(found) == ["models", "chat"]
    assert found["models"].verdict == "yes"
    assert found["chat"].stands_in_the_way
    assert re.search(words, found["chat"].words), found["chat"].words


def cut(asked, answer):
    """Streams end in the middle."""
    if not asked.get("stream"):
        return answer
    return Response(bytes(answer.body)[: len(answer.body) // 2], media_type="text/event-stream")


def complain(asked, answer):
    """Streams break off with an error."""
    if not asked.get("stream"):
        return answer
    error = json.dumps({"error": {"message": "the engine died"}})
    return Response(f"data: {error}\n\n", media_type="text/event-stream")


@pytest.mark.parametrize(
    ("forge", "words"), [(cut, "the stream ended before the answer did"), (complain, "breaks off: the engine died")]
)
async def test_a_stream_that_breaks_off_is_told_so_in_words(model, forge, words):
    async with Between(*model.backend.endpoint(model), forge=forge).client() as client:
        found = await findings_of(client, only=["streaming"])
    assert found["chat"].verdict == "yes"
    assert found["streaming"].verdict == "fails"
    assert re.search(words, found["streaming"].words), found["streaming"].words


async def test_an_endpoint_that_renders_every_turn_anew_can_be_trained_through_and_says_so(model):
    def forget(body, asked):
        if len(asked["messages"]) > 1:
            body["prompt_token_ids"] = [7, *body["prompt_token_ids"]]
            body["usage"]["prompt_tokens"] += 1
            body["usage"]["total_tokens"] += 1

    async with Between(*model.backend.endpoint(model), forge=forged(forget)).client() as client:
        found = await findings_of(client, only=["bridged", "recorded"])
    assert found["bridged"].verdict == "no"
    assert not any(finding.stands_in_the_way for finding in found.values())
    assert "8 conversations of two turns are 16 trajectories" in found["recorded"].words


async def test_a_model_that_is_not_there_is_told_with_those_that_are(model):
    base_url, key = model.backend.endpoint(model)
    async with AsyncOpenAI(base_url=base_url, api_key=key) as client:
        found = await findings_of(client, model="other", only=["chat"])
    assert found["models"].words.startswith("'other' is not listed; there is tiny")
    assert "404" in found["chat"].words


def test_a_thought_without_words_that_the_message_leaves_out_is_no_lie():
    tokens = ["<think>", "\n\n", "</think>", "\n\n", "A heron."]
    compare(tokens, Choice({"role": "assistant", "content": "A heron."}, "stop", (1, 2, 3, 2, 4), (0.0,) * 5), "they say")
