"""A real vLLM, its CPU build in .peers/vllm, as the engine of LocalBackend: the tiny policy is served, trained, published."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import anyio
import psutil
import pytest
import torch

from art_mcp import LocalBackend, TrainableModel, TrainConfig
from art_mcp.agent.group import gather_trajectory_groups
from art_mcp.environment import load_environment
from art_mcp.errors import ConfigError, EngineError
from art_mcp.sampling.vllm_messages import COMPLETIONS, TOKENS
from art_mcp.tools import open_tools
from art_mcp.types import LoraSpec, ModelSpec, Sample, SamplingParams
from tests.processes import remaining

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".peers" / "vllm" / "bin" / "python"

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.peers,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON.exists(), reason="no vLLM in .peers/vllm: `make test-peers` puts it there"),
]

PROMPT = tuple(range(1, 60))
BOUND = 1e-4
"""Nats between vLLM and torch, both in float32."""
SMALL = {"kv_cache_memory_bytes": 2**28}
LONG = SamplingParams(max_tokens=1900, temperature=1.0, seed=1)


@pytest.fixture(scope="module")
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="module")
async def model(anyio_backend) -> AsyncIterator[TrainableModel]:
    async with LocalBackend(engine_python=str(PYTHON), engine_args=SMALL, threads=1) as backend:
        model = TrainableModel(name="policy", lora=LoraSpec(rank=16))
        await model.register(backend)
        yield model


async def until(happened, *, seconds=60):
    """Returns when `happened()` is true."""
    with anyio.fail_after(seconds):
        while True:
            if happened():
                return
            await anyio.sleep(0.01)


def sample_of(span) -> Sample:
    ids = (*PROMPT, *span.token_ids)
    on = (False,) * len(PROMPT) + (True,) * len(span.token_ids)
    return Sample(ids, on, (0.0,) * len(PROMPT) + span.logprobs, 1.0)


def difference(worker, span, *, temperature=1.0) -> float:
    """Between the logprobs that came with `span` and those of the learner's own forward pass."""
    with torch.no_grad():
        scores = worker.learner.trainer.score([sample_of(span)], prefix=0, temperature=temperature)
    return float((scores.log_probs - torch.tensor(span.logprobs)).abs().max())


def mean_difference(worker, span) -> float:
    with torch.no_grad():
        scores = worker.learner.trainer.score([sample_of(span)], prefix=0, temperature=1.0)
    return float((scores.log_probs - torch.tensor(span.logprobs)).abs().mean())


async def draw(worker, *, temperature=1.0, seed=0, tokens=24, stop=frozenset()):
    return await worker.sample(PROMPT, params=SamplingParams(tokens, temperature, seed), stop=frozenset(stop))


def held_answers(worker, monkeypatch, *, of: int) -> asyncio.Event:
    """Until the event is set, requests for `of` tokens stay in flight however quick the server is."""
    ask, free = worker.engine.server.ask, asyncio.Event()

    async def held(path, asked):
        answer = await ask(path, asked)
        if of in (asked.get("max_tokens"), asked.get("sampling_params", {}).get("max_tokens")):
            await free.wait()
        return answer

    monkeypatch.setattr(worker.engine.server, "ask", held)
    return free


async def known(worker) -> set[str]:
    """The names under which the server samples."""
    _, answer = await worker.engine.server.connections.get("/v1/models")
    return {card["id"] for card in json.loads(answer)["data"]}


async def chances(worker, span) -> list[float]:
    """What the server itself says of the tokens of `span` under its current policy."""
    asked = {"model": str(worker.policy), "prompt": [*PROMPT, *span.token_ids], "max_tokens": 1, "prompt_logprobs": 0}
    status, answer = await worker.engine.server.ask("/v1/completions", asked)
    assert status == 200, answer
    rows = json.loads(answer)["choices"][0]["prompt_logprobs"][len(PROMPT) :]
    return [row[str(token)]["logprob"] for row, token in zip(rows, span.token_ids, strict=True)]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
