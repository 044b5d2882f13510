"""What a person is told when hardly anything was left to learn from: rewards that are equal within their groups, at success or
at failure. Which rollouts teach something is the trainer's to say."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import fmean
from typing import Any

LAST = 10
"""How many steps are looked at."""
FEW = 0.1
"""The share of their rollouts that is hardly any."""

SOLVED = "nearly all of them solve their scenario, so stop here, or go on with harder ones"
UNSOLVED = (
    "hardly any of them solves its scenario, so begin with demonstrations (--warm-start N), read calls leniently (--lenient), "
    "or play easier ones"
)
BOTH = (
    "some scenarios are always solved and others never, so draw what lies between (--curriculum), or look around more "
    "(--temperature 1.2)"
)


class Ties:
    """Of a training run, told of each step; speaks once."""

    def __init__(self) -> None:
        self._steps: deque[Mapping[str, Any]] = deque(maxlen=LAST)
        self._told = False

    def note(self, values: Mapping[str, Any]) -> str | None:
        """What is to be said after the step with these metrics: something, where most rollouts of the last steps were in groups
        of equal rewards."""
        if self._told or not {"samples", "samples_with_signal", "solved"} <= values.keys():
            return None
        self._steps.append(values)
        played, taught = (sum(step[name] for step in self._steps) for name in ("samples", "samples_with_signal"))
        if len(self._steps) < LAST or taught > FEW * played:
            return None
        self._told = True
        solved = fmean([step["solved"] for step in self._steps])
        why = SOLVED if solved >= 1 - FEW else UNSOLVED if solved <= FEW else BOTH
        share = 100 * (1 - taught / max(1, played))
        return f"note: {share:.0f} % of the last {LAST} steps' rollouts taught nothing, as rewards tie in their groups: {why}"
