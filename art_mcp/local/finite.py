"""Where a gradient that is not finite came from: asked after the fact, so that a step that goes well pays nothing."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from art_mcp.local.packing import Row
from art_mcp.sampling.decoder import Prefix
from art_mcp.types import Sample, TrainConfig

NAMED = 8
"""Samples of a micro-batch that are named; of more, how many there are."""


class Opens(Protocol):
    """What is asked of a trainer: its optimizer, and the samples in micro-batches."""

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    def opened(
        self, samples: Sequence[Sample], config: TrainConfig
    ) -> AbstractContextManager[tuple[Prefix, Iterator[list[Row]]]]: ...


def name_culprits(
    trainer: Opens,
    samples: Sequence[Sample],
    config: TrainConfig,
    *,
    among: Sequence[Sample],
    again: Callable[[Sequence[Row], Prefix], object],
) -> str:
    """Computes the gradient of `samples` again, micro-batch by micro-batch by `again` (rows and opening), and says which of
    them were not finite: the places of their samples among those of the step, and the shape. No gradient is left behind."""
    places = {id(sample): place for place, sample in enumerate(among)}
    found: list[str] = []
    leaves: list[Tensor] = []
    with trainer.opened(samples, config) as (opening, batches):
        leaves += [leaf for pair in opening.layers for leaf in pair]
        for number, batch in enumerate(batches):
            clear(trainer, leaves)
            again(batch, opening)
            if not are_finite([*gradients(trainer), *(leaf.grad for leaf in leaves if leaf.grad is not None)]):
                chosen = [places[id(sample)] for row in batch for sample in row.samples]
                listed = (
                    f"samples {sorted(chosen)}" if len(chosen) <= NAMED else f"{len(chosen)} samples, {min(chosen)} among them"
                )
                width = max(len(row.token_ids) for row in batch)
                found.append(f"micro-batch {number} ({listed}: {len(batch)} rows of {width} tokens after {opening.length})")
        clear(trainer, leaves)
    clear(trainer, [])
    return (
        "; ".join(found) or "computed again, every micro-batch was finite: the sum, the shared opening or the rate is too large"
    )


def gradients(trainer: Opens) -> Generator[Tensor]:
    parameters: list[Any] = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    return (parameter.grad for parameter in parameters if parameter.grad is not None)


def clear(trainer: Opens, leaves: Sequence[Tensor]) -> None:
    trainer.optimizer.zero_grad(set_to_none=True)
    for leaf in leaves:
        leaf.grad = None


def are_finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
