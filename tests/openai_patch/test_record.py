"""An agent on the `openai` package, recorded while it talks to the tiny policy: which tokens become which trajectories."""

import asyncio
import json
from dataclasses import replace

import anyio
import pytest
from openai import AsyncOpenAI, NotFoundError, OpenAI
from starlette.responses import Response

from art_mcp import TrainableModel, gather_trajectory_groups
from art_mcp.core.samples import make_samples, spread
from art_mcp.errors import EngineError
from art_mcp.openai_patch import gather_agent_groups, record
from art_mcp.types import Malformed, MalformedKind, Scenario, StopReason, ToolCall, TrainConfig, TrajectoryGroup
from tests.agent.players import calls
from tests.openai_patch.agents import MODEL, Between, usual
from tests.serve.guests import Told, opened, voice_of

pytestmark = pytest.mark.anyio

QUESTION = {"role": "user", "content": "What is the sum of 19 and 98?"}


async def say(client, *messages, **options):
    asked = {"model": MODEL, "messages": list(messages) or [QUESTION], "max_tokens": 48, "seed": 4} | options
    return await client.chat.completions.create(**asked)


def tools_of(toolbox):
    return [tool.schema() for tool in toolbox.tools]


def sampled(trajectory):
    return [span for span in trajectory.spans if span.logprobs is not None]


async def test_the_recorded_tokens_are_those_of_our_own_runner_on_the_same_seeds(model, environment, toolbox):
    scenarios = environment.split("train")[:6]
    options = {"model": model, "rollouts": 3, "seed": 7, "step": 5}
    ours = await gather_trajectory_groups(scenarios, environment=environment, toolbox=toolbox, **options)

    async def agent(client, scenario):
        return await usual(client, scenario.prompt, toolbox=toolbox)

    theirs = await gather_agent_groups(agent, scenarios, reward=lambda recording, answer: float(bool(answer)), **options)
    compared = 0
    for own, other in zip(ours, theirs, strict=True):
        assert not own.failures
        assert not other.failures
        for one, recorded in zip(own.trajectories, other.trajectories, strict=True):
            if not one.trajectory.malformed:  # after which our runner says what to fix, and an agent takes it for an answer
                assert spread(recorded.trajectory.spans) == spread(one.trajectory.spans)
                assert recorded.trajectory.rollout_id == one.trajectory.rollout_id
                assert recorded.trajectory.answer == one.trajectory.answer
                assert [use.result.text for use in recorded.trajectory.uses] == [use.result.text for use in one.trajectory.uses]
                compared += one.trajectory.turns > 1
    assert compared > 9


async def test_an_agent_sees_neither_token_ids_nor_logprobs_that_it_did_not_ask_for(client):
    with record(client) as recording:
        answer = await say(client)
        asked_for = await say(client, logprobs=True, extra_body={"return_token_ids": True})
    plain = await say(client)
    assert answer.choices[0].logprobs is None
    assert answer.model_extra.keys() == plain.model_extra.keys()
    assert answer.choices[0].model_extra.keys() == plain.choices[0].model_extra.keys()
    assert answer.choices[0].message == plain.choices[0].message
    (first, second) = recording.trajectories
    assert asked_for.choices[0].token_ids == list(sampled(second)[0].token_ids)
    assert [entry.logprob for entry in asked_for.choices[0].logprobs.content] == list(sampled(second)[0].logprobs)
    assert first.token_ids == second.token_ids


async def test_fields_of_a_vendor_reach_the_agent_and_the_endpoint(model):
    def add(asked, answer):
        body = json.loads(bytes(answer.body)) | {"vendor": {"x": [1]}}
        answer.body = json.dumps(body).encode()
        answer.headers["content-length"] = str(len(answer.body))
        answer.headers["x-vendor"] = "yes"
        return answer

    between = Between(*model.backend.endpoint(model), forge=add)
    async with between.client() as client:
        with record(client) as recording:
            raw = await client.chat.completions.with_raw_response.create(
                model=MODEL, messages=[QUESTION], max_tokens=4, extra_body={"top_k": -1}, extra_headers={"x-own": "1"}
            )
    assert raw.headers["x-vendor"] == "yes"
    assert raw.parse().vendor == {"x": [1]}
    assert raw.parse().art_mcp["policy"] == "tiny@0"
    assert between.told[0]["top_k"] == -1
    assert len(recording.trajectories) == 1


