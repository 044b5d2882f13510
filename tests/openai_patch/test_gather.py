"""Groups of any agent's rollouts: what is asked for in its name, what fails, what is learned."""

import asyncio
import math

import anyio
import pytest
from openai import AsyncOpenAI

from art_mcp import TrainableModel
from art_mcp.agent.loop import summarize
from art_mcp.errors import EngineError, TrainError
from art_mcp.openai_patch import gather_agent_groups
from art_mcp.types import Malformed, Scenario
from tests.agent.players import Watcher
from tests.clocks import skip
from tests.openai_patch.agents import Between

pytestmark = pytest.mark.anyio

SCENARIOS = (Scenario("sum", "What is the sum of 19 and 98?"), Scenario("minus", "What is 93 minus 36?"))


async def ask(client, scenario, **options):
    messages = [{"role": "user", "content": scenario.prompt}]
    answer = await client.chat.completions.create(model="gpt-4o", messages=messages, max_tokens=8, **options)
    return answer.choices[0].message.content


def even(recording, answer):
    return float(len(answer) % 2 == 0)


async def test_every_call_goes_to_the_model_from_its_whole_distribution_with_a_seed_of_its_own(model):
    between = Between(*model.backend.endpoint(model))
    async with between.client() as client:

        async def agent(client, scenario):
            await ask(client, scenario, temperature=0, top_p=0.1)
            return await ask(client, scenario, seed=11)

        groups = await gather_agent_groups(agent, SCENARIOS, model=model, reward=even, client=client, rollouts=2)
    assert [len(group.rollouts) for group in groups] == [2, 2]
    assert [group.scenario for group in groups] == list(SCENARIOS)
    assert {told["model"] for told in between.told} == {"tiny", "tiny@0"}
    assert {told["temperature"] for told in between.told} == {1.0}
    assert not any("top_p" in told for told in between.told)
    seeds = [told["seed"] for told in between.told]
    assert seeds.count(11) == 4
    assert len(set(seeds)) == 5


async def test_the_same_key_gives_the_same_rollouts_and_another_step_others(model):
    options = {"model": model, "reward": even, "rollouts": 2}
    runs = [await gather_agent_groups(ask, SCENARIOS, step=step, **options) for step in (0, 0, 1)]
    first, again, other = [[one.trajectory.token_ids for group in run for one in group.trajectories] for run in runs]
    assert first == again != other


async def test_an_agent_or_a_reward_that_raises_fails_its_rollout_alone(model):
    tried = {"sum": 0, "minus": 0}

    async def agent(client, scenario):
        tried[scenario.id] += 1
        answer = await ask(client, scenario)
        if scenario.id == "sum" and tried["sum"] == 1:
            raise KeyError("lost")
        return answer

    def picky(recording, answer):
        if recording.scenario.id == "minus":
            raise ZeroDivisionError("no")
        return 1.0

    watcher = Watcher()
    good, bad = await gather_agent_groups(
        agent, SCENARIOS, model=model, reward=picky, rollouts=3, concurrency=1, progress=watcher
    )
    assert [(one.kind, one.rollout_id) for one in good.failures] == [("AgentError", "0:0:sum:0")]
    assert "the agent: KeyError: 'lost'" in good.failures[0].message
    assert "test_gather.py" in good.failures[0].message
    assert len(good.trajectories) == 2
    assert [one.kind for one in bad.failures] == ["RewardError"] * 3
    assert len(watcher.seen) == 6


async def silent(client, scenario):
    return "I know."


async def endless(client, scenario):
    await ask(client, scenario)
    skip(60)
    await anyio.sleep_forever()


async def undecided(recording, answer):
    skip(300)
    await anyio.sleep_forever()


@pytest.mark.parametrize(
    ("agent", "reward", "reason"),
    [
        (ask, undecided, "RewardError: the reward had not ended after 300 s: mend it, or raise reward_seconds"),
        (silent, even, "AgentError: the agent never asked the policy"),
        (endless, even, "AgentError: the agent had not ended after 60 s"),
        (ask, lambda recording, answer: float("nan"), "RewardError: the reward is nan"),
        (ask, lambda recording, answer: {"a": "b"}, "RewardError: the reward: ValueError"),
    ],
)
async def test_where_every_rollout_fails_the_first_reason_is_told(model, agent, reward, reason):
    with pytest.raises(TrainError, match=reason):
        await gather_agent_groups(agent, SCENARIOS[:1], model=model, reward=reward, rollouts=2, seconds=60)


