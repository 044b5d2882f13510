"""The training loop: pick scenarios, roll out, train, record; and from where a stopped run goes on."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from time import monotonic
from typing import Any

import anyio

from art_mcp.agent.group import gather_trajectory_groups
from art_mcp.environment import Environment
from art_mcp.errors import TrainError
from art_mcp.model import TrainableModel
from art_mcp.ports import Progress, Recorder, Toolbox
from art_mcp.types import Scenario, TrainConfig, TrajectoryGroup


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to train: `groups` scenarios a step, each played `rollouts` times, until `steps` or `seconds` are spent.

    `save_every`: steps between checkpoints (0: only at the end). `seed` keys every draw of the run.
    """

    steps: int | None = None
    seconds: float | None = None
    groups: int = 16
    rollouts: int = 8
    concurrency: int = 128
    save_every: int = 50
    seed: int = 0
    split: str = "train"


Save = Callable[[int], Awaitable[None]]


async def train_loop(
    model: TrainableModel[Any],
    environment: Environment,
    *,
    toolbox: Toolbox,
    plan: Plan,
    config: TrainConfig,
    recorder: Recorder,
    save: Save,
    progress: Progress | None = None,
    spent: float = 0.0,
) -> float:
    """Trains from the model's current step on; returns the seconds spent, `spent` before a resume included.

    A checkpoint is saved every `plan.save_every` steps and when the loop ends, also by an error or a cancellation, which
    waits for a training step that has begun. Raises TrainError when every rollout of a step failed, with the first failure.
    """
    began = monotonic() - spent
    scenarios = environment.split(plan.split)
    step = await model.get_step()
    saved = step or None  # a model that has taken steps comes from a checkpoint
    try:
        while (plan.steps is None or step < plan.steps) and (plan.seconds is None or monotonic() - began < plan.seconds):
            started = monotonic()
            groups = await gather_trajectory_groups(
                pick(scenarios, step=step, count=plan.groups, seed=plan.seed),
                model=model,
                environment=environment,
                toolbox=toolbox,
                rollouts=plan.rollouts,
                concurrency=plan.concurrency,
                temperature=config.temperature,
                seed=plan.seed,
                step=step,
                progress=progress,
            )
            check_alive(groups)
            with anyio.CancelScope(shield=True):  # a step that is trained but not recorded would be missing from the run
                await learn(model, groups, config=config, recorder=recorder, began=began, started=started)
            step += 1
            if plan.save_every and step % plan.save_every == 0:
                await save(step)
                saved = step
    finally:
        with anyio.CancelScope(shield=True):
            if saved != step and await model.get_step() == step:
                await save(step)
    return monotonic() - began


async def learn(
    model: TrainableModel[Any],
    groups: Sequence[TrajectoryGroup],
    *,
    config: TrainConfig,
    recorder: Recorder,
    began: float,
    started: float,
) -> None:
    """The second half of a step, which `started` then: trains on its groups and records it."""
    step = await model.get_step()
    rolled = monotonic()
    metrics = await model.train(groups, config=config)
    trained = monotonic()
    seconds = {"seconds_rollout": rolled - started, "seconds_train": trained - rolled, "seconds_total": trained - began}
    recorder.groups(step, groups)
    recorder.metrics(step, {**summarize(groups), **metrics, **seconds})


def pick(scenarios: Sequence[Scenario], *, step: int, count: int, seed: int) -> list[Scenario]:
    """The scenarios of `step`: a walk through the split, shuffled anew for each pass; the step alone is the cursor."""
    first, size = step * count, len(scenarios)
    laps = range(first // size, (first + count - 1) // size + 1)
    walk = [place for lap in laps for place in shuffled_order(size, seed, lap)]
    start = first - laps[0] * size
    return [scenarios[place] for place in walk[start : start + count]]


def shuffled_order(count: int, seed: int, lap: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}:{lap}:order").shuffle(order)
    return order


def check_alive(groups: Sequence[TrajectoryGroup]) -> None:
    failures = [failure for group in groups for failure in group.failures]
    if not any(group.trajectories for group in groups):
        first = f", first with {failures[0].kind}: {failures[0].message}" if failures else ": none was asked for"
        raise TrainError(f"every rollout failed{first}")


def summarize(groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """Means over a step's rollouts: reward and its parts, turns, calls, tokens; and how many failed."""
    scored = [one for group in groups for one in group.trajectories]
    played = [one.trajectory for one in scored]
    names = sorted({name for one in scored for name in one.parts})
    return {
        "reward": fmean([one.reward for one in scored]),
        **{f"reward/{name}": fmean([one.parts.get(name, 0.0) for one in scored]) for name in names},
        "turns": fmean([trajectory.turns for trajectory in played]),
        "tool_calls": float(sum(len(trajectory.uses) for trajectory in played)),
        "malformed": float(sum(trajectory.malformed for trajectory in played)),
        "tool_errors": float(sum(trajectory.tool_errors for trajectory in played)),
        "sampled_tokens": float(sum(trajectory.policy_tokens for trajectory in played)),
        "rollouts": float(len(scored)),
        "failed_rollouts": float(sum(len(group.failures) for group in groups)),
    }
