"""Log probabilities of sampled tokens as somebody else computes them, and how far they are from those of the sampler."""

import torch


def differences(ours, theirs):
    """Mean and 99th percentile of |Δ| in nats, the largest, and the k3 estimate of KL, over all sampled tokens."""
    delta = torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)
    ratio = -delta  # log of (theirs / ours)
    return {
        "tokens": len(delta),
        "mean": float(delta.abs().mean()),
        "p99": float(delta.abs().quantile(0.99)),
        "max": float(delta.abs().max()),
        "kl": float((ratio.exp() - 1 - ratio).mean()),
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
