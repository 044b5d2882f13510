"""What a curriculum draws: levels and scenarios that are solved neither always nor never, the same again after a resume."""

import json
import random
from collections import Counter
from dataclasses import replace

import pytest

from art_mcp.agent.curriculum import FLOOR, Curriculum, Tally, allot, outcomes_of, recalled, solved_shares
from art_mcp.agent.loop import Plan, pick, train_loop
from art_mcp.types import FailedRollout, Scenario, Span, StopReason, TrainConfig, Trajectory, TrajectoryGroup
from tests.agent.players import Obedient, Playhouse, desk_tools, environment, obedient, scenario

pytestmark = pytest.mark.anyio

LEVELS = [Scenario(f"{level}-{number}", "", level) for number in range(40) for level in (1, 2, 3)]


def taught(rates, *, steps=10, **options):
    """A curriculum that saw a scenario of every level solved at its rate, step by step."""
    curriculum = Curriculum(LEVELS, **options)
    for step in range(steps):
        curriculum.note(step, {f"{level}-{step}": (round(rate * 8), 8) for level, rate in rates.items()})
    return curriculum


def test_levels_that_are_always_or_never_solved_are_drawn_seldom_and_none_is_forgotten():
    solved, counts = {1: 8, 2: 4, 3: 0}, Counter()
    curriculum = Curriculum(LEVELS)
    for step in range(60):
        drawn = curriculum.draw(step, 8)
        curriculum.note(step, {one.id: (solved[one.level], 8) for one in drawn})
        counts.update(one.level for one in drawn if step >= 10)
    assert counts[2] > 0.7 * counts.total()
    assert min(counts[1], counts[3]) >= FLOOR / 3 * counts.total()
    assert sum(curriculum.shares(10).values()) == pytest.approx(1)
    assert all(share >= FLOOR / 3 for share in curriculum.shares(10).values())


def test_before_anything_is_known_the_levels_have_equal_shares():
    assert list(Curriculum(LEVELS).shares(0).values()) == pytest.approx([1 / 3] * 3)


def test_a_level_comes_back_when_it_begins_to_be_solved():
    curriculum = taught({1: 1.0, 2: 1.0, 3: 0.0}, steps=20)
    before = curriculum.shares(20)[3]
    for step in range(20, 26):
        curriculum.note(step, {"3-1": (3, 8), "1-1": (8, 8)})
    assert curriculum.shares(26)[3] > 2 * before
    assert curriculum.shares(26)[3] > curriculum.shares(26)[1]


def test_within_a_level_scenarios_with_mixed_outcomes_come_before_settled_ones():
    curriculum = Curriculum([one for one in LEVELS if one.level == 1])
    settled = {f"1-{number}": (8 * (number % 2), 8) for number in range(20)}
    mixed = {f"1-{number}": (4, 8) for number in range(20, 40)}
    curriculum.note(0, settled | mixed)
    counts = Counter(one.id for step in range(1, 21) for one in curriculum.draw(step, 10))
    assert sum(counts[name] for name in mixed) > 1.7 * sum(counts[name] for name in settled) > 0
    long_after = Counter(one.id for step in range(500, 540) for one in curriculum.draw(step, 10))
    assert sum(long_after[name] for name in mixed) < 1.4 * sum(long_after[name] for name in settled)


def test_a_level_of_scenarios_that_are_always_or_never_solved_teaches_nothing_at_a_solved_rate_of_one_half():
    curriculum = Curriculum(LEVELS)
    for step in range(20):
        settled = {f"1-{number}": (8 * (number % 2), 8) for number in range(step, step + 2)}
        curriculum.note(step, settled | {f"2-{step}": (4, 8), f"2-{step + 1}": (4, 8)})
    assert curriculum.level_rate(1, 20) == pytest.approx(curriculum.level_rate(2, 20), abs=0.01)
    shares = curriculum.shares(20)
    assert shares[2] > 5 * shares[1]


def test_groups_show_how_learnable_a_level_is_without_bias_and_lone_rollouts_show_nothing():
    rng = random.Random(0)
    pairs, lone = Tally(1.0), Tally(1.0)
    for _ in range(4000):
        pairs.add(sum(rng.random() < 0.3 for _ in range(2)), 2, step=0)
        lone.add(rng.random() < 0.3, 1, step=0)
    assert pairs.learnability(step=0) == pytest.approx(0.21, abs=0.01)
    assert lone.learnability(step=0) == Tally(1.0).learnability(step=0)


def test_draws_are_the_same_again_from_what_a_file_remembers():
    rng, curriculum, told = random.Random(0), Curriculum(LEVELS), []
    for step in range(20):
        outcomes = {one.id: [rng.randrange(9), 8] for one in curriculum.draw(step, 8)}
        curriculum.note(step, outcomes)
        told.append({"step": step, "outcomes": outcomes})
    again = Curriculum(LEVELS)
    for step, outcomes in recalled(json.loads(json.dumps(told))):
        again.note(step, outcomes)
    assert again.draw(20, 8) == curriculum.draw(20, 8)


def test_the_scenarios_of_a_step_differ_unless_there_are_too_few():
    curriculum = taught({1: 1.0, 2: 0.5, 3: 0.0})
    for step in range(10):
        names = [one.id for one in curriculum.draw(step, 30)]
        assert len(set(names)) == len(names) == 30
    few = Curriculum(LEVELS[:2])
    assert Counter(one.id for one in few.draw(0, 10)) == {"1-0": 5, "2-0": 5}


