"""Which scenarios come next, by how often they were solved so far: those that are solved neither always nor never.

A group teaches by the differences between its rewards, so a scenario that is solved with probability p is worth p(1 - p), its
learnability (Rutherford et al. 2024, arXiv:2408.15099; for language models Foster and Foerster 2025, arXiv:2502.12272). A
level's is the mean of its scenarios', as their groups show it, and not that of its solved rate: where half of the scenarios are
always solved and half never, there is nothing to learn at a rate of one half.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from art_mcp.environment import Environment
from art_mcp.types import Scenario, TrajectoryGroup

FLOOR = 0.1
"""The share of all draws that is dealt out evenly over the levels, so that none is forgotten, whatever was measured."""
LEAST = 0.002
"""What is added to each worth, which is 0.25 at the most, so that what is settled is looked at again."""
LEVEL_MEMORY, SCENARIO_MEMORY = 0.9, 0.98
"""By how much older measurements of a level, or of a scenario, count less at each step: the policy changes."""
PRIOR = 2.0
"""How many rollouts the level's rate stands for in what is thought of a scenario."""


@dataclass(slots=True)
class Tally:
    """Rollouts that solved and that were played, and what their groups showed of p(1 - p); older ones count less."""

    memory: float
    solved: float = 0.0
    played: float = 0.0
    shown: float = 0.0
    groups: float = 0.0
    step: int = 0

    def add(self, solved: int, played: int, *, step: int) -> None:
        """Takes in a group. One of several rollouts shows p(1 - p) without bias, a lone one nothing of it."""
        faded = self.memory ** (step - self.step)
        self.solved, self.played, self.step = self.solved * faded + solved, self.played * faded + played, step
        self.shown, self.groups = self.shown * faded, self.groups * faded
        if played > 1:
            self.shown += solved * (played - solved) / (played * (played - 1))
            self.groups += 1

    def rate(self, *, step: int, prior: float, weight: float) -> float:
        """The share that is expected to be solved at `step`, where `prior` counts as much as `weight` rollouts."""
        faded = self.memory ** (step - self.step)
        return (self.solved * faded + prior * weight) / (self.played * faded + weight)

    def learnability(self, *, step: int) -> float:
        """The mean of p(1 - p) that is expected at `step`, 0.25 at the most. What was seen stands beside one group more, of a
        scenario for which any p is as likely: a sixth."""
        faded = self.memory ** (step - self.step)
        return min(0.25, (self.shown * faded + 1 / 6) / (self.groups * faded + 1))


def worth(rate: float) -> float:
    return rate * (1 - rate) + LEAST


