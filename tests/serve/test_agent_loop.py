"""An agent of somebody else's, on the openai package and an MCP client, plays what our own runner plays: token for token."""

import sys
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path

import anyio
import pytest
import torch
from anyio.from_thread import start_blocking_portal
from mcp import Client, StdioServerParameters
from openai import AsyncOpenAI, NotFoundError

from art_mcp.agent.rollout import rollout
from art_mcp.core.samples import spread
from art_mcp.core.seeds import seed_of
from art_mcp.environment import load_environment
from art_mcp.errors import ConfigError
from art_mcp.local.backend import LocalBackend
from art_mcp.model import TrainableModel
from art_mcp.openai_patch import record
from art_mcp.serve.listen import Endpoint
from art_mcp.serve.turn import Voice
from art_mcp.tools import open_tools
from art_mcp.types import Malformed, MalformedKind, ModelSpec, Sample, ToolCall, TrainConfig
from tests.serve.guests import agent, opened

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "servers" / "calculator" / "server.py"
ENVIRONMENT = load_environment(str(ROOT / "environments" / "calculator.py"))


@pytest.fixture(scope="module")
def model():
    backend = LocalBackend(in_process=True, deterministic=True, threads=1)
    made = TrainableModel(name="tiny")
    threads = torch.get_num_threads()
    anyio.run(made.register, backend)
    yield made
    anyio.run(backend.close)
    torch.set_num_threads(threads)


def ours(trajectory):
    """What each turn of our runner was asked and answered."""
    turns, before = [], []
    for span in trajectory.spans:
        if span.logprobs is not None:
            turns.append((tuple(before), span.token_ids, span.logprobs))
        before += span.token_ids
    return turns


def uses_in(trajectory):
    return [
        (replace(use.call, id="") if isinstance(use.call, ToolCall) else use.call, use.result.text) for use in trajectory.uses
    ]


def opening(scenario):
    system = [{"role": "system", "content": ENVIRONMENT.system}] if ENVIRONMENT.system else []
    return [*system, {"role": "user", "content": scenario.prompt}]


@pytest.mark.parametrize(("temperature", "mends"), [(1.0, False), (2.0, True)])
async def test_an_agent_loop_written_the_usual_way_plays_as_our_own_runner_does(model, temperature, mends):
    """On the same seeds. At temperature 2 many calls cannot be made; a loop that answers them in our words goes on as ours
    does. What is recorded of it counts the same."""
    scenarios = ENVIRONMENT.split("train")[:8]
    limits = replace(ENVIRONMENT.limits, calls=1000, tokens=model.sampler().context_length)
    server = StdioServerParameters(command=sys.executable, args=[str(SERVER)])
    longest, kinds = 0, set()
    async with (
        opened(Voice(model.sampler(), model.dialect())) as (client, _),
        open_tools([f"{SERVER}:server"], only=ENVIRONMENT.tools) as toolbox,
        Client(server) as session,
    ):
        listed = (await session.list_tools()).tools
        tools = [
            {"type": "function", "function": {"name": t.name, "description": t.description, "parameters": t.input_schema}}
            for t in listed
            if t.name in {tool.name for tool in toolbox.tools}
        ]
        for number, scenario in enumerate(scenarios):
            own = await rollout(
                scenario,
                sampler=model.sampler(),
                dialect=model.dialect(),
                toolbox=toolbox,
                system=ENVIRONMENT.system,
                limits=limits,
                temperature=temperature,
                key=(3, 0),
                number=number,
            )
            with record(client, scenario) as recording:
                calls = await agent(
                    client,
                    session,
                    model="tiny",
                    messages=opening(scenario),
                    tools=tools,
                    seeds=[seed_of(3, 0, scenario.id, number, turn) for turn in range(limits.turns)],
                    limit=limits.turn_tokens,
                    temperature=temperature,
                    mends=mends,
                )
            kinds |= {use.call.kind for use in own.uses if isinstance(use.call, Malformed)}
            assert spread(recording.trajectory.spans) == spread(own.spans)
            assert uses_in(recording.trajectory) == uses_in(own)
            assert [(call.prompt, call.turn, call.logprobs) for call in calls] == ours(own)
            assert [call.bridged for call in calls] == [False] + [True] * (len(calls) - 1)
            longest = max(longest, len(calls))
    assert longest >= 3
    assert kinds == ({MalformedKind.INVALID_JSON, MalformedKind.SCHEMA} if mends else set())


