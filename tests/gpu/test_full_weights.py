"""All weights: after a step they are in the running vLLM, and it samples with the trainer's log probabilities."""

from dataclasses import replace

import anyio
import pytest
import torch
from logprobs import computed_by, differences, sampled_of
from transformers import AutoModelForCausalLM

from art_mcp.local.backend import LocalBackend
from art_mcp.model import TrainableModel
from art_mcp.types import ModelSpec, Sample, SamplingParams, TrainConfig

STEPS = 30
"""Supervised steps on full weights, so that what is sampled is as sure of itself as a policy in training."""

pytestmark = [pytest.mark.gpu, pytest.mark.anyio, pytest.mark.timeout(500), pytest.mark.filterwarnings("default")]


async def test_full_weights_are_published_to_the_running_server(gpu_run, tmp_path, note):
    model = TrainableModel(name="full", spec=ModelSpec(source=str(gpu_run.model)))
    demonstrations = [replace(sample, logprobs=None, advantage=1.0) for sample in gpu_run.after]
    batches = [demonstrations[(32 * step) % 960 :][:32] for step in range(STEPS)]
    prompts = [sample.token_ids[: sample.trainable.index(True)] for sample in gpu_run.after[:200]]
    config = TrainConfig(learning_rate=2e-5, warmup_steps=1, micro_batch_tokens=8192)
    engine_args = {"max_model_len": 4096, "dtype": "bfloat16"}
    async with LocalBackend(engine="vllm", trainer="torch", engine_args=engine_args) as backend:
        await model.register(backend)
        metrics = [await backend.imitate(model, batch, config=config) for batch in batches]
        sampler = model.sampler()
        assert sampler.policy.step == STEPS
        samples = [None] * len(prompts)
        limiter = anyio.CapacityLimiter(64)

        async def ask(place):
            async with limiter:
                params = SamplingParams(max_tokens=128, seed=place)
                span = (await sampler.sample(prompts[place], params=params, stop=frozenset())).span
            before, after = len(prompts[place]), len(span.token_ids)
            on = (False,) * before + (True,) * after
            samples[place] = Sample((*prompts[place], *span.token_ids), on, (0.0,) * before + span.logprobs, 1.0)
            assert span.policy_version == STEPS

        async with anyio.create_task_group() as tasks:
            for place in range(len(prompts)):
                tasks.start_soon(ask, place)
        await backend.save(model, str(tmp_path / "saved"))
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16).cuda().eval()
    found = differences(sampled_of(samples), computed_by(trained, samples))
    note(found=found, publish=[one.get("seconds_publish") for one in metrics], losses=[one["loss"] for one in metrics])
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert found["tokens"] >= 20_000
    assert found["mean"] <= 0.01
    assert found["p99"] <= 0.05
