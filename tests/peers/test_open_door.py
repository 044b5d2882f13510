"""What `python -m art_mcp.openai_patch` finds out of a real vLLM, its CPU build in .peers/vllm, and whether that is true."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from openai import AsyncOpenAI

from art_mcp.local.models import load_tokenizer, model_source
from art_mcp.openai_patch import record
from art_mcp.openai_patch.check import PROBES, examine
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
