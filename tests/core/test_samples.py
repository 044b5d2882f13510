"""From trajectories to samples: token for token as they were sampled."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from art_mcp.core.samples import common_prefix, demonstration, make_sample, make_samples
from art_mcp.core.seeds import seed_of
from art_mcp.errors import TrainError
from art_mcp.types import FailedRollout, Sample, Span, StopReason, TrainConfig, Trajectory, TrajectoryGroup

SPANS = (
    Span((10, 11, 12)),
    Span((20, 21), (-0.1, -0.2), 3),
    Span((13,)),
    Span((22,), (-0.3,), 4),
)


def trajectory(rollout="r", spans=SPANS, reason=StopReason.ANSWERED):
    return Trajectory(None, rollout, (), spans, reason)


def late(rollout, reward):
    return trajectory(rollout, reason=StopReason.TIME_LIMIT).scored(reward)


def test_a_sample_is_the_spans_as_they_were_sampled():
    assert make_sample(trajectory(), 0.5) == Sample(
        token_ids=(10, 11, 12, 20, 21, 13, 22),
        trainable=(False, False, False, True, True, False, True),
        logprobs=(0.0, 0.0, 0.0, -0.1, -0.2, 0.0, -0.3),
        advantage=0.5,
    )


def test_every_trajectory_becomes_a_sample_even_without_signal():
    tied = TrajectoryGroup((trajectory("a").scored(1.0), trajectory("b").scored(1.0)))
    split = TrajectoryGroup((trajectory("c").scored(1.0), trajectory("d").scored(0.0), trajectory("d").scored(0.0)))
    samples = make_samples([tied, split], TrainConfig(), step=0)
    assert [sample.advantage for sample in samples] == [0.0, 0.0, 0.5, -0.5, -0.5]


def test_nothing_is_learned_from_what_the_clock_ended_and_its_tokens_do_not_count():
    group = TrajectoryGroup((trajectory("a").scored(1.0), late("b", 0.0), trajectory("c").scored(0.0)))
    gone = TrajectoryGroup((late("d", 1.0), late("e", 0.0)))
    samples = make_samples([group, gone], TrainConfig(), step=0)
    assert [sample.advantage for sample in samples] == [0.5, -0.5]
    assert samples == make_samples([TrajectoryGroup(group.compared)], TrainConfig(), step=0)


@pytest.mark.parametrize(
    ("sampled", "told"),
    [
        (0.5, r"rollout 'b' was sampled at temperature 0.5 and is trained at 1, .*TrainConfig\(temperature=0.5\)"),
        (0.0, "sample at a temperature above 0"),
    ],
)
def test_what_was_sampled_at_another_temperature_is_not_trained_on(sampled, told):
    cold = replace(trajectory("b"), temperature=sampled)
    group = TrajectoryGroup((replace(trajectory("a"), temperature=1.0).scored(1.0), cold.scored(0.0)))
    with pytest.raises(TrainError, match=told):
        make_samples([group], TrainConfig(), step=0)
    unknown = TrajectoryGroup((trajectory("a").scored(1.0), trajectory("b").scored(0.0)))
    assert len(make_samples([unknown], TrainConfig(temperature=0.7), step=0)) == 2


def test_a_batch_that_the_clock_ended_altogether_is_a_step_without_a_signal():
    gone = TrajectoryGroup((late("d", 1.0), late("e", 0.0)))
    assert [sample.advantage for sample in make_samples([gone], TrainConfig(), step=0)] == [0.0, 0.0]


def test_where_every_rollout_failed_there_is_nothing_to_learn_from_and_the_first_failure_is_told():
    failed = TrajectoryGroup((), (FailedRollout("r", "RewardError", "reward 'r' gave nan"), FailedRollout("s", "B", "later")))
    with pytest.raises(TrainError, match="every rollout failed, first with RewardError: reward 'r' gave nan"):
        make_samples([TrajectoryGroup(()), failed], TrainConfig(), step=0)
    for nothing in ([], [TrajectoryGroup(())]):
        with pytest.raises(TrainError, match="no group has a rollout"):
            make_samples(nothing, TrainConfig(), step=0)
    assert len(make_samples([failed, TrajectoryGroup((trajectory().scored(0.0),))], TrainConfig(), step=0)) == 1


@pytest.mark.parametrize("spans", [(), (Span((1, 2)),)])
def test_what_was_not_sampled_here_cannot_be_learned_from(spans):
    with pytest.raises(TrainError, match="'r' has no sampled tokens"):
        make_sample(trajectory(spans=spans), 1.0)


def test_a_demonstration_has_no_log_probabilities():
    sample = demonstration([((1, 2), False), ((3, 4), True)])
    assert sample == Sample((1, 2, 3, 4), (False, False, True, True), None, 1.0)


def make(prompt, sampled):
    return demonstration([(prompt, False), (sampled, True)])


@pytest.mark.parametrize(
    ("samples", "length"),
    [
        ([], 0),
        ([make([1, 2, 3], [4])], 2),
        ([make([1, 2, 3], [4]), make([1, 2, 3], [5])], 2),
        ([make([1, 2, 3, 4], [9]), make([1, 2, 7], [9])], 1),
        ([make([1, 2], [3, 4]), make([1, 2, 3, 4, 5], [6])], 1),
        ([make([1], [2]), make([1, 2, 3], [4])], 0),
        ([make([1, 2], [3]), make([9, 2], [3])], 0),
        ([make([], [1, 2])], 0),
        ([make([1, 2, 3], [])], 2),
    ],
)
def test_the_common_prefix_stops_before_what_differs_and_before_what_is_learned(samples, length):
    assert common_prefix(samples) == length


rows = st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), max_size=3)), min_size=1)


@given(rows)
def test_what_follows_a_common_prefix_has_a_token_before_each_one_learned(pairs):
    samples = [make([0, *prompt], sampled) for prompt, sampled in pairs]
    length = common_prefix(samples)
    assert len({sample.token_ids[:length] for sample in samples}) == 1
    for sample in samples:
        assert len(sample.token_ids) > length
        assert not any(sample.trainable[: length + 1])


def test_seeds_depend_on_every_part_of_the_key_and_on_nothing_else():
    assert seed_of(0, 5, "q", 1, 2) == 8308028686857133147
    keys = [(seed, step, name, rollout) for seed in range(3) for step in range(3) for name in "ab" for rollout in range(3)]
    assert len({seed_of(*key) for key in keys}) == len(keys)
    assert all(0 <= seed_of(*key) < 2**63 for key in keys)
    assert seed_of("a", "bc") != seed_of("ab", "c")
