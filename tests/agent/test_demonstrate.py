"""Demonstrations are token for token what a policy that writes the template's own form would have played."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from art_mcp.agent.check import play_script, reference
from art_mcp.agent.demonstrate import Demonstration, read_line, sample_of, show_solutions, show_successes, write_line
from art_mcp.agent.group import gather_trajectory_groups
from art_mcp.errors import ConfigError, EnvironmentLoadError, TrainError
from art_mcp.local.models import load_dialect, model_source
from art_mcp.sampling.scripted import ScriptedSampler
from art_mcp.types import ModelSpec, Scenario, ToolCall, TrajectoryGroup
from tests.agent.players import (
    Obedient,
    Playhouse,
    calls,
    desk_tools,
    dialect,
    environment,
    obedient,
    said,
    scenario,
    tokenizer,
)

pytestmark = pytest.mark.anyio

TRL = importlib.util.find_spec("trl")  # found, not imported: it is installed for its data
TEMPLATES = Path(TRL.origin).parent / "chat_templates" if TRL else None
SUMS = [Scenario(f"sum-{a}", f"What is {a} + 40?", facts={"a": a, "answer": str(a + 40)}) for a in range(1, 5)]


def solution(scenario):
    a = scenario.facts["a"]
    return [ToolCall("add", {"a": a, "b": 30}), ToolCall("add", {"a": a + 30, "b": 10})], scenario.facts["answer"]


def sums(*scenarios, **fields):
    return environment(*(scenarios or SUMS), **{"solution": solution, **fields})


def learned(sample):
    """The text of each run of tokens that is to be learned."""
    texts, previous = [], False
    for token, on in zip(sample.token_ids, sample.trainable, strict=True):
        if on:
            texts = texts if previous else [*texts, []]
            texts[-1].append(token)
        previous = on
    return [tokenizer().decode(text) for text in texts]


@pytest.mark.parametrize("system", ["", "You add."])
async def test_a_demonstration_is_what_a_rollout_of_the_solution_would_have_been(system):
    place = sums(system=system)
    async with desk_tools(only=["add"]) as toolbox:
        shown = await show_solutions(SUMS, environment=place, toolbox=toolbox)
        assert len(shown) == len(SUMS)
        for scenario_, one in zip(SUMS, shown, strict=True):
            options = {"environment": place, "dialect": dialect(), "toolbox": toolbox, "play": ScriptedSampler}
            played = (await play_script(reference(place), scenario_, **options)).trajectory
            sample = sample_of(one, dialect=dialect())
            assert sample.token_ids == played.token_ids
            assert sample.trainable == tuple(span.logprobs is not None for span in played.spans for _ in span.token_ids)
            assert sample.logprobs is None
    assert learned(sample) == [
        f"{calls(('add', {'a': 4, 'b': 30}))}<|im_end|>",
        f"{calls(('add', {'a': 34, 'b': 10}))}<|im_end|>",
        "44<|im_end|>",
    ]


@pytest.mark.skipif(TEMPLATES is None, reason="trl is not installed: its wheel brings the templates")
@pytest.mark.parametrize("name", ["qwen3_5_nothink", "qwen3_8"])
async def test_a_demonstration_in_function_tags_is_played_by_real_calls_too(name, tmp_path):
    shutil.copytree(model_source("tiny"), tmp_path / "model")
    shutil.copy(TEMPLATES / f"{name}.jinja", tmp_path / "model" / "chat_template.jinja")
    tagged, place = load_dialect(ModelSpec(str(tmp_path / "model"))), sums()
    async with desk_tools(only=["add"]) as toolbox:
        options = {"environment": place, "dialect": tagged, "toolbox": toolbox, "play": ScriptedSampler}
        played = (await play_script(reference(place), SUMS[3], **options)).trajectory
        (shown,) = await show_solutions(SUMS[3:], environment=place, toolbox=toolbox)
    assert [(use.call.arguments, use.result.text) for use in played.uses] == [
        ({"a": 4, "b": 30}, "34"),
        ({"a": 34, "b": 10}, "44"),
    ]
    first, *_ = learned(sample_of(shown, dialect=tagged))
    given = "<parameter=a>\n4\n</parameter>\n<parameter=b>\n30\n</parameter>"
    assert first.removeprefix("\n</think>\n\n") == f"<tool_call>\n<function=add>\n{given}\n</function>\n</tool_call><|im_end|>"
    assert tokenizer().decode(played.token_ids).count("<tool_response>") == 2


async def test_calls_that_a_solution_puts_together_are_one_turn():
    def both(scenario):
        return [[ToolCall("add", {"a": 1, "b": 2}), ToolCall("add", {"a": 3, "b": 4})]], scenario.facts["answer"]

    async with desk_tools(only=["add"]) as toolbox:
        (shown,) = await show_solutions(SUMS[:1], environment=sums(solution=both), toolbox=toolbox)
    assert [message["role"] for message in shown.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [message["content"] for message in shown.messages[2:4]] == ["3", "7"]
    first, _ = learned(sample_of(shown, dialect=dialect()))
    assert first == f"{calls(('add', {'a': 1, 'b': 2}), ('add', {'a': 3, 'b': 4}))}<|im_end|>"


async def test_a_solution_that_does_not_solve_its_scenario_is_left_out():
    wrong = SUMS[1].facts["answer"]
    place = sums(solution=lambda scenario: ([], "no" if scenario.facts["answer"] == wrong else scenario.facts["answer"]))
    async with desk_tools(only=["add"]) as toolbox:
        shown = await show_solutions(SUMS, environment=place, toolbox=toolbox)
        assert [one.messages[-1]["content"] for one in shown] == ["41", "43", "44"]
        with pytest.raises(EnvironmentLoadError, match="'desk' solves none of 1 scenarios"):
            await show_solutions(SUMS[1:2], environment=place, toolbox=toolbox)


async def test_an_environment_without_a_solution_and_one_whose_solution_fails_are_told():
    async with desk_tools() as toolbox:
        with pytest.raises(EnvironmentLoadError, match="has no `solution` to demonstrate"):
            await show_solutions(SUMS, environment=environment(*SUMS), toolbox=toolbox)
        with pytest.raises(EnvironmentLoadError, match="the solution of scenario 'sum-1': ZeroDivisionError"):
            await show_solutions(SUMS[:1], environment=sums(solution=lambda scenario: 1 / 0), toolbox=toolbox)


BARE = '{"name": "add", "arguments": {"a": 2, "b": 3}}'
FENCED = f"I add:\n```json\n{BARE}\n```"


@pytest.mark.parametrize(("written", "said_before"), [(BARE, ""), (FENCED, "I add:\n"), (calls(("add", {"a": 2, "b": 3})), "")])
async def test_a_success_is_learned_in_the_form_of_the_template_whatever_form_it_was_read_in(written, said_before):
    lenient = load_dialect(ModelSpec("tiny", lenient=True))
    model = await obedient(Playhouse(Obedient, own_dialect=lenient))
    place = environment(scenario(written, "5"), scenario(written, "6", id="wrong"))
    async with desk_tools() as toolbox:
        options = {"model": model, "environment": place, "toolbox": toolbox, "rollouts": 2}
        groups = await gather_trajectory_groups(place.split("train"), **options)
        (shown,) = show_successes(groups, environment=place, tools=toolbox.tools)
    assert learned(sample_of(shown, dialect=lenient)) == [
        f"{said_before}{calls(('add', {'a': 2, 'b': 3}))}<|im_end|>",
        "5<|im_end|>",
    ]


async def successes(*turns, **fields):
    """What is imitated of two rollouts that play `turns`."""
    place = environment(*(scenario(*each, id=str(at)) for at, each in enumerate(turns)), **fields)
    async with desk_tools() as toolbox:
        model, options = await obedient(), {"environment": place, "toolbox": toolbox, "rollouts": 2}
        groups = await gather_trajectory_groups(place.split("train"), model=model, **options)
        assert all(place.solved(one) for group in groups for one in group.trajectories)
        both = [TrajectoryGroup(tuple(one for group in groups for one in group.trajectories))]
        return [shown.messages[1]["content"] for shown in show_successes(both, environment=place, tools=toolbox.tools)]


async def test_a_success_with_a_malformed_call_is_not_imitated():
    assert await successes(["<tool_call>\n{\n</tool_call>", "5"]) == []


async def test_the_best_of_several_successes_is_imitated_and_of_equal_ones_the_shortest():
    detour = ["Let me see." + calls(("add", {"a": 1, "b": 1})), calls(("add", {"a": 2, "b": 3})), "5"]
    direct = ["So." + calls(("add", {"a": 2, "b": 3})), "5"]
    assert await successes(detour, direct) == ["So."]
    fond = {"said": said, "calls": lambda trajectory: 0.1 * len(trajectory.uses)}
    assert await successes(detour, direct, rewards=fond) == ["Let me see."]


async def test_a_demonstration_comes_back_from_its_line_as_the_same_tokens():
    async with desk_tools(only=["add", "fail"]) as toolbox:
        shown = await show_solutions(SUMS, environment=sums(system="Né."), toolbox=toolbox)
        others = toolbox.tools[:1]
    for one in shown:
        for offered in (one.tools, others):
            line = write_line(one, offered=offered)
            assert "\n" not in line
            assert ("tools" in json.loads(line)) is (offered == others)
            back = read_line(line, offered=offered, where="here")
            assert sample_of(back, dialect=dialect()) == sample_of(one, dialect=dialect())


def line(*messages, **more):
    return json.dumps({"messages": messages, **more})


USER, ANSWER = {"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}]}
RESULT = {"role": "tool", "content": "5"}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}, "b": {}}}}}


def test_arguments_may_be_a_string_and_content_null_as_hosted_models_write_them():
    shown = read_line(line(USER, CALL, RESULT, ANSWER, tools=[ADD]), offered=(), where="here")
    assert learned(sample_of(shown, dialect=dialect()))[0] == f"{calls(('add', {'a': 2, 'b': 3}))}<|im_end|>"
    assert [tool.name for tool in shown.tools] == ["add"]


BAD = {
    "no JSON": ("{", "Expecting property name"),
    "no messages": ("{}", "'messages'"),
    "not an object": ("[]", "list indices must be"),
    "no user": (line(ANSWER), "does not begin with a message of the user's"),
    "no answer": (line(USER), "does not end with a turn of the assistant"),
    "two turns in a row": (line(USER, ANSWER, ANSWER), "two turns of the assistant follow each other"),
    "arguments that are a list": (
        line(USER, {**CALL, "tool_calls": [{"function": {"name": "add", "arguments": "[]"}}]}, RESULT, ANSWER),
        "the arguments of add are no object",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_line_that_is_no_demonstration_is_named(bad):
    text, told = BAD[bad]
    with pytest.raises(ConfigError, match=rf"file.jsonl, line 3, is no demonstration: .*{told}"):
        read_line(text, offered=(), where="file.jsonl, line 3,")


async def test_a_call_that_the_policy_could_not_make_is_not_taught():
    async with desk_tools(only=["add"]) as toolbox:
        wrong = {**CALL, "tool_calls": [{"function": {"name": "subtract", "arguments": {}}}]}
        shown = read_line(line(USER, wrong, RESULT, ANSWER), offered=toolbox.tools, where="here")
        with pytest.raises(TrainError, match=r"a demonstrated call is one that the policy could not make: (?s:.*)subtract"):
            sample_of(shown, dialect=dialect())
        quoting = Demonstration((USER, {"role": "assistant", "content": calls(("add", {"a": 1, "b": 1}))}), toolbox.tools)
        with pytest.raises(TrainError, match="a demonstrated turn with 0 calls is read as one with 1"):
            sample_of(quoting, dialect=dialect())
