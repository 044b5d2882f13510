"""What a person is told when the clock ends more than a few of a run's rollouts, from which nothing is learned then."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

LAST = 10
"""How many steps are looked at."""
FEW = 0.05
"""The share of their rollouts that is no matter."""
TELLING = 8
"""Rollouts that are more than one bad moment of the machine."""


class Cuts:
    """Of a training run, told of each step; speaks once."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float]] = deque(maxlen=LAST)
        self._told = False

    def note(self, values: Mapping[str, Any]) -> str | None:
        """What is to be said after the step with these metrics: something, where the clock ended too many rollouts."""
        if self._told or not {"rollouts", "out_of_time"} <= values.keys():
            return None
        self._steps.append((values["rollouts"], values["rollouts"] * values["out_of_time"]))
        played, cut = (sum(counts) for counts in zip(*self._steps, strict=True))
        if cut < TELLING or cut <= FEW * played:
            return None
        self._told = True
        lately = "the last step's rollouts" if len(self._steps) == 1 else f"the last {len(self._steps)} steps' rollouts"
        return (
            f"note: the time limit ended {100 * cut / played:.0f} % of {lately}, and nothing is learned from those: raise "
            "Limits(seconds=…) in the environment, or play fewer at once (a lower --concurrency)"
        )