def test_each_event_loop_gets_an_endpoint_of_its_own_and_without_one_there_is_none(model):
    async def ask():
        async with model.openai_client() as client:
            return [entry.id async for entry in client.models.list()]

    assert anyio.run(ask) == anyio.run(ask) == ["tiny", "tiny@0"]
    with pytest.raises(ConfigError, match="inside a running event loop"):
        model.openai_client()


async def test_the_endpoints_of_event_loops_in_several_threads_serve_side_by_side_and_end_with_their_backend():
    model = TrainableModel(name="tiny")
    async with LocalBackend(in_process=True, threads=1) as backend:
        await model.register(backend)
        first, token = backend.endpoint(model)
        with start_blocking_portal() as portal:
            second, _ = portal.call(backend.endpoint, model)
            assert second != first
            assert (backend.endpoint(model)[0], portal.call(backend.endpoint, model)[0]) == (first, second)
            async with AsyncOpenAI(base_url=first, api_key=token) as client:
                assert (await client.models.list()).data
            await backend.close()
            for base_url in (first, second):
                with pytest.raises(OSError, match="attempts failed"):
                    await anyio.connect_tcp("127.0.0.1", int(base_url.split(":")[2].split("/")[0]))


async def test_event_loops_that_ask_for_an_endpoint_at_once_each_get_one_that_ends_with_the_backend(monkeypatch):
    model = TrainableModel(name="tiny")
    async with LocalBackend(in_process=True, threads=1) as backend:
        await model.register(backend)
        backend.endpoint(model)
        with start_blocking_portal() as one, start_blocking_portal() as other:
            over, first, asked = Endpoint.over.fget, [True], []

            def slow(endpoint):
                """Another thread asks meanwhile; it may have to wait for us."""
                if first and first.pop():
                    asked.append(other.start_task_soon(backend.endpoint, model))
                    wait(asked, timeout=0.5)
                return over(endpoint)

            monkeypatch.setattr(Endpoint, "over", property(slow))
            urls = {one.call(backend.endpoint, model)[0], asked[0].result()[0]}
            assert {endpoint.base_url for endpoint in backend._endpoints} > urls
            await backend.close()


async def test_a_client_of_the_model_itself_follows_its_training_and_ends_with_its_backend():
    model = TrainableModel(name="tiny", spec=ModelSpec("tiny"))
    async with LocalBackend(in_process=True, threads=1) as backend:
        await model.register(backend)
        assert backend.endpoint(model) == backend.endpoint(model)
        client = model.openai_client()
        first = model.get_inference_name()
        assert first == "tiny@0"
        question = [{"role": "user", "content": "Hello?"}]
        said = await client.chat.completions.create(
            model=first, messages=question, max_tokens=8, extra_body={"return_token_ids": True}
        )
        assert said.model == first
        sampled = [*said.prompt_token_ids, *said.choices[0].token_ids]
        await backend.imitate(model, [Sample((1, 2, 3), (False, True, True), None, 1.0)], config=TrainConfig())
        with pytest.raises(NotFoundError, match="'tiny@0' is no longer served: the current one is 'tiny@1'"):
            await client.chat.completions.create(model=first, messages=question)
        longer = [*question, said.choices[0].message, {"role": "user", "content": "And?"}]
        again = await client.chat.completions.create(
            model="tiny", messages=longer, max_tokens=8, extra_body={"return_token_ids": True}
        )
        assert again.model == "tiny@1"
        assert again.art_mcp == {"bridged": True, "policy": "tiny@1"}
        assert again.prompt_token_ids[: len(sampled)] == sampled
        assert [entry.id async for entry in client.models.list()] == ["tiny", "tiny@1"]
        base_url, _ = backend.endpoint(model)
    port = int(base_url.split(":")[2].split("/")[0])
    with pytest.raises(OSError, match="attempts failed"):
        await anyio.connect_tcp("127.0.0.1", port)
    await client.close()