async def test_turns_that_extend_each_other_are_one_trajectory(client, toolbox):
    with record(client, Scenario("one", "What is the sum of 19 and 98?")) as recording:
        answer = await usual(client, "What is the sum of 19 and 98?", toolbox=toolbox, seed=4)
    trajectory = recording.trajectory
    assert recording.trajectories == (trajectory,)
    assert trajectory.answer == answer != ""
    assert trajectory.stop_reason is StopReason.ANSWERED
    assert [span.logprobs is not None for span in trajectory.spans] == [False, True] * trajectory.turns
    assert {span.policy_version for span in sampled(trajectory)} == {0}
    assert [use.call.name for use in trajectory.uses]
    assert isinstance(trajectory.messages[1]["tool_calls"][0]["function"]["arguments"], dict)


async def test_a_call_that_does_not_fit_is_recorded_as_malformed_with_what_the_agent_said_to_it(toolbox):
    add = next(tool.schema() for tool in toolbox.tools if tool.name == "add")
    unfit, good = calls(("add", {"a": "two"})), calls(("add", {"a": 1, "b": 2}))
    told = Told([f"{unfit}\n{good}\n<tool_call>{{</tool_call>", unfit])
    async with opened(voice_of(told)) as (client, _):
        with record(client) as recording:
            first = (await say(client, model="told", tools=[add])).choices[0].message
            said = [
                {"role": "tool", "tool_call_id": call.id, "content": text}
                for call, text in zip(first.tool_calls, "ab", strict=True)
            ]
            await say(client, QUESTION, first, *said, model="told", tools=[add])
    trajectory = recording.trajectory
    assert [(type(use.call), use.result.text, use.result.is_error, use.turn) for use in trajectory.uses[:2]] == [
        (Malformed, "a", True, 0),
        (ToolCall, "b", False, 0),
    ]
    unsaid = [(use.call.kind, use.result.text == use.call.error, use.turn) for use in trajectory.uses[2:]]
    assert unsaid == [(MalformedKind.INVALID_JSON, True, 0), (MalformedKind.SCHEMA, True, 1)]
    assert (trajectory.malformed, trajectory.tool_errors) == (3, 0)


async def test_an_edited_history_is_a_branch_and_every_sampled_token_counts_once(client):
    with record(client) as recording:
        first = await say(client)
        reply = first.choices[0].message
        second = await say(client, QUESTION, reply, {"role": "user", "content": "And then?"})
        edited = {"role": "assistant", "content": "I had rather not say."}
        await say(client, QUESTION, edited, {"role": "user", "content": "And then?"})
        await say(client, QUESTION, reply, {"role": "user", "content": "Why?"})
    whole, rewritten, turned = recording.trajectories
    assert [len(sampled(one)) for one in (whole, rewritten, turned)] == [2, 1, 1]
    assert {one.rollout_id for one in (whole, rewritten, turned)} == {recording.rollout_id}
    assert whole.messages[-1]["content"] == second.choices[0].message.content
    begin = len(whole.spans[0].token_ids) + len(whole.spans[1].token_ids)
    assert turned.token_ids[:begin] == whole.token_ids[:begin]  # but the turn is the world's there
    assert rewritten.messages[1]["content"] == edited["content"]


async def test_one_reward_counts_once_for_all_branches_of_a_rollout(client):
    recordings = []
    for branches in (3, 1):
        with record(client) as recording:
            for number in range(branches):
                await say(client, {"role": "user", "content": f"Question {number}?"})
        recordings.append(recording)
    group = TrajectoryGroup((*recordings[0].scored(1.0), *recordings[1].scored(0.0)))
    assert [sample.advantage for sample in make_samples([group], TrainConfig(), step=0)] == [0.5, 0.5, 0.5, -0.5]
    assert [one.reward for one in group.rollouts] == [1.0, 0.0]