async def test_logprobs_are_the_trainers_own(model, temperature):
    worker = model.sampler()
    turns = await asyncio.gather(*(draw(worker, temperature=temperature, seed=seed) for seed in range(16)))
    assert {turn.span.policy_version for turn in turns} == {worker.step}
    assert max(difference(worker, turn.span, temperature=temperature or 1.0) for turn in turns) < BOUND
    if temperature:
        assert len({turn.span.token_ids for turn in turns}) > 1


async def test_it_samples_what_the_transformers_engine_samples(model):
    worker = model.sampler()
    ours = worker.learner.engine
    here = await ours.sample(PROMPT, params=SamplingParams(24, 0.0), stop=frozenset())
    there = await draw(worker, temperature=0.0)
    assert there.span.token_ids == here.span.token_ids
    assert there.span.logprobs == pytest.approx(here.span.logprobs, abs=BOUND)
    assert worker.context_length == ours.context_length


async def test_a_stop_token_ends_the_turn_and_belongs_to_it(model):
    worker = model.sampler()
    free = await draw(worker, temperature=0.0)
    stop = free.span.token_ids[4]
    cut = await draw(worker, temperature=0.0, stop={stop})
    length = free.span.token_ids.index(stop) + 1
    assert cut.stopped
    assert not free.stopped
    assert cut.span.token_ids == free.span.token_ids[:length]
    assert cut.span.logprobs == pytest.approx(free.span.logprobs[:length], abs=BOUND)


async def test_both_doors_give_the_same_tokens_and_logprobs(model):
    """The one that the engine goes through is the leaner; stop tokens belong to the turn behind each."""
    worker = model.sampler()
    assert worker.facts["engine_door"] == TOKENS.path
    stop = frozenset((await draw(worker, temperature=0.0)).span.token_ids[6:7])
    cases = [(SamplingParams(24, temperature, seed), stop) for temperature in (0.0, 0.7, 1.0) for seed in range(4)]
    found = []
    for params, ends in cases:
        turns = []
        for door in (TOKENS, COMPLETIONS):
            asked = door.ask(str(worker.policy), PROMPT, params=params, stop=ends, step=worker.step)
            status, answer = await worker.engine.server.ask(door.path, asked)
            assert status == 200, answer
            turns.append(door.read(json.loads(answer), worker.step))
        assert turns[0].span.token_ids == turns[1].span.token_ids
        assert turns[0].span.logprobs == pytest.approx(turns[1].span.logprobs, abs=BOUND)
        assert turns[0].stopped == turns[1].stopped == (turns[0].span.token_ids[-1] in ends)
        found.append(turns[0].stopped)
    assert any(found)


async def test_a_prompt_that_leaves_no_room_or_has_foreign_tokens_is_refused_in_words(model):
    worker = model.sampler()
    with pytest.raises(EngineError, match="a prompt of 2048 tokens does not fit a context of 2048 tokens"):
        await worker.sample([1] * 2048, params=LONG, stop=frozenset())
    with pytest.raises(EngineError, match="out of vocabulary"):
        await worker.sample([100_000], params=LONG, stop=frozenset())
    assert (await draw(worker)).span.token_ids


async def test_hundreds_of_turns_may_be_in_flight(model):
    worker = model.sampler()
    prompts = [(*range(1, 100 + number % 50), number) for number in range(300)]
    turns = await asyncio.gather(
        *(worker.sample(prompt, params=SamplingParams(8, 1.0, seed), stop=frozenset()) for seed, prompt in enumerate(prompts))
    )
    assert {len(turn.span.token_ids) for turn in turns} == {8}


async def test_a_training_step_raises_the_chance_of_what_it_rewards(model):
    worker = model.sampler()
    good = await draw(worker, seed=1)
    step, before = worker.step, await chances(worker, good.span)
    assert before == pytest.approx(good.span.logprobs, abs=1e-3)
    metrics = await worker.train([sample_of(good.span)], TrainConfig(learning_rate=1e-3, warmup_steps=0))
    assert metrics["seconds_publish"] > 0
    assert await model.get_step() == worker.policy.step == step + 1
    after = await chances(worker, good.span)
    assert sum(after) > sum(before) + 0.1
    new = await draw(worker, seed=1)
    assert new.span.policy_version == step + 1
    assert difference(worker, new.span) < BOUND


