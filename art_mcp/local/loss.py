"""Objectives as pure functions of log probabilities: what the default is made of, and the options beside it.

Shapes: all tensors are flat over the trainable tokens of a micro-batch; `rows` says to which sample each token belongs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from art_mcp.types import TrainConfig


def policy_loss(
    new: Tensor, sampled: Tensor, advantages: Tensor, rows: Tensor, config: TrainConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Per-token losses (tokens,), to be weighted and summed by the caller, and per-token figures for the log.

    `new`, `sampled`: log probabilities under the policy being trained and the one that sampled; `advantages`: of each
    token's sample.
    """
    log_ratio = new - sampled
    ratio = log_ratio.detach().exp()
    if config.objective == "ppo":
        losses, clipped = ppo(new, sampled, advantages, config)
    elif config.objective == "gspo":
        losses, clipped = ppo(*sequence_ratio(new, sampled, rows), advantages, config)
    elif config.objective == "reinforce":  # Williams 1992, https://doi.org/10.1007/BF00992696
        losses, clipped = -advantages * new, torch.zeros_like(sampled)
    else:
        clipped = (ratio > config.weight_cap).float()
        losses = -ratio.clamp(max=config.weight_cap) * advantages * new
    if config.sequence_ratio_bounds is not None:
        inside = geometric_mask(log_ratio.detach(), rows, config.sequence_ratio_bounds)
        losses, clipped = losses * inside, torch.maximum(clipped, 1 - inside)
    figures = {"ratio": ratio, "clipped": clipped, "kl": k3(log_ratio.detach()), "mismatch": log_ratio.detach().abs()}
    return losses, figures


def ppo(new: Tensor, sampled: Tensor, advantages: Tensor, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Clipped surrogate (PPO, arXiv:1707.06347) with the wider upper bound of DAPO (arXiv:2503.14476)."""
    ratio = (new - sampled).exp()
    bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    losses = -torch.minimum(ratio * advantages, bounded * advantages)
    return losses, (ratio.detach() * advantages > bounded.detach() * advantages).float()


def sequence_ratio(new: Tensor, sampled: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Stands the sequence's mean log ratio in for each token's (GSPO-token, arXiv:2507.18071): the value is the
    sequence's, the gradient the token's."""
    mean = row_means((new - sampled).detach(), rows)[rows]
    return mean + new - new.detach(), torch.zeros_like(sampled)


def geometric_mask(log_ratio: Tensor, rows: Tensor, bounds: tuple[float, float]) -> Tensor:
    """1 for the tokens of samples whose geometric mean ratio lies within `bounds`, else 0."""
    mean = row_means(log_ratio, rows).exp()
    return ((mean >= bounds[0]) & (mean <= bounds[1])).to(log_ratio.dtype)[rows]


def row_means(values: Tensor, rows: Tensor) -> Tensor:
    count = int(rows.max()) + 1 if rows.numel() else 0
    totals = torch.zeros(count, dtype=values.dtype).index_add_(0, rows, values)
    sizes = torch.zeros(count, dtype=values.dtype).index_add_(0, rows, torch.ones_like(values))
    return totals / sizes.clamp(min=1)


def kl_penalty(new: Tensor, reference: Tensor) -> Tensor:
    """k3 estimator of KL(new ‖ reference) per token, with gradient (GRPO, arXiv:2402.03300, eq. 4)."""
    return k3(reference - new)


def k3(log_ratio: Tensor) -> Tensor:
    """Of log (q / p) at what p sampled: an estimate of KL(p ‖ q) that is never negative (Schulman 2020,
    joschu.net/blog/kl-approx.html)."""
    return log_ratio.exp() - 1 - log_ratio


def token_weights(trainable_counts: list[int], config: TrainConfig, *, constant: int) -> list[float]:
    """What each token of each sample counts in the batch's loss; the weights of a whole batch are global, so that the
    gradient does not depend on how it was cut into micro-batches.

    "tokens": 1 / all trainable tokens (DAPO); "sequences": 1 / (samples · own tokens) (GRPO);
    "constant": 1 / (samples · `constant`) (Dr. GRPO, arXiv:2503.20783).
    """
    samples = max(1, len(trainable_counts))
    if config.normalize == "tokens":
        total = max(1, sum(trainable_counts))
        return [1.0 / total] * len(trainable_counts)
    if config.normalize == "sequences":
        return [1.0 / (samples * max(1, count)) for count in trainable_counts]
    return [1.0 / (samples * constant)] * len(trainable_counts)


def supervised_loss(new: Tensor) -> Tensor:
    """Per-token negative log likelihood of a demonstration."""
    return -new
