"""All weights: after a step they are in the running vLLM, and it samples with the trainer's log probabilities."""

from dataclasses import replace

import pytest
import torch
from logprobs import computed_by, differences, drawn, open_trainer, sampled_of, scored_by
from transformers import AutoModelForCausalLM

from art_mcp.local.backend import LocalBackend
from art_mcp.model import TrainableModel
from art_mcp.types import ModelSpec, TrainConfig

STEPS = 60
"""Supervised steps on full weights, so that what is sampled is as sure of itself as a policy in training: rounding shows where
tokens are unsure. After 30 the 99th percentile was .025 to .071 (docs/results/2026-11-28-gpu-sixteenth.md)."""
TURNS, RUN_ON = 1000, 200
"""Prompts that are answered by a turn, as in training, and prompts after which it goes on for 128 tokens whatever it writes:
text that no policy was made for, where every token is a guess and rounding shows most."""
BOUNDS, WIDER = {"mean": 0.01, "p99": 0.05}, 1.5
"""Nats, of the trainer, which takes logits in float32; and by how much of the base model's own difference, in the same run,
that of the trained one may exceed it. Transformers rounds logits to bfloat16, by .03 nats and more at logits over 8, so that it
is held only to the second."""

pytestmark = [pytest.mark.gpu, pytest.mark.anyio, pytest.mark.timeout(500), pytest.mark.filterwarnings("default")]


async def answers(model, samples):
    """What the current policy samples, by kind."""
    prompts = [sample.token_ids[: sample.trainable.index(True)] for sample in samples]
    turns = await drawn(model, prompts[:TURNS], stop=model.dialect().stop_token_ids)
    return {"turns": turns, "run_on": await drawn(model, prompts[:RUN_ON], stop=frozenset())}


def compared(folder, drawn, *, device="cuda"):
    """By kind, how far the sampler is from the trainer of the weights in `folder`, and from transformers' own forward pass."""
    trainer = open_trainer(folder, device)
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    return {
        kind: {
            "trainer": differences(sampled_of(samples), scored_by(trainer, samples)),
            "transformers": differences(sampled_of(samples), computed_by(other, samples)),
        }
        for kind, samples in drawn.items()
    }


async def test_full_weights_are_published_to_the_running_server(gpu_run, tmp_path, note):
    model = TrainableModel(name="full", spec=ModelSpec(source=str(gpu_run.model)))
    demonstrations = [replace(sample, logprobs=None, advantage=1.0) for sample in gpu_run.after]
    batches = [demonstrations[(32 * step) % 960 :][:32] for step in range(STEPS)]
    config = TrainConfig(learning_rate=2e-5, warmup_steps=1, micro_batch_tokens=8192)
    async with LocalBackend(engine="vllm", trainer="torch", engine_args={"max_model_len": 4096}, memory_share=0.2) as backend:
        await model.register(backend)
        assert backend.facts(model)["dtype"] == "bfloat16"
        before = await answers(model, gpu_run.after)
        metrics = [await backend.imitate(model, batch, config=config) for batch in batches]
        assert model.sampler().policy.step == STEPS
        after = await answers(model, gpu_run.after)
        await backend.save(model, str(tmp_path / "saved"))
        stepped = await model.sampler().train(after["turns"], config)
    base, found = compared(gpu_run.model, before), compared(tmp_path / "saved", after)
    losses, publish = [one["loss"] for one in metrics], stepped["seconds_publish"]
    note(base=base, found=found, publish=publish, losses=losses, mismatch=stepped["mismatch"])
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert found["turns"]["trainer"]["tokens"] >= 10_000
    assert found["run_on"]["trainer"]["tokens"] >= 20_000
    assert stepped["mismatch"] <= BOUNDS["mean"]  # by the trainer in its own process, as every step of a run tells it
    for measure, bound in BOUNDS.items():
        assert found["turns"]["trainer"][measure] <= bound
        for by in ("trainer", "transformers"):
            for kind in found:
                assert found[kind][by][measure] <= WIDER * base[kind][by][measure]
