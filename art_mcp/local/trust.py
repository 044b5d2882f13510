"""A trust region: a step goes about as far as a KL divergence between the policies before and after it, and no farther."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from art_mcp.errors import TrainError
from art_mcp.local.loss import k3
from art_mcp.local.master import Masters
from art_mcp.local.packing import Row
from art_mcp.sampling.decoder import Prefix
from art_mcp.types import Sample, TrainConfig

PROBES = 4
"""Micro-batches on which a step is measured, at most."""
LOOKS = 4
"""How often a step is measured, at most."""
SHORT = 0.2
"""What is left of a step that is measured again: KL need not be quadratic over one that was five times as long."""


class Scored(Protocol):
    @property
    def log_probs(self) -> Tensor: ...


class Scores(Protocol):
    """What is asked of a trainer: the opening of its samples as it is now, and the log probabilities of rows after it."""

    def opened(
        self, samples: Sequence[Sample], config: TrainConfig
    ) -> AbstractContextManager[tuple[Prefix, Iterator[list[Row]]]]: ...

    def score_rows(self, rows: Sequence[Row], opening: Prefix, *, temperature: float) -> Scored: ...


@dataclass(frozen=True, slots=True)
class Probe:
    """A micro-batch, and the log probabilities of its trainable tokens before the step."""

    rows: Sequence[Row]
    log_probs: Tensor


def probed(batches: int) -> set[int]:
    """The places, among so many micro-batches, of those that become probes: a quarter of them, but two or more where there are
    two, at even distances."""
    chosen = min(batches, max(2, min(PROBES, batches // 4)))
    return {(2 * place + 1) * batches // (2 * chosen) for place in range(chosen)}


@torch.no_grad()
def divergence(trainer: Scores, samples: Sequence[Sample], probes: Sequence[Probe], config: TrainConfig) -> float:
    """KL(before ‖ now) in nats, the mean over the probes' trainable tokens by the k3 estimator: `samples` are the whole step's,
    whose opening the probes share. (The policy that sampled them is the one before, or a step or two older.)"""
    total, tokens = 0.0, 0
    with trainer.opened(samples, config) as (opening, _):
        for probe in probes:
            now = trainer.score_rows(probe.rows, opening, temperature=config.temperature).log_probs
            total += float(k3(now.double() - probe.log_probs.double()).sum())
            tokens += len(now)
    return total / max(1, tokens)


def hold(
    masters: Masters, before: Sequence[Tensor], measure: Callable[[], float], *, target: float, label: str
) -> dict[str, float]:
    """Takes a step that went farther than `target` back along its own way; returns its KL and the part of it that is kept.

    KL is quadratic in a short step, so the root of target / KL is what to keep (as TRPO scales its step, arXiv:1502.05477,
    appendix C). What little is left of a long step is measured again, and may have up to twice the target. Raises TrainError
    for a step, which it calls by its `label`, after which the policy has no finite KL.
    """
    first = kl = measure()
    kept = 1.0
    for look in range(1, LOOKS + 1):
        if not math.isfinite(kl):
            raise TrainError(
                f"after {label} the policy's KL is {kl}: the learning rate is too large; no weight was changed; begin a "
                "new run with a lower one (--lr), since a resumed run keeps its own"
            )
        if kl <= (target if look == 1 else 2 * target):
            break
        part = math.sqrt(target / kl)
        kept *= part
        masters.go_back(before, 1 - part)
        if kept > SHORT or look == LOOKS:
            break
        kl = measure()
    return {"step_kl": first, "step_kept": kept}
