"""Which scenarios come next, by how often they were solved so far: those that are solved neither always nor never.

A group teaches by the differences between its rewards, so a scenario that is solved with probability p is worth p(1 - p), its
learnability (Rutherford et al. 2024, arXiv:2408.15099; for language models Foster and Foerster 2025, arXiv:2502.12272). Of p
little is known: a few rollouts, and what is usual at its level. Both together are a beta distribution (empirical Bayes), of
which the mean of p(1 - p) is taken. A level at which half of the scenarios are always solved and half never teaches nothing,
though its solved rate is one half.
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
REPLAY = 0.5
"""The share of a level's draws, at the least, that goes to scenarios which are known to teach more than one never played, as
far as there are as many."""
LEAST = 0.002
"""What is added to each worth, which is 0.25 at the most, so that whatever is settled is looked at again."""
LEVEL_MEMORY, SCENARIO_MEMORY = 0.9, 0.98
"""By how much older measurements of a level, or of a scenario, count less at each step: the policy changes."""
LEARNED = 0.5
"""What a scenario's earlier groups count when it is played again: the policy has learned from them."""
PRIOR = 2.0
"""How many rollouts that were solved half of the time a level is thought to have seen at first, beside one group of a scenario
whose p may be anything."""
CLOSEST, WIDEST = 32.0, 0.25
"""How alike the scenarios of a level are thought to be at most and at least, in rollouts that the level's rate stands for."""


@dataclass(slots=True)
class Tally:
    """Rollouts that solved and that were played, and what their groups showed of p(1 - p); older ones count less."""

    memory: float
    solved: float = 0.0
    played: float = 0.0
    shown: float = 0.0
    groups: float = 0.0
    step: int = 0

    def add(self, solved: int, played: int, *, step: int, kept: float = 1.0) -> None:
        """Takes in a group; of what was there before, `kept` counts on."""
        kept *= self.memory ** (step - self.step)
        self.solved, self.played, self.step = self.solved * kept + solved, self.played * kept + played, step
        told = played > 1  # a lone rollout shows nothing of p(1 - p)
        self.groups = self.groups * kept + told
        self.shown = self.shown * kept + (solved * (played - solved) / (played * (played - 1)) if told else 0.0)  # without bias

    def faded(self, step: int) -> tuple[float, float]:
        """The rollouts that solved and that were played, as they count at `step`."""
        faded = self.memory ** (step - self.step)
        return self.solved * faded, self.played * faded

    def rate(self, step: int) -> float:
        """The solved rate that is expected; one half where nothing is known."""
        solved, played = self.faded(step)
        return (solved + PRIOR / 2) / (played + PRIOR)

    def learnability(self, step: int) -> float:
        """The mean of p(1 - p) that is expected, 0.25 at the most; a sixth where nothing is known."""
        faded = self.memory ** (step - self.step)
        return min(0.25, (self.shown * faded + 1 / 6) / (self.groups * faded + 1))


@dataclass(frozen=True, slots=True)
class Belief:
    """What is thought of a scenario that was never played: its p has a beta distribution of this mean, which counts as much as
    `weight` rollouts."""

    mean: float
    weight: float

    def worth(self, solved: float = 0.0, played: float = 0.0) -> float:
        """The mean of p(1 - p) after so many rollouts, and `LEAST`."""
        up, all_ = solved + self.mean * self.weight, played + self.weight
        return up * (all_ - up) / (all_ * (all_ + 1)) + LEAST


def believed(first: Tally, step: int) -> Belief:
    """By what the first groups of a level's scenarios showed: where p(1 - p) is in the mean nearly what it would be if each p
    were the level's, they are alike; the farther below, the more of them are always or never solved."""
    mean, within = first.rate(step), first.learnability(step)
    between = mean * (1 - mean) - within
    weight = within / between if between > 0 else CLOSEST
    return Belief(mean, min(CLOSEST, max(WIDEST, weight)))


@dataclass(slots=True)
class Curriculum:
    """Draws from `scenarios` by what `note` was told. The draws depend on (`seed`, step) and on that alone."""

    scenarios: Sequence[Scenario]
    seed: int = 0
    _levels: dict[int, Tally] = field(default_factory=dict[int, Tally], init=False)
    _first: dict[int, Tally] = field(default_factory=dict[int, Tally], init=False)
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
                if name not in self._seen:
                    self._first.setdefault(level, Tally(LEVEL_MEMORY)).add(solved, played, step=step)
                self._seen.setdefault(name, Tally(SCENARIO_MEMORY)).add(solved, played, step=step, kept=LEARNED)

    def shares(self, step: int) -> dict[int, float]:
        """The share of each level in the draws of `step`: in proportion to its worth, above an equal part of `FLOOR`."""
        worths = {level: self.level_worth(level, step) for level in sorted(self._of_level)}
        total = sum(worths.values())
        return {level: FLOOR / len(worths) + (1 - FLOOR) * value / total for level, value in worths.items()}

    def level_rate(self, level: int, step: int) -> float:
        """The solved rate that is expected of a level; one half where nothing is known."""
        return self._levels.get(level, Tally(LEVEL_MEMORY)).rate(step)

    def level_worth(self, level: int, step: int) -> float:
        """What a draw of this level is expected to teach."""
        return self._levels.get(level, Tally(LEVEL_MEMORY)).learnability(step) + LEAST

    def belief(self, level: int, step: int) -> Belief:
        """What is thought of the scenarios of a level that were never played."""
        return believed(self._first.get(level, Tally(LEVEL_MEMORY)), step)

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
        """So many scenarios of one level: `REPLAY` of them, as far as there are as many, of those that are known to be worth
        more than one never played, the others of all the rest."""
        if not count:
            return []
        belief = self.belief(pool[0].level, step)
        unseen = belief.worth()
        worths = {scenario.id: unseen for scenario in pool}
        for name in worths.keys() & self._seen.keys():
            worths[name] = belief.worth(*self._seen[name].faded(step))
        better = [scenario for scenario in pool if worths[scenario.id] > unseen]
        again = weighted(better, worths, count=math.floor(count * REPLAY + rng.random()), rng=rng)
        chosen = {scenario.id for scenario in again}
        rest = [scenario for scenario in pool if scenario.id not in chosen]
        return again + weighted(rest, worths, count=count - len(again), rng=rng)


def weighted(pool: Sequence[Scenario], worths: Mapping[str, float], *, count: int, rng: random.Random) -> list[Scenario]:
    """So many of `pool`, or all, weighted by their worth, without replacement (Efraimidis and Spirakis 2006)."""
    keyed = [(math.log(1.0 - rng.random()) / worths[scenario.id], place) for place, scenario in enumerate(pool)]
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
    """How often each scenario was solved and played: {scenario id: [solved, played]}, failed rollouts left out."""
    outcomes: dict[str, list[int]] = {}
    for group in groups:
        if group.scenario is not None and group.trajectories:
            counts = outcomes.setdefault(group.scenario.id, [0, 0])
            counts[0] += sum(environment.solved(one) for one in group.rollouts)
            counts[1] += len(group.rollouts)
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