def test_draws_depend_on_the_seed_and_the_step_and_on_what_was_noted():
    def ids(curriculum, step):
        return [one.id for one in curriculum.draw(step, 16)]

    rates = {1: 0.9, 2: 0.5, 3: 0.1}
    assert ids(taught(rates), 10) == ids(taught(rates), 10)
    assert ids(taught(rates), 10) != ids(taught(rates), 11)
    assert ids(taught(rates), 10) != ids(taught(rates, seed=1), 10)
    assert ids(taught(rates), 10) != ids(taught({1: 0.5, 2: 0.1, 3: 0.9}), 10)


def test_shares_are_met_over_time_however_small():
    shares = {1: 0.02, 2: 0.9, 3: 0.08}
    totals = Counter()
    for turn in range(100):
        one = allot(shares, 8, offset=turn / 100)
        assert sum(one.values()) == 8
        totals.update(one)
    assert totals == {1: 16, 2: 720, 3: 64}


def test_a_scenario_that_is_not_of_this_split_is_not_counted():
    curriculum = Curriculum(LEVELS)
    curriculum.note(0, {"somewhere-else": (8, 8)})
    assert curriculum.shares(1) == Curriculum(LEVELS).shares(1)


def played(level, *rewards, failed=0, name=""):
    one = Scenario(name or f"at-{level}", "", level, {"answer": "5"})
    done = Trajectory(one, "r", ({"role": "assistant", "content": "5"},), (Span((1,), (0.0,), 0),), StopReason.ANSWERED)
    rollouts = [replace(done, rollout_id=f"r{number}") for number in range(len(rewards))]
    scored = tuple(rollout.scored(reward, {"said": reward}) for rollout, reward in zip(rollouts, rewards, strict=True))
    return TrajectoryGroup(scored, (FailedRollout("r", "EngineError", "x"),) * failed, one)


def test_a_step_is_counted_by_scenario_and_by_level_without_what_the_world_broke():
    groups = [played(1, 1.0, 0.0), played(2, 0.0, failed=1), played(2, 1.0, name="b"), played(3, failed=2), played(1, 1.0, 1.0)]
    place = environment(scenario("5"))
    assert outcomes_of(groups, place) == {"at-1": [3, 4], "at-2": [0, 1], "b": [1, 1]}
    assert solved_shares(groups, outcomes_of(groups, place)) == {"solved": 4 / 6, "solved/level1": 0.75, "solved/level2": 0.5}
    assert solved_shares(groups[3:4], outcomes_of(groups[3:4], place)) == {}


def test_what_the_clock_ended_makes_no_scenario_hard():
    place = environment()
    played = {
        name: Trajectory(LEVELS[0], name, ({"role": "assistant", "content": answer},), (), reason).scored(
            value, {"said": value}
        )
        for name, answer, reason, value in (
            ("a", "5", StopReason.ANSWERED, 1.0),
            ("b", "", StopReason.TIME_LIMIT, 0.0),
            ("c", "", StopReason.TIME_LIMIT, 1.0),
        )
    }
    groups = [TrajectoryGroup(tuple(played.values()), (), LEVELS[0]), TrajectoryGroup((played["b"],), (), LEVELS[1])]
    assert outcomes_of(groups, place) == {LEVELS[0].id: [1, 1]}
    assert solved_shares(groups, outcomes_of(groups, place)) == {"solved": 1.0, "solved/level1": 1.0}


MIXED = [scenario(answer, id=f"{level}-{number}", level=level) for level, answer in ((1, "5"), (2, "6")) for number in range(9)]


class Notebook:
    """A Recorder that remembers."""

    def __init__(self):
        self.lines = {}

    def groups(self, step, groups):
        pass

    def metrics(self, step, values):
        self.lines[step] = values

    async def save(self, step):
        pass


async def play(plan, house, **options):
    notebook = Notebook()
    async with desk_tools() as toolbox:
        await train_loop(
            await obedient(house),
            environment(*MIXED),
            toolbox=toolbox,
            plan=plan,
            config=TrainConfig(),
            recorder=notebook,
            save=notebook.save,
            **options,
        )
    return notebook


async def test_a_run_draws_by_its_own_outcomes_and_goes_on_as_if_it_had_never_stopped():
    plan = Plan(steps=6, groups=4, rollouts=2, draw="solved")
    house = Playhouse(Obedient)
    whole = await play(plan, house)
    lines = [{"step": step, **values} for step, values in sorted(whole.lines.items())]
    assert {line["solved/level1"] for line in lines if "solved/level1" in line} == {1.0}
    assert {counts[0] for line in lines for name, counts in line["outcomes"].items() if name[0] == "2"} == {0}
    rest = Playhouse(Obedient, step=3)
    notebook = await play(plan, rest, history=recalled(lines[:3]))
    assert [[group.scenario for group in groups] for groups in rest.trained] == [
        [group.scenario for group in groups] for groups in house.trained[3:]
    ]
    assert [notebook.lines[step]["outcomes"] for step in (3, 4, 5)] == [line["outcomes"] for line in lines[3:]]


async def test_uniform_drawing_stays_the_walk_through_the_split_and_logs_the_rates_too():
    house = Playhouse(Obedient)
    notebook = await play(Plan(steps=1, groups=18, rollouts=2), house)
    assert [group.scenario for group in house.trained[0]] == pick(MIXED, step=0, count=18, seed=0)
    assert notebook.lines[0]["solved/level1"] == 1.0
    assert notebook.lines[0]["solved/level2"] == 0.0
    assert "outcomes" not in notebook.lines[0]
