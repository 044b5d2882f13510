"""Remote models: rollouts over a chat endpoint, what counts as the model's mistake and what as the world's failure."""

import asyncio
import json
from dataclasses import replace

import pytest

from art_mcp import LocalBackend, Model, TrainableModel, evaluate, gather_trajectory_groups
from art_mcp.errors import ModelError, RolloutError, TrainError
from art_mcp.store.trajectories import read_rows, write_groups
from art_mcp.types import Limits, Malformed, MalformedKind, Patience, StopReason, Usage
from tests.agent.endpoints import HANG, HANGS, called, endpoint, http, in_turn, refused
from tests.agent.endpoints import said as says
from tests.agent.players import Desk, desk_tools, environment, scenario

pytestmark = pytest.mark.anyio

QUICK = Patience(tries=3, first_wait=0.001)
ANSWER = says("5")
ADD = says(None, called("add", {"a": 2, "b": 3}))
COUNTED = {"prompt_tokens": 10, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 6}, "cost": 0.25}


def remote(seen, patience=QUICK):
    return Model(name="far", base_url=seen.base_url, api_key="secret", model="gpt", patience=patience)


async def play(*answers, rollouts=1, desk=None, limits=None, answer=None, **options):
    """One group of a scenario whose right answer is 5, and what the endpoint saw."""
    place = environment(scenario("What is 2 + 3?"), limits=limits or Limits())
    async with endpoint(answer or answers) as seen, desk_tools(desk) as toolbox:
        (group,) = await gather_trajectory_groups(
            place.split("test"), model=remote(seen), environment=place, toolbox=toolbox, rollouts=rollouts, **options
        )
    return group, seen


async def one(*answers, **options):
    group, seen = await play(*answers, **options)
    assert group.failures == ()
    return group.trajectories[0], seen


async def test_a_remote_model_calls_tools_answers_and_is_scored():
    scored, seen = await one(ADD, ANSWER)
    assert (scored.reward, scored.trajectory.stop_reason, scored.trajectory.answer) == (1.0, StopReason.ANSWERED, "5")
    assert scored.trajectory.spans == ()
    assert [message["role"] for message in scored.trajectory.messages] == ["user", "assistant", "tool", "assistant"]
    assert scored.trajectory.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2, "b": 3}}
    assert scored.trajectory.messages[2] == {"role": "tool", "content": "5", "name": "add", "tool_call_id": "id1"}
    first, second = seen.bodies
    assert first["model"] == "gpt"
    assert {tool["function"]["name"] for tool in first["tools"]} >= {"add", "write"}
    assert seen.headers[0]["authorization"] == "bearer secret"
    assert second["messages"][1]["tool_calls"] == [called("add", {"a": 2, "b": 3})]
    assert second["messages"][2] == {"role": "tool", "tool_call_id": "id1", "name": "add", "content": "5"}


async def test_what_the_endpoint_wrote_is_sent_back_as_it_came():
    odd = {**called("add", '{"b":3,  "a":2.0}'), "extra_content": {"signature": "xyz"}}
    scored, seen = await one(says("So.", odd, reasoning_content="Hm.", annotations=[]), ANSWER)
    assert seen.bodies[1]["messages"][1] == {
        "role": "assistant",
        "content": "So.",
        "tool_calls": [odd],
        "reasoning_content": "Hm.",
    }
    assert scored.trajectory.messages[1]["content"] == "So."
    assert scored.trajectory.messages[1]["reasoning_content"] == "Hm."


