"""Credit assignment, against numbers made by hand."""

import math
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from art_mcp.core.advantage import advantages, group_advantages, rewards_by_rollout, shuffled
from art_mcp.errors import TrainError
from art_mcp.types import FailedRollout, Span, StopReason, TrainConfig, Trajectory, TrajectoryGroup

PLAIN = TrainConfig()


def scored(rollout, reward, reason=StopReason.ANSWERED):
    spans = (Span((1, 2)), Span((3,), (-0.5,), 0))
    return Trajectory(None, rollout, (), spans, reason).scored(reward)


def late(rollout, reward=0.0):
    return scored(rollout, reward, StopReason.TIME_LIMIT)


def make_group(*rewards, failed=0, name="q"):
    rollouts = tuple(scored(f"{name}/{number}", reward) for number, reward in enumerate(rewards))
    return TrajectoryGroup(rollouts, tuple(FailedRollout(f"{name}/x{n}", "EngineError", "") for n in range(failed)))


def test_the_advantage_is_the_reward_less_the_groups_mean():
    assert advantages([1.0, 0.0, 0.0, 1.0]) == [0.5, -0.5, -0.5, 0.5]
    assert advantages([3.0, 0.0, 0.0]) == [2.0, -1.0, -1.0]


def test_leave_one_out_compares_with_the_mean_of_the_others():
    assert advantages([1.0, 0.0, 0.0], leave_one_out=True) == [1.0, -0.5, -0.5]
    assert advantages([4.0, 2.0], leave_one_out=True) == [2.0, -2.0]


def test_scaling_divides_by_the_groups_deviation():
    assert advantages([3.0, 1.0], scale=True) == [1.0, -1.0]
    assert advantages([10.0, 0.0, 0.0, 0.0], scale=True) == pytest.approx([3**0.5] + [-(3**-0.5)] * 3)
    assert advantages([4.0, 2.0], leave_one_out=True, scale=True) == [2.0, -2.0]


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("rewards", [[], [1.0], [0.3] * 8, [0.1 + 0.2, 0.3], [1.0, 1.0 + 1e-6]])
def test_equal_rewards_give_no_signal_at_all(rewards, leave_one_out, scale):
    assert advantages(rewards, leave_one_out=leave_one_out, scale=scale) == [0.0] * len(rewards)


def test_rewards_that_differ_by_more_than_a_rounding_error_do():
    assert advantages([0.0, 2e-6]) == pytest.approx([-1e-6, 1e-6])
    assert advantages([0.0, 2e-6], scale=True) == pytest.approx([-1.0, 1.0])


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=16), st.booleans(), st.booleans())
def test_advantages_of_a_group_add_up_to_nothing(rewards, leave_one_out, scale):
    values = advantages(rewards, leave_one_out=leave_one_out, scale=scale)
    assert math.isclose(math.fsum(values), 0.0, abs_tol=1e-6 * max(1.0, *map(abs, values)))
    assert sorted(range(len(rewards)), key=rewards.__getitem__) == sorted(
        range(len(rewards)), key=lambda i: (values[i], rewards[i])
    )


def test_branches_of_one_rollout_count_once():
    group = TrajectoryGroup((scored("a", 1.0), scored("a", 1.0), scored("a", 1.0), scored("b", 0.0)))
    assert group_advantages([group], PLAIN, step=0) == [{"a": 0.5, "b": -0.5}]


def test_branches_of_one_rollout_cannot_have_two_rewards():
    group = TrajectoryGroup((scored("a", 1.0), scored("a", 0.0)))
    with pytest.raises(TrainError, match=r"rollout 'a' has the rewards 1.0 and 0.0"):
        group_advantages([group], PLAIN, step=0)


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_no_number_is_refused(reward):
    with pytest.raises(TrainError, match=r"the reward of rollout 'q/1' is (nan|inf)"):
        group_advantages([make_group(1.0, reward)], PLAIN, step=0)