async def test_a_request_ends_under_the_version_under_which_it_began(model, monkeypatch):
    worker = model.sampler()
    old, old_folder = worker.policy, worker.engine.version.folder
    published = held_answers(worker, monkeypatch, of=LONG.max_tokens)
    begun = asyncio.create_task(worker.sample(PROMPT, params=LONG, stop=frozenset()))
    await until(lambda: worker.engine.version.requests)
    with torch.no_grad():
        for name, parameter in worker.learner.trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05)
    await worker.imitate([sample_of((await draw(worker)).span)], TrainConfig(learning_rate=1e-5))
    new = worker.policy
    await worker.ready()
    assert not begun.done()
    assert {str(old), str(new)} <= await known(worker)
    assert (await draw(worker)).span.policy_version == new.step == old.step + 1
    assert difference(worker, (await draw(worker)).span) < BOUND
    published.set()
    turn = await begun
    assert turn.span.policy_version == old.step
    assert len(turn.span.token_ids) == LONG.max_tokens
    assert str(old) not in await known(worker)
    assert not old_folder.exists()
    assert worker.engine.version.folder.exists()


async def test_an_engine_that_is_killed_fails_the_rollouts_in_flight_and_the_next_ones_run(model, monkeypatch):
    monkeypatch.chdir(ROOT)
    worker = model.sampler()
    environment = load_environment("calculator")
    policy, scenarios = worker.policy, environment.split("test")[:8]
    before = await draw(worker, temperature=0.0)
    async with open_tools(environment.servers, config="config.json", only=environment.tools) as toolbox:

        async def play():
            return await gather_trajectory_groups(
                scenarios, model=model, environment=environment, toolbox=toolbox, rollouts=2, concurrency=8
            )

        (core,) = [process for process in family(worker) if process.name().startswith("VLLM::Engine")]
        core.suspend()  # so that it answers nothing before it dies, however quick it is
        first = asyncio.create_task(play())
        await until(lambda: worker.engine.version.requests)
        core.send_signal(signal.SIGKILL)
        groups = await first
        failures = [failure for group in groups for failure in group.failures]
        assert failures
        assert {failure.kind for failure in failures} == {"EngineError"}
        assert "vLLM" in failures[0].message
        await model.backend.ready(model)
        assert [failure for group in await play() for failure in group.failures] == []
    assert worker.policy == policy
    after = await draw(worker, temperature=0.0)
    assert after.span.token_ids == before.span.token_ids
    assert difference(worker, after.span) < BOUND


def family(worker) -> list[psutil.Process]:
    launcher = psutil.Process(worker.engine.server._process.pid)
    return [launcher, *launcher.children(recursive=True)]


async def test_an_argument_that_vllm_does_not_know_is_named_with_the_closest():
    async with LocalBackend(engine_python=str(PYTHON), engine_args={"max_num_sqs": 8}) as backend:
        with pytest.raises(ConfigError, match="no engine argument 'max_num_sqs'; did you mean max_num_seqs"):
            await TrainableModel(name="policy", lora=LoraSpec(rank=8)).register(backend)


async def test_full_weights_are_served_after_a_step():
    async with LocalBackend(engine_python=str(PYTHON), engine_args=SMALL, threads=1) as backend:
        model = TrainableModel(name="policy")
        await model.register(backend)
        worker = model.sampler()
        turn = await draw(worker)
        await worker.train([sample_of(turn.span)], TrainConfig(learning_rate=1e-3, warmup_steps=0))
        moved = await draw(worker)
        assert moved.span.policy_version == 1
        assert difference(worker, moved.span) < BOUND
        assert difference(worker, turn.span) > 100 * BOUND  # it was a step that can be seen


