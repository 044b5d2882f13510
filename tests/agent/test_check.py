"""The check of an environment: the reference solution and five lazy policies, over a tool server in this process."""

from types import SimpleNamespace

import pytest

from art_mcp.agent.check import LAZY as LAZY_SCRIPTS
from art_mcp.agent.check import PLAYS, check_environment
from art_mcp.errors import EnvironmentLoadError, RewardError
from art_mcp.sampling.scripted import ScriptedSampler
from art_mcp.types import Limits, Scenario, ScoredTrajectory, StopReason, Tool, ToolCall
from tests.agent.players import desk_tools, dialect, environment

pytestmark = pytest.mark.anyio

SUMS = [Scenario(f"sum-{a}", f"What is {a} + 40?", facts={"a": a, "answer": str(a + 40)}) for a in range(1, 5)]
LAZY = {"no tool", "constant answer", "copying numbers", "calling every tool", "empty turn"}


def solution(scenario):
    return [ToolCall("add", {"a": scenario.facts["a"], "b": 40})], scenario.facts["answer"]


def correct(trajectory):
    return float(trajectory.answer == trajectory.scenario.facts["answer"])


async def check(*scenarios, n=20, split="train", progress=None, **fields):
    async with desk_tools(only=["add", "fail"]) as toolbox:
        place = environment(*(scenarios or SUMS), **{"solution": solution, "rewards": {"correct": correct}, **fields})
        return await check_environment(
            place, dialect=dialect(), toolbox=toolbox, play=ScriptedSampler, split=split, n=n, progress=progress
        )


async def test_a_sound_environment_puts_its_reference_solution_above_every_lazy_policy():
    verdict = await check()
    assert verdict.failures == ()
    assert verdict.warnings == ()
    assert verdict.rewards.pop("reference solution") == 1.0
    assert verdict.rewards.keys() == LAZY
    # "42" is right for one of the four, by luck
    assert verdict.rewards == dict.fromkeys(LAZY, 0.0) | {"constant answer": 0.25}
    assert verdict.solved["reference solution"] == 1.0


@pytest.mark.parametrize(
    ("reward", "winner"),
    [
        (lambda trajectory: 1.0, "no tool"),
        (lambda trajectory: float(trajectory.answer.isdigit()), "constant answer"),
        (lambda trajectory: float(str(trajectory.scenario.facts["a"]) in trajectory.answer), "copying numbers"),
        (lambda trajectory: float(len(trajectory.uses)), "calling every tool"),
        (lambda trajectory: float(len(trajectory.answer) < 3), "empty turn"),
    ],
)
async def test_a_reward_that_a_lazy_policy_wins_is_found_and_the_policy_named(reward, winner):
    verdict = await check(rewards={"broken": reward})
    assert any(failure.startswith(f"{winner} scores ") for failure in verdict.failures)


async def test_a_reference_solution_that_does_not_solve_is_found():
    verdict = await check(solution=lambda scenario: ([], "41"))
    assert "the reference solution solves only 25% of the scenarios" in verdict.failures


async def test_where_the_reference_solution_solves_nothing_the_causes_are_told_and_nothing_is_compared_with_it():
    for calls, cause in (
        (lambda scenario: [], "the reference solution solves only 0% of the scenarios"),
        (lambda scenario: [ToolCall("fail", {})], "each of the reference solution's 4 calls is answered with an error: "),
        (
            lambda scenario: [ToolCall("fail", {}), *solution(scenario)[0]],
            "4 of the reference solution's 8 calls are answered ",
        ),
    ):
        verdict = await check(solution=lambda scenario, calls=calls: (calls(scenario), "no"))
        (failure,) = verdict.failures
        assert failure.startswith(cause)
        assert verdict.rewards == {"reference solution": 0.0}
        assert len(verdict.unchecked) == 1


async def test_each_rollout_of_a_check_is_told_to_who_watches():
    told = []
    assert (await check(n=3, progress=SimpleNamespace(finished=told.append))).failures == ()
    assert [type(one) for one in told] == [ScoredTrajectory] * 3 * PLAYS


async def test_a_reference_solution_that_crashes_is_told_with_its_scenario_and_the_line_of_its_own_file():
    where = r"the solution of scenario 'sum-1': KeyError: 'b' \(.*test_check\.py, line \d+"
    with pytest.raises(EnvironmentLoadError, match=where):
        await check(solution=lambda scenario: ([], str(scenario.facts["b"])))


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (ToolCall("ad", {"a": 1, "b": 40}), """cannot be made: ad({"a": 1, "b": 40}) in scenario 'sum-1': there is no tool """),
        (ToolCall("add", {"a": 1}), """cannot be made: add({"a": 1}) in scenario 'sum-1': """),
        (ToolCall("fail", {}), "is answered with an error: fail({}) in scenario 'sum-1': "),
    ],
)
async def test_a_reference_solution_whose_calls_all_fail_is_found_though_its_answers_are_right(call, complaint):
    verdict = await check(solution=lambda scenario: ([call], scenario.facts["answer"]))
    assert verdict.solved["reference solution"] == 1.0
    (failure,) = verdict.failures
    assert f"the reference solution's 4 calls {complaint}" in failure
    assert verdict.warnings == ()


