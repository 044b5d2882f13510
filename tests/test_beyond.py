"""What the experiment on undemonstrated second calls rests on: what its warm starts are shown, and what it counts."""

import random
import sys
from collections import Counter
from dataclasses import replace

import pytest

from art_mcp.agent.check import calling, play_script, reference
from art_mcp.local.models import load_dialect
from art_mcp.sampling.scripted import ScriptedSampler
from art_mcp.tools import open_tools
from art_mcp.types import ModelSpec, SamplingParams, ToolCall
from benchmarks import beyond
from benchmarks.second_calls import SIGNS, Pushed, calculator, open_stage, second_call_chances, second_turn
from scripts.build_tiny_policy import Lessons, main, train_questions


def shown(lessons, count=400):
    """How many questions of each level are shown with how many steps: {(operations asked for, steps shown): count}."""
    rng = random.Random(0)
    questions = train_questions(rng, lessons.levels)
    asked = [next(questions) for _ in range(count)]
    return Counter((len(question.steps), len(lessons.shown(question, rng).steps)) for question in asked)


def test_lessons_of_level_1_never_ask_for_two_operations():
    assert set(shown(Lessons(levels=(1,)))) == {(1, 1)}


def test_lessons_that_carry_nothing_through_show_questions_of_two_operations_and_one_call_for_each():
    assert set(shown(Lessons(carried=0.0))) == {(1, 1), (2, 1)}


def test_lessons_carry_through_about_the_share_that_they_are_asked_for():
    counts = shown(Lessons(carried=0.25))
    assert 25 <= counts[2, 2] <= 75
    assert counts[2, 1] + counts[2, 2] == 200


def test_the_whole_lessons_draw_nothing_beside_the_questions():
    rng = random.Random(0)
    question = next(train_questions(random.Random(1), (2,)))
    before = rng.getstate()
    assert Lessons().shown(question, rng) is question
    assert rng.getstate() == before


@pytest.mark.parametrize("option", [["--levels", "1"], ["--carried", "0"], ["--steps", "5", "0"], ["--start", "elsewhere"]])
def test_another_warm_start_never_replaces_the_policy_of_the_package(option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["build_tiny_policy.py", *option])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "give another warm start its own --out" in capsys.readouterr().err


async def played(script):
    """The first held-out question of two operations, played by `script` over the real tools, as (trajectory, dialect)."""
    environment = calculator("2")
    dialect = load_dialect(ModelSpec())
    async with open_tools(environment.servers, only=environment.tools) as toolbox:
        scenario = environment.split("test")[0]
        scored = await play_script(
            script, scenario, environment=environment, dialect=dialect, toolbox=toolbox, play=ScriptedSampler
        )
    return scored, dialect


def first_call_and(*more):
    """The reference solution's first call, then `more` turns, then its answer."""

    def script(scenario, tools):
        first, *_, answer = reference(calculator("2"))(scenario, tools)
        return [first, *more, answer]

    return script


def signs(scored):
    return {name for name, sign in SIGNS.items() if sign(scored.trajectory)}


pytestmark = pytest.mark.anyio


async def test_the_reference_solution_calls_again_and_takes_up_the_first_result():
    scored, _ = await played(reference(calculator("2")))
    assert signs(scored) == {"second", "takes-up", "first"}


async def test_one_call_and_an_answer_is_no_second_call():
    scored, _ = await played(first_call_and())
    assert signs(scored) == {"first"}


async def test_a_second_call_of_other_numbers_takes_nothing_up():
    scored, _ = await played(first_call_and(calling(ToolCall("add", {"a": 1, "b": 1}))))
    assert signs(scored) == {"first", "second"}


async def test_two_calls_at_once_are_no_second_call():
    call = ToolCall("add", {"a": 1, "b": 1})
    scored, _ = await played(lambda scenario, tools: [calling(call, call)])
    assert signs(scored) == set()


async def test_credit_is_given_for_questions_of_two_operations_alone():
    scored, _ = await played(reference(calculator("2")))
    credit = calculator(credit=["takes-up"]).rewards["takes-up"]
    assert credit(scored.trajectory) == pytest.approx(0.3)
    scenario = scored.trajectory.scenario
    assert scenario is not None
    assert credit(replace(scored.trajectory, scenario=replace(scenario, level=1))) == 0


async def test_what_is_looked_at_is_the_second_call_after_all_that_came_before_it():
    scored, dialect = await played(reference(calculator("2")))
    sample = second_turn(scored)
    begin = sample.trainable.index(True)
    assert all(sample.trainable[begin:])
    assert sample.token_ids == scored.trajectory.token_ids[: len(sample.token_ids)]
    second = reference(calculator("2"))(scored.trajectory.scenario, [])[1]
    user = {"role": "user", "content": scored.trajectory.scenario.prompt}
    assert list(sample.token_ids[begin:]) == dialect.written([user], second, [])


async def test_a_push_puts_the_call_token_after_the_first_result_alone():
    inner = ScriptedSampler([[1, 9], [2, 9], [3, 9]])
    pushed = Pushed(inner, call=7, share=1.0)
    params, prompts = SamplingParams(max_tokens=5), ([7, 0], [7, 0, 7, 0], [7, 0, 7, 0, 7])
    turns = [await pushed.sample(prompt, params=params, stop=frozenset([9]), shared=1) for prompt in prompts]
    assert [turn.span.token_ids for turn in turns] == [(1, 9), (7, 2, 9), (3, 9)]
    assert [len(turn.span.logprobs or ()) for turn in turns] == [2, 3, 2]
    assert inner.prompts[1] == (7, 0, 7, 0, 7)


async def test_without_a_share_nothing_is_pushed():
    pushed = Pushed(ScriptedSampler([[1, 9]]), call=7, share=0.0)
    turn = await pushed.sample([0, 7], params=SamplingParams(), stop=frozenset([9]))
    assert turn.span.token_ids == (1, 9)


async def test_the_shipped_policy_finds_a_second_call_likelier_than_none():
    async with open_stage("tiny", contexts=8) as stage:
        chances = await second_call_chances(stage)
    assert 0 < chances["whole"] < chances["begun"] < 1
    assert chances["begun"] > 0.5


def test_the_legs_of_an_arm_begin_with_level_2_alone_and_end_with_its_last_step():
    legs = list(beyond.legs(beyond.Arm("read", alone=30, steps=60)))
    assert legs == [(25, "2"), (30, "2"), (50, "1-2"), (60, "1-2")]


def test_an_arm_is_not_run_again_where_its_result_lies(tmp_path):
    def once():
        return {"solved": 1}

    def never():
        raise AssertionError("run again")

    first = beyond.kept(tmp_path / "arm-0.json", once)
    assert beyond.kept(tmp_path / "arm-0.json", never) == first
    assert first["solved"] == 1