@pytest.mark.parametrize(
    ("call", "kind", "told"),
    [
        (called("add", '{"a": 2, "b"'), MalformedKind.BAD_ARGUMENTS, '"arguments" must be an object'),
        (called("add", "[2, 3]"), MalformedKind.BAD_ARGUMENTS, '"arguments" must be an object'),
        (called("ad", {"a": 2, "b": 3}), MalformedKind.UNKNOWN_TOOL, 'did you mean "add"?'),
        (called("add", {"a": 2}), MalformedKind.SCHEMA, "b"),
        (called("add", {"a": 2, "b": "x"}), MalformedKind.SCHEMA, "b"),
        (called("", {}), MalformedKind.NO_NAME, "the call has no"),
    ],
)
async def test_a_call_that_cannot_be_made_is_an_observation_with_what_to_fix(call, kind, told):
    scored, seen = await one(says(None, call, called("add", {"a": 2, "b": 3}, "id2")), ANSWER)
    broken, made = scored.trajectory.uses
    assert isinstance(broken.call, Malformed)
    assert (broken.call.kind, broken.result.is_error) == (kind, True)
    assert made.result.text == "5"
    assert scored.trajectory.malformed == 1
    assert broken.call.text in scored.trajectory.messages[1]["content"]
    told_back, other = seen.bodies[1]["messages"][2:]
    assert told in told_back["content"]
    assert (told_back["tool_call_id"], other["tool_call_id"]) == ("id1", "id2")
    assert seen.bodies[1]["messages"][1]["tool_calls"][0] == call


async def test_parallel_calls_run_in_parallel_and_are_answered_in_order():
    meet = [called("meet", {}, f"id{index}") for index in range(2)]
    scored, seen = await one(says(None, *meet, called("meet", "", "id2")), ANSWER, desk=Desk(waiting=0))
    assert [use.result.text for use in scored.trajectory.uses] == ["met"] * 3
    assert [message["tool_call_id"] for message in seen.bodies[1]["messages"][2:]] == ["id0", "id1", "id2"]


async def test_calls_without_ids_get_some_that_their_answers_carry():
    _, seen = await one(says(None, called("add", {"a": 1, "b": 1}, None), called("add", {"a": 2, "b": 2}, None)), ANSWER)
    message, *results = seen.bodies[1]["messages"][1:]
    ids = [call["id"] for call in message["tool_calls"]]
    assert ids == [result["tool_call_id"] for result in results]
    assert len(set(ids)) == 2


@pytest.mark.parametrize(
    ("answers", "limits", "reason"),
    [
        ([ADD], Limits(turns=2), StopReason.TURN_LIMIT),
        ([ADD], Limits(calls=1), StopReason.CALL_LIMIT),
        ([says("5", finish="length")], Limits(), StopReason.TRUNCATED),
        ([says("5", finish="length")], Limits(tokens=100), StopReason.TOKEN_LIMIT),
        ([says(None, called("add", {"a": 2, "b": 3}), usage=COUNTED)], Limits(tokens=14), StopReason.TOKEN_LIMIT),
        ([ADD, refused(400, "too long", code="context_length_exceeded")], Limits(), StopReason.TOKEN_LIMIT),
        ([says(None, called("nap", {"seconds": 60}))], Limits(seconds=60), StopReason.TIME_LIMIT),
    ],
)
async def test_limits_end_a_rollout_with_their_own_reasons(answers, limits, reason):
    scored, seen = await one(*answers, limits=limits)
    assert scored.trajectory.stop_reason is reason
    assert scored.reward == 0.0
    assert seen.bodies[0]["max_tokens"] == min(limits.turn_tokens, limits.tokens)