def test_failed_rollouts_are_left_out_of_the_baseline():
    assert group_advantages([make_group(1.0, 0.0, failed=6)], PLAIN, step=0) == [{"q/0": 0.5, "q/1": -0.5}]
    assert group_advantages([make_group(failed=3)], PLAIN, step=0) == [{}]


@pytest.mark.parametrize("config", [PLAIN, PLAIN.with_(baseline="leave_one_out"), PLAIN.with_(scale_advantages=True)])
def test_what_the_clock_ended_is_in_no_baseline_and_has_no_advantage(config):
    group = TrajectoryGroup((scored("a", 1.0), late("b"), scored("c", 0.0), late("d", 1.0)))
    without = TrajectoryGroup((scored("a", 1.0), scored("c", 0.0)))
    assert group_advantages([group], config, step=0) == group_advantages([without], config, step=0)
    alone = TrajectoryGroup((late("a"), scored("b", 1.0), late("c")))
    assert group_advantages([alone, TrajectoryGroup((late("d"), late("e", 1.0)))], config, step=0) == [{"b": 0.0}, {}]


def test_a_rollout_of_which_one_branch_ran_out_of_time_is_not_compared():
    group = TrajectoryGroup((late("a", 1.0), scored("a", 1.0), scored("b", 0.0)))
    assert group_advantages([group], PLAIN, step=0) == [{"b": 0.0}]
    assert [one.trajectory.rollout_id for one in group.rollouts] == ["a", "b"]


def test_the_control_deals_out_no_reward_of_what_the_clock_ended():
    groups = [TrajectoryGroup((scored("a", 0.0), late("b", 1.0))), TrajectoryGroup((scored("c", 0.0), late("d", 1.0)))]
    for step in range(20):
        assert group_advantages(groups, TrainConfig(control="shuffled"), step=step) == [{"a": 0.0}, {"c": 0.0}]


def test_the_configuration_chooses_the_baseline_and_the_scale():
    group = make_group(4.0, 2.0)
    for config, wanted in (
        (PLAIN, 1.0),
        (PLAIN.with_(baseline="leave_one_out"), 2.0),
        (PLAIN.with_(scale_advantages=True), 1.0),
        (PLAIN.with_(baseline="leave_one_out", scale_advantages=True), 2.0),
    ):
        assert group_advantages([group], config, step=3) == [{"q/0": wanted, "q/1": -wanted}]


BATCH = [make_group(*(float(8 * number + place) for place in range(8)), name=f"q{number}") for number in range(4)]
CONTROL = TrainConfig(control="shuffled")


def test_the_shuffled_control_deals_the_rewards_of_the_whole_batch_anew():
    rewards = [rewards_by_rollout(group) for group in BATCH]
    dealt = shuffled(rewards, "a seed")
    assert [list(group) for group in dealt] == [list(group) for group in rewards]
    values = [[*group.values()] for group in dealt]
    assert sorted(chain.from_iterable(values)) == [float(number) for number in range(32)]
    own = [sum(8 * number <= value < 8 * number + 8 for value in group) for number, group in enumerate(values)]
    assert max(own) < 8  # rewards move between groups, not only within them
    assert len({shuffled(rewards, seed)[0]["q0/0"] for seed in map(str, range(20))}) > 5


def test_seed_and_step_alone_decide_the_permutation():
    first = group_advantages(BATCH, CONTROL, step=0)
    assert group_advantages(BATCH, CONTROL, step=0) == first
    assert group_advantages(BATCH, CONTROL, step=1) != first
    assert group_advantages(BATCH, CONTROL.with_(seed=1), step=0) != first
    assert group_advantages(BATCH, PLAIN, step=0) != first
    assert [list(group) for group in first] == [list(rewards_by_rollout(group)) for group in BATCH]


def test_the_control_gives_a_tied_group_the_signal_of_others():
    tied, split = make_group(1.0, 1.0, name="a"), make_group(0.0, 0.0, name="b")
    seen = [any(group_advantages([tied, split], CONTROL, step=step)[0].values()) for step in range(20)]
    assert {True, False} == set(seen)
