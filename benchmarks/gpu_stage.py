"""How the GPU measurements play the calculator: both conditions, drawing by level, held-out questions. What is measured when is
in the other gpu_*.py."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from art_mcp.agent.curriculum import Curriculum, allot, outcomes_of
from art_mcp.agent.demonstrate import Demonstration, show_solutions
from art_mcp.agent.evaluate import evaluation, wilson
from art_mcp.agent.group import gather_trajectory_groups
from art_mcp.agent.loop import pick
from art_mcp.agent.places import Places, places_of
from art_mcp.environment import Environment, load_environment
from art_mcp.model import TrainableModel
from art_mcp.ports import Toolbox
from art_mcp.tools import open_tools
from art_mcp.types import Malformed, Scenario, ScoredTrajectory, Trajectory, TrajectoryGroup
from benchmarks.gpu_report import Clock

SERVER = "servers/calculator/server.py:server"
"""In this process: what is measured is the engine and the trainer, not a pipe."""
SYMBOLS = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
}
NOTED = "draws.json"
CHUNK = 400
"""Rollouts of an evaluation between two looks at the clock."""


@dataclass(frozen=True, slots=True)
class Condition:
    """One way to offer the tools: `train` is played for learning, `test` (levels 1 to 8) for measuring."""

    name: str
    train: Environment
    test: Environment
    toolbox: Toolbox


@asynccontextmanager
async def open_conditions(levels: str, *, progress: float, processes: int = 0) -> AsyncGenerator[list[Condition]]:
    """The calculator with `evaluate` offered and without; `progress` is the share of reward for steps on the way, `processes`
    how many hold the server of each, in place of this one."""
    async with AsyncExitStack() as stack:
        found: list[Condition] = []
        for name, evaluate in (("with", True), ("without", False)):
            train = load_environment("calculator", levels=levels, evaluate=evaluate)
            if progress:
                train = replace(train, rewards={**train.rewards, "progress": partial(reached, weight=progress)})
            test = load_environment("calculator", levels="1-8", evaluate=evaluate)
            toolbox = await stack.enter_async_context(open_tools([SERVER], folder=".", only=train.tools, processes=processes))
            found.append(Condition(name, train, test, toolbox))
        yield found


async def play_demonstrations(
    conditions: Sequence[Condition], shares: Sequence[float] | None, *, count: int, seed: int
) -> list[Demonstration]:
    """As many of each condition, and as many of each level or by these `shares`, played over the real tools."""
    shown: list[Demonstration] = []
    for condition in conditions:
        everything = condition.train.split("train")
        order = pick(everything, step=0, count=len(everything), seed=seed)
        scenarios = first_of_each(order, count // len(conditions), shares)
        shown += await show_solutions(scenarios, environment=condition.train, toolbox=condition.toolbox)
    return shown


def first_of_each(scenarios: Sequence[Scenario], n: int, shares: Sequence[float] | None) -> list[Scenario]:
    """The first of every level, `n` in all, in these `shares` from the lowest level up; equal ones unless given."""
    by_level: dict[int, list[Scenario]] = defaultdict(list)
    for scenario in scenarios:
        by_level[scenario.level].append(scenario)
    weights = dict(zip(sorted(by_level), shares or [1.0] * len(by_level), strict=True))
    counts = allot({level: weight / sum(weights.values()) for level, weight in weights.items()}, n, offset=0.5)
    return [scenario for level, count in counts.items() for scenario in by_level[level][:count]]


def reached(trajectory: Trajectory, *, weight: float) -> float:
    """`weight` times the share of the question's steps whose result some tool gave; all of it where that of the last did.

    Without it a chain of five calls that goes wrong at the fourth is worth what a chain is that never began, and groups of long
    questions are ties until luck solves one.
    """
    assert trajectory.scenario is not None
    wanted = [SYMBOLS[step["name"]](*step["arguments"].values()) for step in trajectory.scenario.facts["steps"]]
    given = [float(use.result.structured["result"]) for use in trajectory.uses if use.result.structured]
    hits = [any(math.isclose(value, other, rel_tol=1e-9) for other in given) for value in wanted]
    return weight if hits[-1] else weight * sum(hits) / len(hits)


class Draw:
    """Which questions are played: the package's own curriculum for each condition, or a walk through its questions without."""

    def __init__(self, conditions: Sequence[Condition], *, seed: int, curriculum: bool) -> None:
        self._seed = seed
        self._questions = {condition.name: condition.train.split("train") for condition in conditions}
        self._curricula = {name: Curriculum(questions, seed) for name, questions in self._questions.items()}
        self._uniform = not curriculum
        self._step = 0
        self._noted: list[tuple[str, int, dict[str, list[int]]]] = []

    def shares(self, total: int, *, even: bool) -> list[int]:
        """How many of `total` questions each condition gets: as many, or by what there is to learn and a fifth at least."""
        weights = [sum(self._worths(name)) for name in self._curricula]
        least = total // (len(weights) if even else 5 * len(weights) // 2)
        rest = total - least * len(weights)
        counts = [least + int(rest * weight / sum(weights)) for weight in weights]
        counts[weights.index(max(weights))] += total - sum(counts)
        return counts

    def _levels(self, condition: str) -> list[int]:
        return sorted({scenario.level for scenario in self._questions[condition]})

    def _worths(self, condition: str) -> list[float]:
        """What a draw of each level is expected to teach."""
        return [self._curricula[condition].level_worth(level, self._step) for level in self._levels(condition)]

    def _rates(self, condition: str) -> dict[int, float]:
        """The solved rate that is expected of each level."""
        return {level: self._curricula[condition].level_rate(level, self._step) for level in self._levels(condition)}

    def pick(self, condition: Condition, *, step: int, count: int) -> list[Scenario]:
        if self._uniform:
            return pick(self._questions[condition.name], step=step, count=count, seed=self._seed)
        return self._curricula[condition.name].draw(step, count)

    def observe(self, condition: Condition, groups: Sequence[TrajectoryGroup], *, step: int) -> None:
        self._note(condition.name, step, outcomes_of(groups, condition.train))

    def _note(self, condition: str, step: int, outcomes: dict[str, list[int]]) -> None:
        self._step = step
        self._curricula[condition].note(step, outcomes)
        self._noted.append((condition, step, outcomes))

    def save(self, folder: Path) -> None:
        """Leaves what was noted beside a model, for a run that goes on from it."""
        (folder / NOTED).write_text(json.dumps(self._noted))

    def recall(self, folder: Path) -> None:
        """Takes in what a run noted that left a model there, if it did."""
        if (folder / NOTED).is_file():
            for condition, step, outcomes in json.loads((folder / NOTED).read_text()):
                self._note(condition, step, outcomes)

    def state(self) -> dict[str, float]:
        rates = {(name, level): rate for name in self._curricula for level, rate in self._rates(name).items()}
        return {f"{name}/{level}": round(rate, 3) for (name, level), rate in rates.items()}


