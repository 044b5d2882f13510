"""A step is held to its target where Unsloth or torch trains on a GPU, and measuring it twice gives the same."""

from dataclasses import replace

import pytest

from art_mcp.local.remote import RemoteWorker
from art_mcp.local.worker import Settings
from art_mcp.types import LoraSpec, ModelSpec, TrainConfig

pytestmark = [pytest.mark.gpu, pytest.mark.anyio, pytest.mark.timeout(400), pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("trainer", ["unsloth", "torch"])
async def test_a_step_that_goes_too_far_is_cut_and_one_of_length_0_is_not(trainer, gpu_run, note):
    worker = RemoteWorker("policy", ModelSpec(source=str(gpu_run.model), lora=LoraSpec()), Settings(trainer=trainer))
    samples = [replace(sample, advantage=(-1.0) ** place) for place, sample in enumerate(gpu_run.after[:64])]
    config = TrainConfig(learning_rate=1e-3, warmup_steps=0, micro_batch_tokens=8192)
    far = await worker.train(samples, config)
    still = await worker.train(samples, config.with_(learning_rate=0.0))
    again = await worker.train(samples, config)
    whole = await worker.train(samples, config.with_(target_kl=None))
    await worker.close()
    note(far=far, still=still, again=again, whole=whole)
    assert far["step_kl"] > 2 * config.target_kl
    assert 0 < far["step_kept"] < 0.8
    assert again["step_kept"] < 1
    assert still["step_kl"] < 0.1 * config.target_kl, "the same weights, computed with a graph and without one"
    assert still["step_kept"] == 1
    assert "step_kl" not in whole
