"""What `python -m art_mcp.openai_patch` finds out of a real vLLM, its CPU build in .peers/vllm, and whether that is true."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from openai import AsyncOpenAI

from art_mcp.local.models import load_tokenizer, model_source
from art_mcp.openai_patch import record
from art_mcp.openai_patch.check import examine
from art_mcp.sampling.tokenizer import BackendTokenizer
from art_mcp.sampling.vllm_args import Served, VllmSettings
from art_mcp.sampling.vllm_server import VllmServer

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".peers" / "vllm" / "bin" / "python"

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.peers,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON.exists(), reason="no vLLM in .peers/vllm: `make test-peers` puts it there"),
]

READS_CALLS = {"kv_cache_memory_bytes": 2**28, "enable_auto_tool_choice": True, "tool_call_parser": "hermes"}


@pytest.fixture(scope="module")
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="module")
async def client(anyio_backend) -> AsyncIterator[AsyncOpenAI]:
    server = VllmServer(VllmSettings(str(PYTHON), READS_CALLS))
    try:
        await server.start(Served("tiny", model_source("tiny"), "float32"))
        async with AsyncOpenAI(base_url=server.base_url, api_key=server.key) as client:
            yield client
    finally:
        await server.close()


@pytest.fixture(scope="module")
async def findings(client):
    tokenizer = BackendTokenizer(load_tokenizer(model_source("tiny")))
    return {finding.name: finding async for finding in examine(client, tokenizer=tokenizer)}


async def test_an_agent_on_vllm_can_be_trained_and_the_check_says_so(findings):
    assert [finding for finding in findings.values() if finding.stands_in_the_way] == []
    told = ("chat", "token ids", "logprobs", "usage", "seed", "max_tokens", "stop", "n > 1", "streaming", "recorded")
    assert {name: findings[name].verdict for name in told} == dict.fromkeys(told, "yes")


async def test_the_check_says_what_vllm_does_not_do(findings):
    assert findings["bridged"].verdict == "no"
    assert "it becomes a branch" in findings["bridged"].words
    assert findings["pinned"].verdict == "no"
    assert "'tiny' tells of no step" in findings["pinned"].words


async def test_what_is_recorded_on_vllm_is_what_it_says_to_whoever_asks_for_it(client):
    question = {"role": "user", "content": "What is the sum of 19 and 98?"}
    asked = {"model": "tiny", "max_tokens": 24, "seed": 3, "temperature": 1.0}
    plain = await client.chat.completions.create(messages=[question], **asked)
    with record(client) as recording:
        answer = await client.chat.completions.create(messages=[question], **asked)
        reply = {"role": "assistant", "content": answer.choices[0].message.content}
        more = [question, reply, {"role": "user", "content": "And then?"}]
        chunks = [chunk async for chunk in await client.chat.completions.create(messages=more, stream=True, **asked)]
    raw = await client.chat.completions.create(
        messages=[question], logprobs=True, extra_body={"return_token_ids": True}, **asked
    )
    first, second = recording.trajectories  # vLLM renders the history anew, without the special tokens that it left out
    assert recording.dropped == ()
    assert first.token_ids == (*raw.prompt_token_ids, *raw.choices[0].token_ids)
    assert answer.choices[0].logprobs is None
    assert answer.choices[0].message.content == plain.choices[0].message.content
    assert second.messages[-1]["content"] == "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert len(second.spans) == 2