async def play(
    conditions: Sequence[Condition],
    picked: Sequence[Sequence[Scenario]],
    *,
    model: TrainableModel[Any],
    rollouts: int,
    concurrency: int | Places,
    seed: int,
    step: int,
    temperature: float,
) -> list[list[TrajectoryGroup]]:
    """The groups of each condition, all played at the same time, `concurrency` rollouts of both."""
    found: list[list[TrajectoryGroup]] = [[] for _ in conditions]
    places = places_of(concurrency)

    async def one(place: int, condition: Condition) -> None:
        found[place] = await gather_trajectory_groups(
            picked[place],
            model=model,
            environment=condition.train,
            toolbox=condition.toolbox,
            rollouts=rollouts,
            concurrency=places,
            seed=seed,
            step=step,
            temperature=temperature,
        )

    async with anyio.create_task_group() as tasks:
        for place, condition in enumerate(conditions):
            tasks.start_soon(one, place, condition)
    return found


@dataclass(slots=True)
class Measured:
    """What an evaluation met, rollout by rollout; `solved` by scenario, for tests of pairs."""

    played: list[ScoredTrajectory] = field(default_factory=list[ScoredTrajectory])
    failed: int = 0
    seconds: float = 0.0
    first_failure: str = ""


async def measure(
    condition: Condition,
    *,
    model: TrainableModel[Any],
    levels: Sequence[int],
    each: int,
    temperature: float,
    concurrency: int,
    clock: Clock,
    reserve: float,
    keep: list[ScoredTrajectory] | None = None,
) -> dict[str, Any]:
    """Figures of `each` held-out questions of every level, asked once; fewer where time runs out (`cut` says how many).
    What was played is added to `keep`."""
    by_level = {level: [s for s in condition.test.split("test") if s.level == level][:each] for level in levels}
    asked = [scenario for row in zip(*by_level.values(), strict=True) for scenario in row]  # any beginning is a fair mix
    met = Measured()
    while asked and clock.left(reserve=reserve) > met.seconds / max(1, len(met.played)) * min(CHUNK, len(asked)):
        chunk, asked = asked[:CHUNK], asked[CHUNK:]
        began = time.monotonic()
        groups = await gather_trajectory_groups(
            chunk,
            model=model,
            environment=condition.test,
            toolbox=condition.toolbox,
            rollouts=1,
            concurrency=concurrency,
            temperature=temperature,
            step=-1,
        )
        met.seconds += time.monotonic() - began
        met.played += [one for group in groups for one in group.trajectories]
        failures = [failure for group in groups for failure in group.failures]
        met.failed += len(failures)
        met.first_failure = met.first_failure or (f"{failures[0].kind}: {failures[0].message}" if failures else "")
    if keep is not None:
        keep += met.played
    return figures(met, condition.test, cut=len(asked))