async def test_each_of_several_choices_is_a_branch_and_the_chosen_one_goes_on(client):
    with record(client) as recording:
        answer = await say(client, n=3, temperature=1.0)
        chosen = answer.choices[1].message
        await say(client, QUESTION, chosen, {"role": "user", "content": "And then?"})
    *others, longest = recording.trajectories
    assert len(others) == 2
    assert [len(sampled(one)) for one in recording.trajectories] == [1, 1, 2]
    assert longest.messages[1]["content"] == chosen.content


async def stream_of(client, **options):
    return await say(client, stream=True, **options)


async def test_a_stream_passes_unchanged_and_is_recorded(client, toolbox):
    tools = tools_of(toolbox)
    plain = [chunk.model_dump(exclude={"id", "created"}) async for chunk in await stream_of(client, tools=tools)]
    with record(client) as recording:
        seen = [chunk.model_dump(exclude={"id", "created"}) async for chunk in await stream_of(client, tools=tools)]
    whole = await say(client, tools=tools, extra_body={"return_token_ids": True})
    assert seen == plain
    (span,) = sampled(recording.trajectory)
    assert list(span.token_ids) == whole.choices[0].token_ids
    assert recording.trajectory.messages[-1]["tool_calls"][0]["function"]["name"]


async def test_a_stream_that_is_left_after_its_end_was_told_is_recorded_and_one_that_is_left_before_is_not(client):
    with record(client) as recording:
        async for chunk in await stream_of(client):
            if chunk.choices[0].finish_reason:
                break
        assert len(recording.trajectories) == 1
        stream = await stream_of(client)
        async for _ in stream:
            break
        await stream.close()
        assert recording.dropped == ("it was not read to its end",)
        unread = await stream_of(client)
    assert recording.dropped[1:] == ("a stream was not read to its end",)
    await unread.close()
    assert len(recording.trajectories) == 1


async def test_the_helper_for_streams_and_copies_of_the_client_are_recorded_too(client):
    with record(client) as recording:
        async with client.with_options(timeout=30).chat.completions.stream(
            model=MODEL, messages=[QUESTION], max_tokens=8
        ) as stream:
            await stream.until_done()
        async with client.chat.completions.with_streaming_response.create(
            model=MODEL, messages=[QUESTION], max_tokens=8
        ) as answer:
            await answer.parse()
    assert len(recording.trajectories) == 2
    assert recording.dropped == ()


async def test_a_synchronous_client_is_recorded(model):
    base_url, key = model.backend.endpoint(model)

    def agent():
        with OpenAI(base_url=base_url, api_key=key) as client, record(client) as recording:
            asked = {"model": MODEL, "messages": [QUESTION], "max_tokens": 48, "seed": 4}
            answer = client.chat.completions.create(**asked)
            chunks = list(client.chat.completions.create(**asked, stream=True))
            left = client.chat.completions.create(**asked, stream=True)
            next(left)
            left.close()
        return answer, chunks, recording

    answer, chunks, recording = await anyio.to_thread.run_sync(agent)
    whole, streamed = recording.trajectories
    assert answer.choices[0].message.content == whole.answer
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.answer
    assert whole.token_ids == streamed.token_ids
    assert recording.dropped == ("it was not read to its end",)


async def test_rollouts_at_once_on_one_client_stay_apart(client):
    async def play(number):
        with record(client, rollout_id=str(number)) as recording:
            for turn in range(3):
                await say(client, {"role": "user", "content": f"rollout {number}, turn {turn}"})
        return recording

    recordings = await asyncio.gather(*(play(number) for number in range(5)))
    for number, recording in enumerate(recordings):
        asked = [trajectory.messages[0]["content"] for trajectory in recording.trajectories]
        assert asked == [f"rollout {number}, turn {turn}" for turn in range(3)]