BROKEN = {
    "429": (refused(429, "slow down"), "429", 3),
    "429 for an hour": (http(429, "{}", retry_after="3600"), "it asks to wait 3600 s", 1),
    "no money": (refused(429, "pay", code="insufficient_quota"), "pay", 1),
    "500": (refused(500), "500", 3),
    "503 of a proxy": (http(503, "<html>", retry_after="0"), "503", 3),
    "401": (refused(401, "wrong key"), "wrong key", 1),
    "404": (refused(404, "no such model"), "no such model", 1),
    "half a JSON": (http(200, '{"choices": [{"mess'), "no JSON", 3),
    "half an answer": (http(200, "{}", content_length="900"), "after 3 tries", 3),
    "an empty body": (http(200, ""), "an empty answer", 3),
    "nothing": (b"", "after 3 tries", 3),
    "no HTTP": (b"hello\r\n\r\n", "after 3 tries", 3),
    "a page": (http(200, "<html>hello</html>", content_type="text/html"), "no JSON", 3),
    "a list": (http(200, "[]"), "should be a JSON object", 1),
    "no choices": (http(200, '{"choices": []}'), "no choices", 1),
    "no message": (http(200, '{"choices": [{"finish_reason": "stop"}]}'), "its message should be", 1),
    "calls of another shape": (says(None, 3), "a tool call should be", 1),
    "a call without a function": (says(None, {"id": "x"}), "function should be", 1),
    "a gateway's error": (http(200, '{"error": {"code": 502, "message": "upstream"}}'), "upstream", 3),
    "a filter": (says("", finish="content_filter"), "content_filter", 1),
    "full at once": (refused(400, "maximum context length is 8"), "maximum context length", 1),
}


@pytest.mark.parametrize(("answer", "told", "tries"), BROKEN.values(), ids=list(BROKEN))
async def test_what_a_broken_endpoint_answers_is_a_failure_and_never_a_reward(answer, told, tries):
    group, seen = await play(answer, rollouts=2)
    assert group.trajectories == ()
    assert {failure.kind for failure in group.failures} <= {"EngineError", "NoRoomError"}
    assert all(told in failure.message for failure in group.failures), group.failures
    assert len(seen.bodies) == 2 * tries


async def test_an_endpoint_that_breaks_in_the_middle_fails_the_rollout_and_what_it_used_is_counted():
    group, _ = await play(says(None, called("add", {"a": 2, "b": 3}), usage=COUNTED), refused(401))
    (failure,) = group.failures
    assert failure.kind == "EngineError"
    assert failure.usage == Usage(10, 4, 6, 0.25)


async def test_an_endpoint_that_recovers_is_tried_again():
    scored, seen = await one(refused(429), refused(503), ADD, b"", ANSWER)
    assert scored.reward == 1.0
    assert len(seen.bodies) == 5


@pytest.mark.parametrize("answers", [[HANG], [ADD, HANG]])
async def test_an_endpoint_that_never_answers_is_a_failure_also_in_a_later_turn(answers):
    group, _ = await play(*answers, limits=Limits(seconds=HANGS))
    (failure,) = group.failures
    assert (failure.kind, "owed an answer" in failure.message) == ("EngineError", True)


async def test_no_try_is_awaited_for_which_a_rollout_has_no_time_left():
    group, seen = await play(http(503, "{}", retry_after="90"), limits=Limits(seconds=60))
    assert "it asks to wait 90 s" in group.failures[0].message
    assert len(seen.bodies) == 1


async def test_an_endpoint_that_knows_another_name_for_the_token_limit_is_told_that_name():
    said = refused(400, "use max_completion_tokens", code="unsupported_parameter", param="max_tokens")
    _, seen = await one(answer=lambda body: said if "max_tokens" in body else ANSWER)
    assert [("max_tokens" in body, "max_completion_tokens" in body) for body in seen.bodies] == [(True, False), (False, True)]


async def test_rollouts_that_are_refused_the_token_limits_name_together_all_go_on_with_the_other_and_spend_no_try():
    together = asyncio.Barrier(8)

    async def answer(body):
        if "max_tokens" not in body:
            return ANSWER
        await together.wait()  # all eight have asked before the first hears of the other name
        return refused(400, "use max_completion_tokens", code="unsupported_parameter", param="max_tokens")

    place = environment(scenario("What is 2 + 3?"))
    async with endpoint(answer) as seen, desk_tools() as toolbox:
        model = remote(seen, Patience(tries=1))
        (group,) = await gather_trajectory_groups(
            place.split("test"), model=model, environment=place, toolbox=toolbox, rollouts=8
        )
    assert group.failures == ()
    assert [scored.reward for scored in group.trajectories] == [1.0] * 8
    assert len(seen.bodies) == 16


