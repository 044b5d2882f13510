"""Whether the last gradients agree: where they do not, steps are shortened, so that chance does not carry a policy away."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

import torch
from torch import Tensor

WINDOW = 20
"""Steps over which agreement is judged."""
QUANTILES = (
    *(4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093),
)
"""What Student's t is below with a chance of 0.975, from 2 degrees of freedom (three cosines) to those of a full WINDOW."""
FEWEST = 3
"""Cosines from which agreement is judged: the first steps, whose learning rate warms up, go by it none the less."""
WIDEST = 4.0
"""How many times as far as where gradients just agree a step may go where they agree far better."""
KEY = "agreements"


class Agreement:
    """Watches an AdamW `optimizer`: each step by reward is asked for before the optimizer takes it.

    A gradient's cosine with Adam's momentum, the mean of the gradients before it, has mean 0 where rewards say nothing of what
    the policy did, whatever it did and however the parameters lie: the expected gradient is 0 then. Student's t of the last
    WINDOW cosines against that mean tells a signal from chance in a model of any size. Of few cosines a large t is more often
    chance, so it counts for less: as the QUANTILES of Student's distribution say. What is remembered is kept in the optimizer's
    own state, and so in its checkpoints.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    @property
    def cosines(self) -> list[float]:
        """Of the last steps, oldest first."""
        return self._optimizer.param_groups[0].setdefault(KEY, [])

    def forget(self) -> None:
        self._optimizer.param_groups[0][KEY] = []

    def look(self, target: float) -> tuple[dict[str, float], float]:
        """Figures of the gradient that the parameters hold: `agreement`, its cosine with the momentum, and `agreement_t`, where
        there are FEWEST of them; and how sure they make of it, from 0 to WIDEST: t / `target`, less where they are fewer than
        WINDOW. Above 1 that is by how much farther a step may go; below, squared, the part of the learning rate that it is to
        take, since a t of 1 is chance at one step in six. Where nothing is known it is 1: at first, and for a gradient that is
        not finite."""
        found = self._cosine()
        if found is None:
            return {}, 1.0
        self._optimizer.param_groups[0][KEY] = [*self.cosines, found][-WINDOW:]
        if len(self.cosines) < FEWEST:
            return {"agreement": found}, 1.0
        statistic = t_of(self.cosines)
        wanted = target * QUANTILES[len(self.cosines) - FEWEST] / QUANTILES[-1]
        sure = min(WIDEST, max(0.0, statistic / wanted))
        return {"agreement": found, "agreement_t": statistic}, sure * min(1.0, sure)

    @torch.no_grad()
    def _cosine(self) -> float | None:
        state = self._optimizer.state
        moved: list[Tensor] = [one for group in self._optimizer.param_groups for one in group["params"]]
        pairs = [(one.grad, state[one]["exp_avg"]) for one in moved if one.grad is not None and one in state]
        if not pairs:
            return None
        products = [torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()]) for a, b in pairs]
        dot, first, second = torch.stack(products).double().sum(dim=0).tolist()
        found = dot / math.sqrt(first * second) if first > 0 and second > 0 else math.nan
        return found if math.isfinite(found) else None


def t_of(values: Sequence[float]) -> float:
    """Student's t of two or more values, against a mean of 0."""
    spread = stdev(values)
    if not spread:
        return math.copysign(1e6, fmean(values))
    return fmean(values) / (spread / math.sqrt(len(values)))
