"""Whatever a client with the token sends: an answer or a refusal in OpenAI's shape, never a 500."""

import asyncio
import json
import re
import sys

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from art_mcp.serve.app import Desk
from art_mcp.serve.asked import NEUTRAL
from tests.agent.players import calls
from tests.serve.guests import LOOK, USER, Told, opened, voice_of

KNOWN = ["model", "messages", "tools", "tool_choice", "stream", "stream_options", "n", "stop", "max_tokens", "temperature"]
KNOWN += ["seed", "logprobs", "return_token_ids", "metadata", *NEUTRAL]

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=6
)
names = st.sampled_from(["add", "x", ""]) | st.text(max_size=4)
arguments = anything.map(json.dumps) | st.text(max_size=6)
called = st.fixed_dictionaries(
    {"id": names, "type": st.just("function"), "function": st.fixed_dictionaries({"name": names, "arguments": arguments})}
)
contents = (
    st.none() | st.text(max_size=12) | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=4)}))
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]), "content": contents},
    optional={"tool_calls": st.lists(called, max_size=2), "tool_call_id": names, "name": names, "refusal": st.none()},
)
KEYWORDS = ["type", "properties", "required", "$ref", "anyOf"]
parameters = st.none() | st.dictionaries(st.sampled_from(KEYWORDS), anything, max_size=3)
described = st.fixed_dictionaries({"name": names}, optional={"parameters": parameters, "description": st.text(max_size=5)})
tools = st.fixed_dictionaries({"type": st.just("function"), "function": described})
likely = st.fixed_dictionaries(
    {"model": st.just("told"), "messages": st.lists(messages, min_size=1, max_size=4)},
    optional={
        "tools": st.none() | st.lists(tools, max_size=2) | st.just([LOOK]),
        "n": st.integers(1, 3),
        "stream": st.booleans(),
        "stop": st.text(min_size=1, max_size=3) | st.lists(st.text(min_size=1, max_size=3), max_size=2),
        "logprobs": st.booleans(),
        "return_token_ids": st.booleans(),
        "tool_choice": st.sampled_from(["auto", "none"]),
        "temperature": st.floats(0, 2),
        "max_tokens": st.integers(1, 40),
    },
)
fields = {name: anything for name in KNOWN if name not in ("model", "messages")}
basic = {"model": st.just("told"), "messages": st.just([USER])}
odd = st.fixed_dictionaries(basic, optional=fields) | st.dictionaries(st.sampled_from(KNOWN), anything, max_size=4)

TURNS = ["It is 5.", calls(("add", {"a": 2, "b": 3})), calls(("add", {"a": 2})), "<tool_call>{", "", "é\n\u4f60 "]


async def post(body: bytes) -> httpx2.Response:
    """The answer of the app itself: a bug raises here."""
    told = Told(TURNS)
    told.asked += [((), None)] * (len(body) % len(TURNS))
    app = Desk({"told": voice_of(told)}).app(token="right", hosts=["box"])
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://box") as client:
        return await client.post("/v1/chat/completions", content=body, headers={"Authorization": "Bearer right"})


def check(body: bytes) -> None:
    answer = asyncio.run(post(body))
    if answer.status_code == 200:
        if answer.headers["content-type"].startswith("text/event-stream"):
            assert answer.text.endswith("data: [DONE]\n\n")
        else:
            assert answer.json()["choices"]
    else:
        assert 400 <= answer.status_code < 500, answer.text
        assert answer.json()["error"]["message"]


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(likely)
def test_requests_that_are_nearly_right_are_answered_or_refused(body):
    check(json.dumps(body).encode())


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(odd)
def test_requests_with_odd_fields_are_answered_or_refused(body):
    check(json.dumps(body).encode())


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_bytes_are_refused(body):
    check(body)


@pytest.mark.slow
@pytest.mark.anyio
async def test_schemathesis_finds_no_500_by_what_the_endpoint_says_of_itself(tmp_path):
    """Its own requests, good and bad ones, against the routes of /openapi.json."""
    told = Told(TURNS)
    async with opened(voice_of(told)) as (_, endpoint):
        root = endpoint.base_url.removesuffix("/v1")
        words = f"run {root}/openapi.json --checks not_a_server_error --max-examples 100 --phases coverage,fuzzing"
        command = [*words.split(), "--header", f"Authorization: Bearer {endpoint.token}", "--no-color", "--seed", "1"]
        program = "import sys; from schemathesis.cli import schemathesis; sys.exit(schemathesis())"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", program, *command),
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        printed, _ = await process.communicate()
    text = printed.decode()
    assert process.returncode == 0, text
    assert re.search(r"Tested: +3", text), text
    assert len(told.asked) > 50  # so many requests came as far as the policy
