"""A worker in this process, and the backend that makes it: sampling and training on the same weights."""

import threading

import anyio
import pytest
import torch
from toys import draw_tokens, log_probs_of, save_toy

from art_mcp.errors import ConfigError, ModelError, TrainError
from art_mcp.local.backend import LocalBackend
from art_mcp.local.worker import WORKSPACE, Settings, Worker, demand_determinism, open_trainer
from art_mcp.model import TrainableModel
from art_mcp.types import (
    LoraSpec,
    ModelSpec,
    Sample,
    SamplingParams,
    Span,
    StopReason,
    TrainConfig,
    Trajectory,
    TrajectoryGroup,
)

pytestmark = pytest.mark.anyio

PROMPT = draw_tokens(12, seed="prompt")
CONFIG = TrainConfig(learning_rate=1e-3)


@pytest.fixture
def toy(tmp_path):
    return save_toy(tmp_path / "toy")


def open_worker(source, **options):
    return Worker("toy", ModelSpec(source=str(source), **options), Settings(deterministic=True))


async def play(worker, number):
    return (await worker.sample(PROMPT, params=SamplingParams(10, 1.0, number), stop=frozenset(), shared=8)).span


async def rollouts(worker, *, rewards):
    spans = [await play(worker, number) for number in range(len(rewards))]
    known = (False,) * len(PROMPT)
    return [
        Sample((*PROMPT, *s.token_ids), known + (True,) * 10, (0.0,) * len(PROMPT) + s.logprobs, reward)
        for s, reward in zip(spans, rewards, strict=True)
    ]


def state_of(worker):
    weights = [weight.detach().clone() for weight in (*worker.trainer.model.parameters(), *worker.trainer.masters.moved)]
    return weights + [value.clone() for entry in worker.trainer.optimizer.state.values() for value in entry.values()]


def same(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


async def test_a_step_moves_the_weights_and_the_next_turn_is_the_new_policys(toy):
    worker = open_worker(toy)
    before = await play(worker, 1)
    metrics = await worker.train(await rollouts(worker, rewards=[1.0, -1.0]), CONFIG)
    after = await play(worker, 1)
    assert (worker.step, worker.policy.step, str(worker.policy)) == (1, 1, "toy@1")
    assert (before.policy_version, after.policy_version) == (0, 1)
    assert before.logprobs != after.logprobs
    assert metrics["mismatch_max"] < 1e-4
    wanted = log_probs_of(worker.trainer.model, [*PROMPT, *after.token_ids])[-10:]
    torch.testing.assert_close(torch.tensor(after.logprobs).double(), wanted, rtol=0, atol=1e-4)
    await worker.close()


async def test_a_batch_of_ties_advances_the_step_and_nothing_else(toy):
    worker = open_worker(toy)
    await worker.train(await rollouts(worker, rewards=[1.0, -1.0]), CONFIG)
    before = state_of(worker)
    metrics = await worker.train(await rollouts(worker, rewards=[0.0, 0.0, 0.0]), CONFIG)
    assert metrics["samples_with_signal"] == 0
    assert same(state_of(worker), before)
    assert worker.policy.step == 2
    assert (await play(worker, 0)).policy_version == 2
    await worker.close()


async def test_a_step_that_fails_does_not_count_and_sampling_goes_on(toy):
    worker = open_worker(toy)
    samples = await rollouts(worker, rewards=[float("inf"), -1.0])
    before, span = state_of(worker), await play(worker, 5)
    with pytest.raises(TrainError, match="not finite"):
        await worker.train(samples, CONFIG)
    assert worker.step == 0
    assert same(state_of(worker), before)
    assert await play(worker, 5) == span
    await worker.close()


@pytest.mark.parametrize(("lora", "dtype"), [(None, "auto"), (None, "bfloat16"), (LoraSpec(rank=4), "auto")])
async def test_a_saved_worker_takes_the_same_next_step_when_resumed(tmp_path, toy, lora, dtype):
    worker = open_worker(toy, lora=lora, dtype=dtype)
    for rewards in ([1.0, -1.0], [0.0, 0.0], [-1.0, 0.5]):
        await worker.train(await rollouts(worker, rewards=rewards), CONFIG)
    await worker.save(tmp_path / "3")
    resumed = open_worker(tmp_path / "3", lora=lora, resume=True)
    assert resumed.policy.step == 3
    results = []
    for each in (worker, resumed):
        samples = await rollouts(each, rewards=[1.0, -0.5])
        results.append((samples, await each.train(samples, CONFIG), await play(each, 9)))
        await each.close()
    assert results[0] == results[1]
    assert same(state_of(worker), state_of(resumed))


def make_group(spans, rewards):
    trajectories = [
        Trajectory(None, f"r{number}", (), (Span(tuple(PROMPT)), span), StopReason.ANSWERED).scored(reward)
        for number, (span, reward) in enumerate(zip(spans, rewards, strict=True))
    ]
    return TrajectoryGroup(tuple(trajectories))


async def test_a_backend_trains_the_models_that_are_registered_with_it(tmp_path, toy):
    async with LocalBackend(in_process=True, deterministic=True, threads=1) as backend:
        model = TrainableModel(name="toy", base_model=str(toy))
        with pytest.raises(ModelError, match="'toy' is not registered here"):
            backend.sampler(model)
        await model.register(backend)
        with pytest.raises(ModelError, match="registered already"):
            await model.register(backend)
        spans = [await play(model.sampler(), number) for number in range(2)]
        metrics = await model.train([make_group(spans, [1.0, 0.0])], config=CONFIG)
        assert metrics["samples_with_signal"] == 2
        assert await model.get_step() == 1
        assert model.dialect().stop_token_ids
        assert backend.facts(model)["source"] == str(toy)
        with pytest.raises(TrainError, match="no sampled tokens"):
            await model.train([make_group([Span((1, 2))], [1.0])])
        await backend.save(model, str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "model.safetensors").exists()
    with pytest.raises(ModelError, match="the backend of model 'toy' is closed"):
        await model.get_step()


async def test_a_backend_is_closed_even_when_its_block_is_cancelled(toy):
    models = [TrainableModel(name=name, base_model=str(toy)) for name in ("a", "b")]
    with anyio.CancelScope() as scope:
        async with LocalBackend(in_process=True) as backend:
            for model in models:
                await model.register(backend)
                await play(model.sampler(), 1)
            scope.cancel()
    assert not any(thread.name == "art-mcp-engine" for thread in threading.enumerate())


@pytest.mark.parametrize("value", [None, ":0:0"])
def test_a_deterministic_run_on_a_gpu_is_refused_where_cublas_would_not_keep_to_it(toy, monkeypatch, value):
    monkeypatch.setenv(WORKSPACE, value) if value else monkeypatch.delenv(WORKSPACE, raising=False)
    told = f"need {WORKSPACE}=:4096:8 in the environment before CUDA starts, where it is {value or 'not set'}"
    with pytest.raises(ConfigError, match=told):
        open_trainer(ModelSpec(source=str(toy)), Settings(deterministic=True, device="cuda"))
    assert not torch.are_deterministic_algorithms_enabled()


def test_on_a_gpu_an_operation_without_a_deterministic_algorithm_is_an_error_and_not_a_warning(monkeypatch):
    monkeypatch.setenv(WORKSPACE, ":4096:8")
    try:
        demand_determinism()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.set_deterministic_debug_mode("default")