@dataclass(slots=True)
class Curriculum:
    """Draws from `scenarios` by what `note` was told. The draws depend on (`seed`, step) and on that alone."""

    scenarios: Sequence[Scenario]
    seed: int = 0
    _levels: dict[int, Tally] = field(default_factory=dict[int, Tally], init=False)
    _seen: dict[str, Tally] = field(default_factory=dict[str, Tally], init=False)
    _of_level: dict[int, list[Scenario]] = field(default_factory=dict[int, list[Scenario]], init=False)
    _level_of: dict[str, int] = field(default_factory=dict[str, int], init=False)

    def __post_init__(self) -> None:
        for scenario in self.scenarios:
            self._of_level.setdefault(scenario.level, []).append(scenario)
            self._level_of[scenario.id] = scenario.level

    def note(self, step: int, outcomes: Mapping[str, Sequence[int]]) -> None:
        """Takes in how often each scenario of a step was solved and played: {scenario id: (solved, played)}."""
        for name, (solved, played) in outcomes.items():
            level = self._level_of.get(name)
            if level is not None:
                self._levels.setdefault(level, Tally(LEVEL_MEMORY)).add(solved, played, step=step)
                self._seen.setdefault(name, Tally(SCENARIO_MEMORY)).add(solved, played, step=step)

    def shares(self, step: int) -> dict[int, float]:
        """The share of each level in the draws of `step`: in proportion to its worth, above an equal part of `FLOOR`."""
        worths = {level: self.level_worth(level, step) for level in sorted(self._of_level)}
        total = sum(worths.values())
        return {level: FLOOR / len(worths) + (1 - FLOOR) * value / total for level, value in worths.items()}

    def level_rate(self, level: int, step: int) -> float:
        """The solved rate that is expected of a level; one half where nothing is known."""
        return self._levels.get(level, Tally(LEVEL_MEMORY)).rate(step=step, prior=0.5, weight=PRIOR)

    def level_worth(self, level: int, step: int) -> float:
        """What a draw of a level is expected to teach."""
        return self._levels.get(level, Tally(LEVEL_MEMORY)).learnability(step=step) + LEAST

    def draw(self, step: int, count: int) -> list[Scenario]:
        """The scenarios of `step`, none of them twice unless a level has too few."""
        rng = random.Random(f"{self.seed}:{step}:curriculum")
        drawn: list[Scenario] = []
        for level, wanted in allot(self.shares(step), count, offset=rng.random()).items():
            pool = self._of_level[level]
            laps, rest = divmod(wanted, len(pool))
            drawn.extend([*pool * laps, *self.best(pool, rest, step=step, rng=rng)])
        rng.shuffle(drawn)
        return drawn

    def best(self, pool: Sequence[Scenario], count: int, *, step: int, rng: random.Random) -> list[Scenario]:
        """So many scenarios of one level, weighted by their worth, without replacement (Efraimidis and Spirakis 2006).

        One that was never played is thought to be as its level, and so worth nearly as much as a known mixed one. Drawing the
        latter more often taught a small policy these scenarios, and new ones no faster (docs/results/2026-11-28-curriculum.md).
        """
        if not count:
            return []
        expected = self.level_rate(pool[0].level, step)
        unseen = Tally(SCENARIO_MEMORY)
        keyed: list[tuple[float, int]] = []
        for place, scenario in enumerate(pool):
            rate = self._seen.get(scenario.id, unseen).rate(step=step, prior=expected, weight=PRIOR)
            keyed.append((math.log(1.0 - rng.random()) / worth(rate), place))
        return [pool[place] for _, place in heapq.nlargest(count, keyed)]


def allot(shares: Mapping[int, float], count: int, *, offset: float) -> dict[int, int]:
    """How many of `count` draws each level gets: its share, rounded up or down by one `offset` in [0, 1) for all (systematic
    sampling), so that small shares are met over time."""
    allotted: dict[int, int] = {}
    reached, before = 0.0, 0
    for level, share in shares.items():
        reached += share * count
        upto = min(count, math.floor(reached + offset))
        allotted[level], before = upto - before, upto
    last = list(allotted)[-1]
    allotted[last] += count - before
    return allotted


def outcomes_of(groups: Sequence[TrajectoryGroup], environment: Environment) -> dict[str, list[int]]:
    """How often each scenario was solved and played: {scenario id: [solved, played]}. Rollouts that failed are left out, and
    those that the clock ended: a slow machine makes no scenario hard."""
    outcomes: dict[str, list[int]] = {}
    for group in groups:
        compared = group.compared
        if group.scenario is not None and compared:
            counts = outcomes.setdefault(group.scenario.id, [0, 0])
            counts[0] += sum(map(environment.solved, compared))
            counts[1] += len(compared)
    return outcomes


def solved_shares(groups: Sequence[TrajectoryGroup], outcomes: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """The share of rollouts that solved their scenario, by the `outcomes` of the groups: of all ("solved"), and of each level
    that was played ("solved/level1"); empty where there are none."""
    levels = {group.scenario.id: group.scenario.level for group in groups if group.scenario is not None}
    totals: dict[int, tuple[int, int]] = {}
    for name, (solved, played) in outcomes.items():
        before = totals.get(levels[name], (0, 0))
        totals[levels[name]] = (before[0] + solved, before[1] + played)
    if not totals:
        return {}
    solved, played = (sum(counts) for counts in zip(*totals.values(), strict=True))
    return {"solved": solved / played, **{f"solved/level{level}": of / n for level, (of, n) in sorted(totals.items())}}


def recalled(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[int, Mapping[str, Sequence[int]]]]:
    """What a run's metrics remember of each step that a curriculum drew."""
    return [(int(line["step"]), line["outcomes"]) for line in metrics if "outcomes" in line]