class Dying:
    """An engine that is dead whenever somebody waits for it, and is another one then. `limits`: what time those had who did."""

    def __init__(self, monkeypatch, model, *, failures=()):
        self.limits, self.loops, self.failures = [], set(), list(failures)
        monkeypatch.setattr(model.backend, "ready", self.ready)

    async def ready(self, trainable):
        self.limits.append(anyio.current_effective_deadline())
        self.loops.add(asyncio.get_running_loop())
        await anyio.lowlevel.checkpoint()
        if self.failures and (failure := self.failures.pop(0)):
            raise failure


async def test_no_agents_time_pays_for_an_engine_that_is_started_anew(model, monkeypatch):
    engine, begun = Dying(monkeypatch, model), []

    async def agent(client, scenario):
        begun.append(len(engine.limits))
        for _ in range(2):
            assert anyio.current_effective_deadline() < math.inf
            answer = await ask(client, scenario)
        return answer

    (group,) = await gather_agent_groups(agent, SCENARIOS[:1], model=model, reward=even, rollouts=2, concurrency=1)
    assert len(group.rollouts) == 2
    assert begun == [1, 4]  # it is awaited before the agent begins
    assert engine.limits == [math.inf] * 6


async def test_an_engine_that_cannot_be_started_is_not_the_agents_failure(model, monkeypatch):
    async def wordy(client, scenario):
        try:
            return await ask(client, scenario)
        except EngineError as error:
            raise ConnectionError("Connection error.") from error

    async def patient(client, scenario):
        try:
            return await ask(client, scenario)
        except EngineError:
            return await ask(client, scenario)

    dead = EngineError("these weights are broken")
    for agent, failures in ((ask, [dead]), (ask, [None, dead]), (wordy, [None, dead]), (patient, [None, dead, dead])):
        Dying(monkeypatch, model, failures=failures)
        with pytest.raises(TrainError, match="EngineError: these weights are broken"):
            await gather_agent_groups(agent, SCENARIOS[:1], model=model, reward=even, rollouts=1)
    Dying(monkeypatch, model, failures=[None, dead])
    (group,) = await gather_agent_groups(patient, SCENARIOS[:1], model=model, reward=even, rollouts=1)
    assert group.failures == ()


async def test_an_agent_in_a_thread_waits_for_the_engine_where_that_runs(model, monkeypatch):
    engine = Dying(monkeypatch, model)

    async def agent(client, scenario):
        # a connection is of the loop that opened it
        return await asyncio.to_thread(asyncio.run, ask(client, scenario, extra_headers={"Connection": "close"}))

    (group,) = await gather_agent_groups(agent, SCENARIOS[:1], model=model, reward=even, rollouts=2, concurrency=1)
    assert len(group.rollouts) == 2
    assert len(engine.limits) == 4
    assert engine.loops == {asyncio.get_running_loop()}


async def test_an_endpoint_that_is_gone_fails_the_rollout(model):
    async with Between(*model.backend.endpoint(model)).client() as client:
        base_url = client.base_url
    async with AsyncOpenAI(base_url=base_url, api_key="k", max_retries=0) as gone:
        with pytest.raises(TrainError, match=r"AgentError: the agent: APIConnectionError: .*test_gather\.py"):
            await gather_agent_groups(ask, SCENARIOS, model=model, reward=even, client=gone, rollouts=1)


async def test_a_reward_may_have_parts_and_branches_count_once_in_a_steps_figures(backend):
    model = TrainableModel(name="trained")
    await model.register(backend)

    async def agent(client, scenario):
        await ask(client, scenario)
        return await ask(client, Scenario("", f"{scenario.prompt} Really?"))

    async def judge(recording, answer):
        first = recording.rollout_id.endswith(":0")
        return {"first": float(first), "branches": -0.25 * len(recording.trajectories) if first else 0.0}

    (group,) = await gather_agent_groups(agent, SCENARIOS[:1], model=model, reward=judge, rollouts=4)
    assert len(group.trajectories) == 8
    assert [one.reward for one in group.rollouts] == [0.5, 0.0, 0.0, 0.0]
    figures = summarize([group])
    assert figures["reward"] == 0.125
    assert figures["reward/first"] == 0.25
    assert figures["rollouts"] == 4
    metrics = await model.train([group])
    assert metrics["gradient_norm"] > 0


async def test_calls_that_could_not_be_made_are_counted(model):
    async def agent(client, scenario):  # who offers no tools, so that no call can be made
        messages = [{"role": "user", "content": scenario.prompt}]
        return (
            (await client.chat.completions.create(model="gpt-4o", messages=messages, max_tokens=64)).choices[0].message.content
        )

    (group,) = await gather_agent_groups(agent, SCENARIOS[:1], model=model, reward=even, rollouts=2)
    for one in group.trajectories:
        (use,) = one.trajectory.uses
        assert isinstance(use.call, Malformed)
        assert use.turn == 0
        assert one.trajectory.malformed == 1