async def test_full_weights_in_bfloat16_are_sampled_as_they_are_trained():
    """Each rounds in an order of its own, so they differ, but after steps through float32 masters no more than before."""
    async with LocalBackend(engine_python=str(PYTHON), engine_args=SMALL, threads=1) as backend:
        model = TrainableModel(name="policy", spec=ModelSpec(dtype="bfloat16"))
        await model.register(backend)
        worker = model.sampler()
        assert "bfloat16" in worker.engine.server.command
        step, found, turns = TrainConfig(learning_rate=1e-4, warmup_steps=0), [], []
        for steps in (0, 4):
            lessons = [replace(sample_of(turn.span), logprobs=None) for turn in turns]
            for _ in range(steps):
                await backend.imitate(model, lessons, config=step)
            turns = await asyncio.gather(*(draw(worker, seed=seed, tokens=64) for seed in range(32)))
            assert {turn.span.policy_version for turn in turns} == {steps}
            deltas = [mean_difference(worker, turn.span) for turn in turns]
            found.append(sum(deltas) / len(deltas))
        assert max(found) < 2e-2  # of tokens after a prompt without a sense; 0.008 to 0.009 were measured
        assert found[1] < 1.5 * found[0] + 1e-3


async def test_two_servers_are_one_engine_and_each_is_started_anew_alone():
    async with LocalBackend(engine_python=str(PYTHON), engine_args=SMALL, engine_replicas=2, threads=1) as backend:
        model = TrainableModel(name="policy", lora=LoraSpec(rank=8))
        await model.register(backend)
        worker = model.sampler()
        engines = worker.engine.engines
        turns = await asyncio.gather(*(draw(worker, seed=seed) for seed in range(6)))
        assert max(difference(worker, turn.span) for turn in turns) < BOUND
        step = TrainConfig(learning_rate=1e-3, warmup_steps=0)
        await worker.train([sample_of(turns[0].span)], step)
        launcher = psutil.Process(engines[0].server._process.pid)
        (core,) = [one for one in launcher.children(recursive=True) if one.name().startswith("VLLM::Engine")]
        core.suspend()
        begun = [asyncio.create_task(worker.sample(PROMPT, params=LONG, stop=frozenset())) for _ in range(2)]
        await until(lambda: all(engine.version.requests for engine in engines))
        core.send_signal(signal.SIGKILL)
        outcomes = await asyncio.gather(*begun, return_exceptions=True)
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Completion", "EngineError"]
        moved = await draw(worker, seed=1)
        assert moved.span.policy_version == 1
        await model.ready()
        await until(lambda: all(engine.available for engine in engines), seconds=300)  # one is started anew
        turns = await asyncio.gather(*(draw(worker, seed=seed) for seed in range(6)))
        assert {turn.span.policy_version for turn in turns} == {1}
        assert max(difference(worker, turn.span) for turn in turns) < BOUND


def names(processes: list[psutil.Process]) -> Iterator[str]:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            yield process.name()


PARENT = """
import anyio, sys
from art_mcp import LocalBackend, TrainableModel
from art_mcp.types import LoraSpec

async def main():
    async with LocalBackend(engine_python=sys.argv[1]) as backend:
        await TrainableModel(name="policy", lora=LoraSpec(rank=8)).register(backend)
        await anyio.sleep_forever()

anyio.run(main)
"""


def test_a_parent_that_is_killed_leaves_no_process():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", PARENT, str(PYTHON)], env=environment, stderr=subprocess.DEVNULL) as parent:
        processes: list[psutil.Process] = []
        while not any("VLLM::Engine" in name for name in names(processes)):
            with suppress(subprocess.TimeoutExpired):
                pytest.fail(f"the parent ended by itself: {parent.wait(0.2)}")
            processes = psutil.Process(parent.pid).children(recursive=True)
        parent.send_signal(signal.SIGKILL)
    assert len(processes) >= 4  # the launcher, its guard, the server, its engine
    assert remaining(processes) == []
