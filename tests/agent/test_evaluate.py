"""Figures of rollouts: intervals against known values, levels in balance, rates of what went wrong."""

import json
import math

import pytest

from art_mcp.agent.evaluate import balanced, evaluate, evaluation, wilson
from art_mcp.errors import EnvironmentLoadError, RolloutError
from art_mcp.types import Malformed, MalformedKind, Scenario, StopReason, ToolCall, ToolResult, ToolUse, Trajectory
from tests.agent.players import Obedient, Playhouse, Watcher, calls, desk_tools, environment, obedient, scenario

pytestmark = pytest.mark.anyio

GOOD = ToolUse(ToolCall("add", {}), ToolResult("5"), 0)
WRONG = ToolUse(ToolCall("add", {}), ToolResult("no", is_error=True), 0)
BROKEN = ToolUse(Malformed("x", "y", MalformedKind.EMPTY), ToolResult("y", is_error=True), 0)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_intervals_are_those_of_the_literature(successes, n, low, high):
    found = wilson(successes, n)
    assert math.isclose(found[0], low, abs_tol=5e-5)
    assert math.isclose(found[1], high, abs_tol=5e-5)
    mirrored = wilson(n - successes, n)
    assert math.isclose(mirrored[0], 1 - found[1], abs_tol=1e-12)


def test_intervals_stay_within_0_and_1():
    for n in (1, 2, 1000):
        assert 0.0 <= wilson(0, n)[0] < 1e-12
        assert 1.0 >= wilson(n, n)[1] > 1 - 1e-12


def levels(*counts):
    return [Scenario(f"{level}-{number}", "", level) for level, many in enumerate(counts, 1) for number in range(many)]


SHARES = [((9, 9), 6, [3, 3]), ((9, 9, 9), 7, [3, 2, 2]), ((1, 9), 6, [1, 3]), ((2, 2), 9, [2, 2]), ((9,), 4, [4])]


@pytest.mark.parametrize(("counts", "n", "taken"), SHARES)
def test_every_level_has_the_same_number_of_scenarios_as_far_as_it_has_them(counts, n, taken):
    found = balanced(levels(*counts), n)
    assert [sum(one.level == level for one in found) for level in range(1, len(counts) + 1)] == taken
    assert found == levels(*taken)


def played(reward, *uses, level=1, turns=2):
    messages = ({"role": "assistant", "content": ""},) * turns
    one = Trajectory(Scenario("s", "", level), "r", messages, (), StopReason.ANSWERED, uses)
    return one.scored(reward - 0.25, {"said": reward, "malformed": -0.25})


def test_figures_of_trajectories_made_by_hand():
    scored = [played(1.0, GOOD, WRONG, BROKEN), played(0.0, GOOD, turns=1), played(1.0, level=2, turns=5), played(0.5, level=2)]
    found = evaluation(scored, environment(), failed=3)
    assert (found.solved, found.n, found.failed, found.turns_mean) == (0.5, 4, 3, 2.5)
    assert found.reward == 0.375
    assert found.malformed_rate == 0.25
    assert math.isclose(found.tool_error_rate, 1 / 3)
    assert found.ci95 == wilson(2, 4)
    assert {level: (one.solved, one.n, one.turns_mean) for level, one in found.by_level.items()} == {
        "1": (0.5, 2, 1.5),
        "2": (0.5, 2, 3.5),
    }


def test_rates_without_any_call_are_0():
    found = evaluation([played(0.0)], environment(), failed=0)
    assert (found.malformed_rate, found.tool_error_rate) == (0.0, 0.0)


def test_what_counts_as_solved_is_the_reward_that_the_environment_names():
    place = environment(rewards={"said": lambda t: 0.0, "malformed": lambda t: 0.0}, solved_by="malformed")
    assert evaluation([played(1.0)], place, failed=0).solved == 0.0
    assert evaluation([played(1.0)], environment(), failed=0).solved == 1.0


async def assess(*scenarios, **options):
    async with desk_tools() as toolbox:
        model = await obedient(options.pop("house", None))
        return await evaluate(model, environment(*scenarios), toolbox=toolbox, **options)