async def test_an_agent_with_two_clients_at_once_keeps_its_rollouts_apart(model):
    async with model.openai_client() as one, model.openai_client() as two:
        with record(one) as first, record(two) as second:
            mine, yours = {"role": "user", "content": "mine"}, {"role": "user", "content": "yours"}
            await asyncio.gather(say(one, mine), say(two, yours), say(one, mine), say(two, yours), say(one, mine))
    assert [[one.messages[0] for one in recording.trajectories] for recording in (first, second)] == [[mine] * 3, [yours] * 2]


async def test_only_the_instance_is_patched_and_only_while_it_is_recorded(client, model):
    async with model.openai_client() as other:
        with record(client) as outer:
            with record(client) as inner:
                await say(client)
                await say(other)
            assert "send" in client._client.__dict__
            assert "send" not in other._client.__dict__
            await say(client)
            await say(client)
        assert "send" not in client._client.__dict__
        await say(client)
    assert [len(recording.trajectories) for recording in (outer, inner)] == [2, 1]


async def test_what_is_not_chat_completions_is_told_of(client):
    with record(client) as recording:
        assert MODEL in [model.id async for model in client.models.list()]
        with pytest.raises(NotFoundError):
            await client.responses.create(model=MODEL, input="Hello?")
    assert recording.dropped == ("only chat completions are recorded, and this went to /v1/responses",)
    with pytest.raises(EngineError, match=r"nothing .* was recorded; only chat completions"):
        recording.trajectory  # noqa: B018


async def test_a_rollout_stays_with_the_policy_that_it_began_with(backend):
    model = TrainableModel(name="learner")
    await model.register(backend)
    async with model.openai_client() as client:
        with record(client) as recording:
            await say(client, model="learner")
            with record(client) as earlier:
                await say(client, model="learner", temperature=1.0)
            other = replace(earlier.trajectory, rollout_id="other")
            await model.train([TrajectoryGroup((earlier.trajectory.scored(1.0), other.scored(0.0)))])
            with pytest.raises(NotFoundError, match="learner@0"):
                await say(client, model="learner")
        with record(client) as later:
            await say(client, model="learner")
    assert recording.policy == "learner@0"
    assert later.policy == "learner@1"
    assert {span.policy_version for span in sampled(later.trajectory)} == {1}


async def test_an_endpoint_that_changes_its_policy_in_a_rollout_is_found_out(model):
    answers = []

    def next_step(asked, answer):
        answers.append(bytes(answer.body))  # the first one again, as if by the next policy
        return Response(answers[0].replace(b"tiny@0", b"tiny@%d" % len(answers)), media_type="application/json")

    async with Between(*model.backend.endpoint(model), forge=next_step).client() as client:
        with record(client) as recording:
            await say(client, max_tokens=2)
            await say(client, max_tokens=2)
            with pytest.raises(EngineError, match="tiny@1 answered, and then tiny@2"):
                recording.trajectory  # noqa: B018
            with pytest.raises(EngineError, match="one version of the policy"):
                await say(client, max_tokens=2)
    assert len(answers) == 2


async def test_a_recording_that_is_over_takes_nothing_more(client):
    with record(client) as recording:
        task = asyncio.create_task(say(client, max_tokens=4))
        await task
        late = asyncio.create_task(wait_and_say(client, over := asyncio.Event()))
        await anyio.lowlevel.checkpoint()
    over.set()
    await late
    assert len(recording.trajectories) == 1


async def wait_and_say(client, over):
    await over.wait()
    await say(client, max_tokens=4)


async def test_a_client_of_old_httpx_is_recorded_too(model):
    httpx = pytest.importorskip("httpx")
    base_url, key = model.backend.endpoint(model)
    async with AsyncOpenAI(base_url=base_url, api_key=key, http_client=httpx.AsyncClient()) as client:
        with record(client) as recording:
            await say(client)
            async for _ in await stream_of(client):
                pass
    assert len(recording.trajectories) == 2