async def test_a_reference_solution_may_meet_an_error_and_go_on_but_each_is_told_with_its_call_and_scenario():
    verdict = await check(solution=lambda scenario: ([ToolCall("fail", {}), *solution(scenario)[0]], scenario.facts["answer"]))
    assert verdict.failures == ()
    (warning,) = verdict.warnings
    assert warning.startswith(
        "4 of the reference solution's 8 calls are answered with an error, in scenarios that it solves all the same: "
        "fail({}) in scenario 'sum-1': Error executing tool fail: not today; "
        "fail({}) in scenario 'sum-2': Error executing tool fail: not today; "
    )
    assert "; and 1 more; if that is not meant, " in warning


async def test_of_failed_calls_those_that_spoil_a_scenario_are_failures_and_the_others_warnings():
    def partly(scenario):
        called, text = solution(scenario)
        number = scenario.facts["a"]
        return [*called, *[ToolCall("fail", {})] * (number > 2)], "no" if number == 3 else text

    verdict = await check(solution=partly)
    assert verdict.failures == (
        "1 of the reference solution's 6 calls are answered with an error, in scenarios that it does not solve: "
        "fail({}) in scenario 'sum-3': Error executing tool fail: not today",
    )
    (warning,) = verdict.warnings
    assert "all the same: fail({}) in scenario 'sum-4': Error executing tool fail: not today; if" in warning


ADD = ToolCall("add", {"a": 1, "b": 2})


@pytest.mark.parametrize("given", [(ADD, "3"), ([ADD], 3), ([{"name": "add"}], "3"), [ADD], "3", None, ([ADD], "3", "4")])
async def test_a_reference_solution_of_another_form_is_told_with_what_to_write(given):
    with pytest.raises(
        EnvironmentLoadError, match=r"the solution of scenario 'sum-1': it gives its calls and the answer, such as"
    ):
        await check(solution=lambda scenario: given)


async def test_calls_that_a_reference_solution_puts_together_are_played_as_one_turn():
    turns = []

    def watch(trajectory):
        turns.append([use.turn for use in trajectory.uses])
        return correct(trajectory)

    twice = [[ToolCall("add", {"a": 1, "b": 2}), ToolCall("add", {"a": 3, "b": 4})], ToolCall("add", {"a": 5, "b": 6})]
    verdict = await check(solution=lambda scenario: (twice, scenario.facts["answer"]), rewards={"watch": watch}, n=1)
    assert [0, 0, 1] in turns
    assert verdict.failures == ()


async def test_only_the_first_scenarios_are_played():
    seen = set()

    def watch(trajectory):
        seen.add(trajectory.scenario.id)
        return correct(trajectory)

    await check(rewards={"watch": watch}, n=2)
    assert seen == {"sum-1", "sum-2"}


async def test_the_split_the_system_message_and_the_limits_are_those_that_training_plays_with():
    seen = []

    def watch(trajectory):
        seen.append(trajectory)
        return correct(trajectory)

    verdict = await check(rewards={"watch": watch}, split="test", n=1, system="You add.", limits=Limits(turns=1))
    assert {trajectory.messages[0]["content"] for trajectory in seen} == {"You add."}
    assert next(trajectory for trajectory in seen if trajectory.uses).stop_reason is StopReason.TURN_LIMIT
    assert "the reference solution solves only 0% of the scenarios" in verdict.failures
    with pytest.raises(EnvironmentLoadError, match="no split 'practice'"):
        await check(split="practice")


def test_who_calls_every_tool_fills_in_something_of_each_type():
    kinds = {"text": {"type": "string"}, "unit": {"type": "string", "enum": ["c", "f"]}, "each": {"type": "array"}, "any": {}}
    tools = [Tool("weather", "", {"type": "object", "properties": kinds}), Tool("ping", "", {"type": "object"})]
    *called, last = LAZY_SCRIPTS["calling every tool"](SUMS[0], tools)
    functions = [message["tool_calls"][0]["function"] for message in called]
    assert functions == [
        {"name": "weather", "arguments": {"text": "1", "unit": "c", "each": [], "any": 1}},
        {"name": "ping", "arguments": {}},
    ]
    assert last == {"role": "assistant", "content": "0"}


async def test_a_reward_that_fails_is_told_with_the_policy_and_the_scenario():
    with pytest.raises(RewardError, match=r"reward 'number': ValueError: .*; in scenario 'sum-1', played by 'no tool'"):
        await check(rewards={"number": lambda trajectory: float(int(trajectory.answer) == 41)})


async def test_without_a_reference_solution_what_lazy_policies_score_is_told_and_compared_with_nothing():
    verdict = await check(solution=None)
    assert verdict.failures == verdict.warnings == ()
    assert verdict.rewards == dict.fromkeys(LAZY, 0.0) | {"constant answer": 0.25}
    assert verdict.unchecked[0].startswith("whether lazy policies score less than a reference solution")


async def test_without_a_reference_solution_a_lazy_policy_that_solves_everything_is_found():
    verdict = await check(solution=None, rewards={"broken": lambda trajectory: float(trajectory.answer.isdigit())})
    assert verdict.failures == ("constant answer solves every scenario", "calling every tool solves every scenario")
    assert verdict.example.words.startswith("constant answer in scenario")
