"""From scored trajectories to the samples that a trainer sees, token for token as they were sampled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from art_mcp.core.advantage import group_advantages
from art_mcp.errors import TrainError
from art_mcp.types import Sample, Span, TrainConfig, Trajectory, TrajectoryGroup


def make_samples(groups: Sequence[TrajectoryGroup], config: TrainConfig, *, step: int) -> list[Sample]:
    """One sample for each trajectory of each group, zero advantages included: their tokens count in the normalisation. What the
    clock ended is left out (as by TRL's `mask_truncated_completions`); where that is all, the samples are such that the step
    changes nothing.

    Raises TrainError where every rollout failed, with the first failure, and for a trajectory without spans (a remote
    model's): nothing can be learned from either. So it does for one that was sampled at another temperature than
    `config.temperature`, at which its log probabilities would mean something else.
    """
    check_alive(groups)
    check_temperature(groups, config.temperature)
    samples: list[Sample] = []
    for group, advantages in zip(groups, group_advantages(groups, config, step=step), strict=True):
        for scored in group.trajectories:
            trajectory = scored.trajectory
            if trajectory.rollout_id in advantages:
                samples.append(make_sample(trajectory, advantages[trajectory.rollout_id]))
    return samples or [make_sample(scored.trajectory, 0.0) for group in groups for scored in group.trajectories]


def check_alive(groups: Sequence[TrajectoryGroup]) -> None:
    """Raises TrainError where no rollout was played to its end."""
    if not any(group.trajectories for group in groups):
        failures = [failure for group in groups for failure in group.failures]
        if not failures:
            raise TrainError("there is nothing to train on: no group has a rollout")
        raise TrainError(f"every rollout failed, first with {failures[0].kind}: {failures[0].message}")


def check_temperature(groups: Sequence[TrajectoryGroup], trained: float) -> None:
    for trajectory in (scored.trajectory for group in groups for scored in group.trajectories):
        sampled = trajectory.temperature
        if sampled is not None and sampled != trained:
            remedy = f"train with TrainConfig(temperature={sampled:g})" if sampled else "sample at a temperature above 0"
            raise TrainError(
                f"rollout {trajectory.rollout_id!r} was sampled at temperature {sampled:g} and is trained at {trained:g}, "
                f"where its log probabilities are not those of its tokens: {remedy}"
            )


def make_sample(trajectory: Trajectory, advantage: float) -> Sample:
    """The trajectory's tokens, which of them the policy sampled, and their logprobs when sampled (0.0 elsewhere)."""
    if not any(span.logprobs is not None for span in trajectory.spans):
        raise TrainError(
            f"rollout {trajectory.rollout_id!r} has no sampled tokens (a remote model's has none): "
            "train on rollouts of a TrainableModel"
        )
    token_ids, trainable, logprobs = spread(trajectory.spans)
    return Sample(token_ids, trainable, logprobs, advantage)


def spread(spans: Iterable[Span]) -> tuple[tuple[int, ...], tuple[bool, ...], tuple[float, ...]]:
    token_ids: list[int] = []
    trainable: list[bool] = []
    logprobs: list[float] = []
    for span in spans:
        token_ids.extend(span.token_ids)
        trainable.extend([span.logprobs is not None] * len(span.token_ids))
        logprobs.extend(span.logprobs or [0.0] * len(span.token_ids))
    return tuple(token_ids), tuple(trainable), tuple(logprobs)


def demonstration(spans: Sequence[tuple[Sequence[int], bool]]) -> Sample:
    """A sample to imitate, from (token ids, whether the policy is to learn them): no logprobs, so only the supervised
    objective accepts it."""
    token_ids = tuple(token for tokens, _ in spans for token in tokens)
    trainable = tuple(learn for tokens, learn in spans for _ in tokens)
    return Sample(token_ids, trainable, None, 1.0)


def common_prefix(samples: Sequence[Sample]) -> int:
    """How many leading tokens all samples share and none of them trains on."""
    if not samples:
        return 0
    first = min((sample.token_ids for sample in samples), key=len)
    length = min(next((i for i, on in enumerate(sample.trainable) if on), len(first)) for sample in samples)
    for sample in samples:
        while sample.token_ids[:length] != first[:length]:
            length = next(i for i in range(length) if sample.token_ids[i] != first[i])
    return max(0, length - 1)
