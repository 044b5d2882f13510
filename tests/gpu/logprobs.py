"""Log probabilities of sampled tokens as somebody else computes them, and how far they are from those of the sampler."""

import anyio
import torch

from art_mcp.core.samples import common_prefix
from art_mcp.local.models import load_model
from art_mcp.local.torch_trainer import TorchTrainer
from art_mcp.types import ModelSpec, Sample, SamplingParams

SURE = 0.9
"""Probability."""


def differences(ours, theirs):
    """Mean and 99th percentile of |Δ| in nats, the largest, and the k3 estimate of KL, over all sampled tokens; and, since
    rounding shows where a policy is unsure, the share of tokens that it (`ours`) gave less than SURE, and the others' mean."""
    delta = torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)
    sure = torch.tensor(ours, dtype=torch.float64).exp() >= SURE
    ratio = -delta  # log of (theirs / ours)
    return {
        "tokens": len(delta),
        "mean": float(delta.abs().mean()),
        "p99": float(delta.abs().quantile(0.99)),
        "max": float(delta.abs().max()),
        "kl": float((ratio.exp() - 1 - ratio).mean()),
        "unsure": float((~sure).double().mean()),
        "mean_sure": float(delta[sure].abs().mean()),
    }


def sampled_of(samples):
    return [lp for sample in samples for lp, on in zip(sample.logprobs, sample.trainable, strict=True) if on]


def some(samples, tokens=30_000):
    """The first samples with so many sampled tokens."""
    taken, count = [], 0
    for sample in samples:
        if count >= tokens:
            break
        taken.append(sample)
        count += sum(sample.trainable)
    return taken


@torch.no_grad()
def computed_by(model, samples, *, rows=16):
    """Log probabilities of the sampled tokens by a transformers (or peft) model's own forward pass, in its own precision."""
    device = next(model.parameters()).device
    found = []
    for start in range(0, len(samples), rows):
        batch = samples[start : start + rows]
        width = max(len(sample.token_ids) for sample in batch)
        tokens = torch.tensor([(*sample.token_ids, *[0] * (width - len(sample.token_ids))) for sample in batch], device=device)
        seen = torch.tensor([[1] * len(s.token_ids) + [0] * (width - len(s.token_ids)) for s in batch], device=device)
        states = model(input_ids=tokens, attention_mask=seen, use_cache=False).logits
        for row, sample in enumerate(batch):
            places = torch.tensor(sample.trainable).nonzero()[:, 0].to(device)
            log_probs = torch.log_softmax(states[row, places - 1].float(), dim=-1)
            found += log_probs.gather(1, tokens[row, places][:, None])[:, 0].tolist()
    return found


async def drawn(model, prompts, *, stop, max_tokens=128, concurrency=64):
    """What a registered model samples after each prompt; all of it under its current policy."""
    samples, limiter, sampler = [None] * len(prompts), anyio.CapacityLimiter(concurrency), model.sampler()
    step = sampler.policy.step

    async def ask(place):
        async with limiter:
            params = SamplingParams(max_tokens=max_tokens, seed=place)
            span = (await sampler.sample(prompts[place], params=params, stop=stop)).span
        assert span.policy_version == step
        before, after = len(prompts[place]), len(span.token_ids)
        on = (False,) * before + (True,) * after
        samples[place] = Sample((*prompts[place], *span.token_ids), on, (0.0,) * before + span.logprobs, 1.0)

    async with anyio.create_task_group() as tasks:
        for place in range(len(prompts)):
            tasks.start_soon(ask, place)
    return samples


def open_trainer(folder, device):
    """The trainer that LocalBackend would open for all weights of a folder on such a device."""
    source = str(folder)
    return TorchTrainer(load_model(ModelSpec(source=source, dtype="bfloat16"), torch.device(device)).model)


@torch.no_grad()
def scored_by(trainer, samples, *, rows=16):
    """Log probabilities of the sampled tokens by the trainer's own forward pass, with the opening that its steps share."""
    shared, found = common_prefix(samples), []
    for start in range(0, len(samples), rows):
        found += trainer.score(samples[start : start + rows], prefix=shared, temperature=1.0).log_probs.tolist()
    return found