async def test_an_evaluation_plays_every_scenario_once_and_has_the_promised_keys():
    add = calls(("add", {"a": 2, "b": 3}))
    scenarios = [scenario(add, "5", id="a"), scenario("6", id="b"), scenario(add, "5", id="c", level=2)]
    found = json.loads(json.dumps((await assess(*scenarios, n=4)).to_json()))
    assert {"solved", "ci95", "reward", "n", "malformed_rate", "tool_error_rate", "turns_mean", "by_level"} <= found.keys()
    assert math.isclose(found["solved"], 2 / 3)
    assert found["by_level"]["2"]["solved"] == 1.0
    assert found["by_level"]["1"].keys() >= {"solved", "n", "turns_mean", "ci95"}
    assert found["n"] == 3


async def test_an_evaluation_is_played_at_its_temperature_and_concurrency_and_watched():
    sampler, watcher = Obedient(), Watcher()
    house = Playhouse(lambda: sampler)
    scenarios = [scenario("5", id=str(number)) for number in range(6)]
    await assess(*scenarios, n=6, house=house)
    await assess(*scenarios, n=6, house=house, temperature=1.0, concurrency=2, progress=watcher)
    assert sampler.temperatures == [0.0] * 6 + [1.0] * 6
    assert len(watcher.seen) == 6
    assert sampler.most == 6
    sampler.most = 0
    await assess(*scenarios, n=6, house=house, concurrency=2)
    assert sampler.most == 2


async def test_draws_of_an_evaluation_depend_on_its_seed_and_not_on_the_step_of_the_model():
    seeds = []

    class Noting(Obedient):
        async def sample(self, token_ids, *, params, **options):
            seeds[-1].append(params.seed)
            return await super().sample(token_ids, params=params, **options)

    for step, seed in [(0, 0), (50, 0), (0, 1)]:
        seeds.append([])
        await assess(scenario("5"), scenario("5", id="two"), n=2, seed=seed, house=Playhouse(Noting, step=step))
    assert sorted(seeds[0]) == sorted(seeds[1])
    assert not set(seeds[0]) & set(seeds[2])


@pytest.mark.parametrize(("solved", "n"), [(None, 4), ("3", 6), ("1", 6), ("broken", 6)])
async def test_a_policy_that_solves_nothing_is_not_asked_everything(solved, n):
    """Of six, four in balance of their levels, are played first: 0, 1, 3 and 4."""
    rewards = {"said": lambda trajectory: float(trajectory.scenario.id == solved)}
    if solved == "broken":
        rewards["broken"] = lambda trajectory: 1 / 0 if trajectory.scenario.id == "0" else 0.0
    scenarios = [scenario("5", id=str(number), level=1 + number // 3) for number in range(6)]
    seeds = []

    class Noting(Obedient):
        async def sample(self, token_ids, *, params, **options):
            seeds.append(params.seed)
            return await super().sample(token_ids, params=params, **options)

    async with desk_tools() as toolbox:
        model = await obedient(Playhouse(Noting))
        place = environment(*scenarios, rewards=rewards)
        found = await evaluate(model, place, toolbox=toolbox, n=6, hopeless_after=4)
        assert found.n + found.failed == n
        if n == 6:
            early, seeds[:] = sorted(seeds), []
            assert await evaluate(model, place, toolbox=toolbox, n=6) == found
            assert sorted(seeds) == early


async def test_an_evaluation_whose_rollouts_all_failed_says_why():
    async with desk_tools() as toolbox:
        place = environment(scenario("5"), rewards={"broken": lambda trajectory: 1 / 0})
        with pytest.raises(RolloutError, match=r"none of 1 rollouts .*RewardError: .*ZeroDivisionError"):
            await evaluate(await obedient(), place, toolbox=toolbox, n=5)


async def test_an_evaluation_with_failed_rollouts_says_why_the_first_of_them_failed():
    def unless_7(trajectory):
        if trajectory.scenario.id == "7":
            raise KeyError("seven")
        return 1.0

    async with desk_tools() as toolbox:
        place = environment(scenario("5"), scenario("5", id="7"), rewards={"unless 7": unless_7})
        found = await evaluate(await obedient(), place, toolbox=toolbox, n=5)
    assert (found.n, found.failed) == (1, 1)
    assert found.first_failure.startswith("RewardError: reward 'unless 7': KeyError: 'seven'")


async def test_a_wrong_split_is_told_with_the_splits_there_are():
    with pytest.raises(EnvironmentLoadError, match="no split 'tset'; it has train, test"):
        await assess(scenario("5"), split="tset")