async def test_an_endpoint_that_refuses_both_names_of_the_token_limit_is_a_failure():
    group, seen = await play(answer=lambda body: refused(400, "no limits here", param=next(n for n in body if "max_" in n)))
    assert "no limits here" in group.failures[0].message
    assert len(seen.bodies) == 2


async def test_seeds_are_sent_where_there_is_something_to_draw_and_differ_by_rollout_and_turn():
    answers = in_turn(ADD, ADD, ANSWER)
    _, seen = await play(answer=answers, rollouts=2, temperature=0.7)
    assert {body["temperature"] for body in seen.bodies} == {0.7}
    assert len({body["seed"] for body in seen.bodies}) == len(seen.bodies)
    _, seen = await one(ANSWER, temperature=0.0)
    assert seen.bodies[0]["temperature"] == 0.0
    assert "seed" not in seen.bodies[0]


async def test_an_evaluation_takes_a_remote_model_and_sums_what_it_used():
    usage = {**COUNTED, "cost": None}
    place = environment(scenario("a", id="a"), scenario("b", id="b", answer="6"), scenario("c", id="c"))
    answers = [says("5", usage=COUNTED), says("5", usage=COUNTED), refused(401)]
    async with endpoint(answers) as seen, desk_tools() as toolbox:
        found = await evaluate(remote(seen), place, toolbox=toolbox, n=3, concurrency=1)
    assert (found.solved, found.n, found.failed) == (0.5, 2, 1)
    assert found.usage == Usage(20, 8, 12, 0.5)
    assert json.loads(json.dumps(found.to_json()))["usage"]["cached_tokens"] == 12
    async with endpoint([says("5", usage=usage)]) as seen, desk_tools() as toolbox:
        found = await evaluate(remote(seen), place, toolbox=toolbox, n=3)
    assert found.usage == Usage(30, 12, 18, None)
    async with endpoint([refused(401)]) as seen, desk_tools() as toolbox:
        with pytest.raises(RolloutError, match=r"none of 3 rollouts could be played, first with EngineError: .*401"):
            await evaluate(remote(seen), place, toolbox=toolbox, n=3)


async def test_groups_of_a_remote_model_are_kept_like_others_and_refused_by_the_trainer_in_words(tmp_path):
    group, _ = await play(ADD, ANSWER, says("4"), rollouts=2, concurrency=1)
    assert sorted(one.reward for one in group.trajectories) == [0.0, 1.0]
    write_groups(tmp_path / "groups.parquet", [group], step=0, keep_seconds=True)
    assert [row["spans"] for row in read_rows(tmp_path / "groups.parquet")] == [(), ()]
    model = TrainableModel(name="here")
    async with LocalBackend(in_process=True, threads=1) as backend:
        await model.register(backend)
        with pytest.raises(TrainError, match=r"a remote model's has none.*: train on rollouts of a TrainableModel"):
            await model.train([group])
        assert await model.get_step() == 0


async def test_usage_adds_up_with_costs_where_they_are_known():
    assert Usage(1, 2, 3) + Usage(10, 20, 30, 0.5) + Usage(cost=0.25) == Usage(11, 22, 33, 0.75)
    assert replace(Usage(1) + Usage(2), cost=None) == Usage(3)


async def test_a_model_without_an_endpoint_says_what_it_lacks(monkeypatch):
    with pytest.raises(ModelError, match="model 'x' has no base_url"):
        Model(name="x").openai_client()
    with pytest.raises(ModelError, match="base_url is an address such as"):
        Model(name="x", base_url="localhost:8000")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    model = Model(name="x", base_url="http://127.0.0.1:1/v1")
    async with model.openai_client() as client:
        assert (str(client.base_url), client.api_key, model.model) == ("http://127.0.0.1:1/v1/", "none", "x")
    monkeypatch.setenv("OPENAI_API_KEY", "from-outside")
    async with model.openai_client() as client:
        assert client.api_key == "from-outside"
