"""A trust region: a step goes no farther than a KL divergence between the policies before and after it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from art_mcp.local.loss import k3
from art_mcp.local.packing import Row
from art_mcp.sampling.decoder import Prefix
from art_mcp.types import Sample, TrainConfig

PROBES = 4
"""Micro-batches on which a step is measured, at most."""


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
    """The places of the micro-batches that become probes: evenly among so many a quarter of them, from two up to `PROBES`."""
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
            total += float(k3(now - probe.log_probs).double().sum())
            tokens += len(now)
    return total / max(1, tokens)


@torch.no_grad()
def hold(moved: Sequence[Tensor], before: Sequence[Tensor], *, kl: float, target: float) -> float:
    """Takes the parameters `moved` by a step of so much `kl` back towards those of `before`, so that about `target` is left;
    returns the part of the step that is kept. KL is quadratic in a small step, so the root of their ratio is its length (as
    TRPO's step is scaled, arXiv:1502.05477, appendix C)."""
    kept = math.sqrt(target / kl) if kl > target else 1.0
    if kept < 1:
        for parameter, old in zip(moved, before, strict=True):
            parameter.lerp_(old, 1 - kept)
    return kept
