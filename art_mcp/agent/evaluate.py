"""How good a policy is on a split: solved rate with its interval, overall and by level. Nothing is trained here."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from art_mcp.agent.group import gather_trajectory_groups
from art_mcp.agent.trace import traced
from art_mcp.environment import Environment
from art_mcp.errors import RolloutError
from art_mcp.model import Model
from art_mcp.ports import Progress, Toolboxes, Tracer
from art_mcp.types import FailedRollout, Malformed, Scenario, ScoredTrajectory, Usage

Z95 = 1.959964


@dataclass(frozen=True, slots=True)
class Level:
    """The figures of one level of difficulty."""

    solved: float
    ci95: tuple[float, float]
    n: int
    turns_mean: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """`solved` is a share of the `n` rollouts that the world did not break (`failed` counts those it did, `first_failure` tells
    of the first of them); `ci95` its Wilson interval; `malformed_rate` a share of the calls begun, `tool_error_rate` of the
    calls made; `usage` what a remote model's endpoint counted, failed rollouts included."""

    solved: float
    ci95: tuple[float, float]
    reward: float
    n: int
    failed: int
    malformed_rate: float
    tool_error_rate: float
    turns_mean: float
    by_level: dict[str, Level]
    usage: Usage | None = None
    first_failure: str = ""

    def to_json(self) -> dict[str, Any]:
        """As it comes back from a file: intervals are lists."""
        return json.loads(json.dumps(asdict(self)))


async def evaluate(
    model: Model[Any],
    environment: Environment,
    *,
    toolbox: Toolboxes,
    split: str = "test",
    n: int = 1000,
    temperature: float = 0.0,
    seed: int = 0,
    concurrency: int = 128,
    progress: Progress | None = None,
    tracer: Tracer | None = None,
    hopeless_after: int | None = None,
) -> Evaluation:
    """Plays `n` scenarios of `split` once each, the same number from every level, with a TrainableModel or a remote Model.

    The draws depend on `seed` alone, so that two policies are asked the same questions with the same random numbers. Where the
    first `hopeless_after` are all played and none is solved, it ends with them. Raises RolloutError where the world broke every
    rollout.
    """
    tracer = tracer or model.tracer
    scenarios = balanced(environment.split(split), n)
    scored: list[ScoredTrajectory] = []
    failures: list[FailedRollout] = []
    with traced(tracer, "evaluation", environment=environment.name, split=split, n=len(scenarios)) as tell:
        for part in parted(scenarios, hopeless_after):
            groups = await gather_trajectory_groups(
                part,
                model=model,
                environment=environment,
                toolbox=toolbox,
                rollouts=1,
                concurrency=concurrency,
                temperature=temperature,
                seed=seed,
                step=-1,
                progress=progress,
                tracer=tracer,
            )
            scored.extend(one for group in groups for one in group.trajectories)
            failures.extend(failure for group in groups for failure in group.failures)
            if not failures and not any(map(environment.solved, scored)):
                break
        if not scored:
            raise RolloutError(f"none of {len(failures)} rollouts could be played, first with {first_of(failures)}")
        usage = total_usage([*(one.trajectory.usage for one in scored), *(failure.usage for failure in failures)])
        found = evaluation(scored, environment, failed=len(failures), usage=usage)
        found = replace(found, first_failure=first_of(failures))
        tell(found.to_json())
    return found


def first_of(failures: Sequence[FailedRollout]) -> str:
    return f"{failures[0].kind}: {failures[0].message}" if failures else ""


def parted(scenarios: Sequence[Scenario], first: int | None) -> list[Sequence[Scenario]]:
    """The `first` of them, as many from every level, and the others; or all at once."""
    if first is None or first >= len(scenarios):
        return [scenarios]
    begin = balanced(scenarios, first)
    chosen = set(map(id, begin))
    return [begin, [one for one in scenarios if id(one) not in chosen]]


def evaluation(
    scored: Sequence[ScoredTrajectory], environment: Environment, *, failed: int, usage: Usage | None = None
) -> Evaluation:
    """The figures of rollouts that were played."""
    levels = sorted({level_of(one) for one in scored})
    solved = [environment.solved(one) for one in scored]
    uses = [use for one in scored for use in one.trajectory.uses]
    made = sum(not isinstance(use.call, Malformed) for use in uses)
    return Evaluation(
        solved=fmean(solved),
        ci95=wilson(sum(solved), len(solved)),
        reward=fmean([one.reward for one in scored]),
        n=len(scored),
        failed=failed,
        malformed_rate=(len(uses) - made) / max(1, len(uses)),
        tool_error_rate=sum(one.trajectory.tool_errors for one in scored) / max(1, made),
        turns_mean=fmean([one.trajectory.turns for one in scored]),
        by_level={str(level): figures([one for one in scored if level_of(one) == level], environment) for level in levels},
        usage=usage,
    )


def total_usage(usages: Sequence[Usage | None]) -> Usage | None:
    """The sum of what was counted; None where nothing was."""
    counted = [usage for usage in usages if usage is not None]
    return sum(counted, Usage()) if counted else None


def figures(scored: Sequence[ScoredTrajectory], environment: Environment) -> Level:
    solved = [environment.solved(one) for one in scored]
    turns = fmean([one.trajectory.turns for one in scored])
    return Level(fmean(solved), wilson(sum(solved), len(solved)), len(scored), turns)


def level_of(scored: ScoredTrajectory) -> int:
    scenario = scored.trajectory.scenario
    return scenario.level if scenario else 0


def balanced(scenarios: Sequence[Scenario], n: int) -> list[Scenario]:
    """The first `n` (1 or more) scenarios, as many from every level as from the others; all there are where a level has
    fewer."""
    levels: dict[int, list[Scenario]] = {}
    for scenario in scenarios:
        levels.setdefault(scenario.level, []).append(scenario)
    each, more = divmod(n, len(levels))
    shares = [each + (place < more) for place in range(len(levels))]
    return [scenario for share, level in zip(shares, sorted(levels), strict=True) for scenario in levels[level][:share]]


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927): within [0, 1] also at the edges."""
    share, z2 = successes / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)
