"""Log probabilities and entropies of chosen tokens, from hidden states; in chunks where the vocabulary is large."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from art_mcp.sampling.decoder import Decoder

LOGIT_CELLS = 2**25
"""Logits kept at once: with a large vocabulary they are computed in chunks, and again in the backward pass."""


def chosen_log_probs(decoder: Decoder, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log probabilities (tokens,) of `targets` and entropies (tokens,) in nats, from hidden states (tokens, size)."""

    def some(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = torch.log_softmax(decoder.logits(hidden) / temperature, dim=-1)
        entropies = -(log_probs.detach().exp() * log_probs.detach()).sum(dim=-1)
        return log_probs.gather(1, targets[:, None])[:, 0], entropies

    vocabulary = decoder.vocabulary
    rows = max(1, LOGIT_CELLS // vocabulary)
    if len(targets) <= rows:
        return some(hidden, targets)
    parts = [
        checkpoint(some, hidden[start : start + rows], targets[start : start + rows], use_reentrant=False)
        for start in range(0, len(targets), rows)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
