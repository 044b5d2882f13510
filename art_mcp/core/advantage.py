"""Credit assignment: from the rewards of groups to the advantages of samples. Pure arithmetic, no tensors."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from art_mcp.errors import TrainError
from art_mcp.types import TrainConfig, TrajectoryGroup

TIE = 1e-6
"""Rewards that differ by no more than this are equal: their group carries no signal."""


def advantages(rewards: Sequence[float], *, leave_one_out: bool = False, scale: bool = False) -> list[float]:
    """Each reward less its baseline: the group's mean (GRPO, arXiv:2402.03300), or the mean of the others (RLOO,
    arXiv:2402.14740). With `scale`, divided by the group's population standard deviation, as GRPO first had it.

    All zero where the rewards are equal up to `TIE`, which is tested before any division.
    """
    if not rewards or max(rewards) - min(rewards) <= TIE:
        return [0.0] * len(rewards)
    count, total = len(rewards), math.fsum(rewards)
    if leave_one_out:
        centred = [reward - (total - reward) / (count - 1) for reward in rewards]
    else:
        centred = [reward - total / count for reward in rewards]
    if not scale:
        return centred
    deviation = math.sqrt(math.fsum((reward - total / count) ** 2 for reward in rewards) / count)
    return [value / deviation for value in centred]


def rewards_by_rollout(group: TrajectoryGroup) -> dict[str, float]:
    """One reward for each rollout that is compared: the branches of a conversation share theirs, so they count once in the
    mean.

    Raises TrainError for a reward that is no finite number, and for branches of one rollout whose rewards differ.
    """
    rewards: dict[str, float] = {}
    for scored in group.trajectories:
        name, reward = scored.trajectory.rollout_id, scored.reward
        if not math.isfinite(reward):
            raise TrainError(f"the reward of rollout {name!r} is {reward}: rewards must be finite numbers")
        if rewards.setdefault(name, reward) != reward:
            raise TrainError(
                f"rollout {name!r} has the rewards {rewards[name]} and {reward}: branches of one rollout share one reward, "
                "and different rollouts need different ids"
            )
    return {one.trajectory.rollout_id: rewards[one.trajectory.rollout_id] for one in group.compared}


def group_advantages(groups: Sequence[TrajectoryGroup], config: TrainConfig, *, step: int) -> list[dict[str, float]]:
    """For each group, the advantage of each of its rollouts that are compared, by id. With `control="shuffled"` the rewards of
    the whole batch are first dealt out anew, keyed by (seed, step): a run that must learn nothing."""
    rewards = [rewards_by_rollout(group) for group in groups]
    if config.control == "shuffled":
        rewards = shuffled(rewards, f"{config.seed}:{step}:control")
    options = {"leave_one_out": config.baseline == "leave_one_out", "scale": config.scale_advantages}
    return [dict(zip(group, advantages(list(group.values()), **options), strict=True)) for group in rewards]


def shuffled(groups: Sequence[dict[str, float]], seed: str) -> list[dict[str, float]]:
    """The same rollouts with the rewards of all groups permuted among them."""
    values = [value for group in groups for value in group.values()]
    random.Random(seed).shuffle(values)
    dealt = iter(values)
    return [{rollout: next(dealt) for rollout in group} for group in groups]