def figures(met: Measured, environment: Environment, *, cut: int) -> dict[str, Any]:
    if not met.played:
        return {"n": 0, "cut": cut, "failed": met.failed, "first_failure": met.first_failure}
    found = evaluation(met.played, environment, failed=met.failed).to_json()
    solved = {one.trajectory.scenario.id: environment.solved(one) for one in met.played if one.trajectory.scenario}
    main = [
        solved[one.trajectory.scenario.id]
        for one in met.played
        if one.trajectory.scenario and one.trajectory.scenario.level <= 5
    ]
    uses = [use for one in met.played for use in one.trajectory.uses]
    strict = sum(not isinstance(use.call, Malformed) and not use.call.lenient for use in uses)
    reasons = [one.trajectory.stop_reason.value for one in met.played]
    return {
        "levels_1_5": {"solved": sum(main) / max(1, len(main)), "n": len(main), "ci95": wilson(sum(main), max(1, len(main)))},
        **found,
        "cut": cut,
        "first_failure": met.first_failure,
        "calls_begun": len(uses),
        "valid_tool_call_rate": strict / len(uses) if uses else None,
        "rollouts_without_a_call": sum(not one.trajectory.uses for one in met.played) / len(met.played),
        "stop_reasons": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "sampled_tokens": sum(one.trajectory.policy_tokens for one in met.played),
        "seconds": round(met.seconds, 2),
        "solved_ids": bits_by_level(met.played, environment),
    }


def bits_by_level(played: Sequence[ScoredTrajectory], environment: Environment) -> dict[str, str]:
    """For each level one character a question, in the order of the split: 1 solved, 0 not; for tests of pairs."""
    rows: dict[str, dict[int, str]] = defaultdict(dict)
    for one in played:
        scenario = one.trajectory.scenario
        if scenario is not None:
            rows[str(scenario.level)][int(scenario.id.rpartition("-")[2])] = "01"[environment.solved(one)]
    return {level: "".join(row.get(place, ".") for place in range(max(row) + 1)) for level, row in sorted(rows.items())}
