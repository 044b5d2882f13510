"""Several servers, each of which plays vLLM's part, as one engine: who gets which request, and what a dead one takes along."""

import asyncio
import json
import signal
import stat
import sys
from pathlib import Path

import psutil
import pytest

from art_mcp.agent.group import gather_trajectory_groups
from art_mcp.errors import ConfigError, EngineError
from art_mcp.sampling.vllm_args import Served, VllmSettings
from art_mcp.sampling.vllm_replicas import open_engine
from art_mcp.types import Limits, SamplingParams, StopReason
from tests.agent.players import Obedient, Playhouse, calls, desk_tools, environment, obedient, scenario
from tests.processes import remaining

pytestmark = pytest.mark.anyio

FAKE = Path(__file__).with_name("fake_vllm.py")
SHARED = (1, 2, 3)
"""What all conversations begin with."""


@pytest.fixture
async def engine(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("art_mcp.sampling.vllm_server.POLL_SECONDS", 0.02)  # the fake starts in a moment
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "base").mkdir()
    served = Served("policy", str(tmp_path / "base"), "float32", lora_rank=4)
    engine = open_engine(served, VllmSettings(str(script), replicas=2))
    engine.begin()
    await engine.start(0, version(tmp_path, 0))
    yield engine
    await engine.close()


def version(tmp_path, step, *, broken=False):
    folder = tmp_path / f"v{step}"
    folder.mkdir()
    (folder / ("broken" if broken else "weights")).write_text("weights")
    return folder


async def draw(engine, prompt, *, shared=3):
    return await engine.sample(prompt, params=SamplingParams(max_tokens=4), stop=frozenset(), shared=shared)


async def post(engine, path):
    for server in engine.servers:
        if server.alive:
            assert (await server.connections.post(path, {}))[0] == 200


async def told(engine):
    """What each server has been asked since its start."""
    answers = [json.loads((await server.connections.get("/told"))[1])[1] for server in engine.servers]
    return [[line for line in lines if not line.endswith(" policy")] for lines in answers]


async def begun(engine):
    """How many turns each server has begun."""
    return [sum(line.startswith("begin") for line in lines) for lines in await told(engine)]


async def in_flight(engine, prompts, *, shared=3):
    """One request for each prompt, the next when a server has the one before; all are held."""
    await post(engine, "/hold")
    before = sum(await begun(engine))
    tasks = []
    for prompt in prompts:
        tasks.append(asyncio.create_task(draw(engine, prompt, shared=shared)))
        while True:
            if sum(await begun(engine)) == before + len(tasks):
                break
            await asyncio.sleep(0.01)
    return tasks


def kill(server):
    launcher = psutil.Process(server._process.pid)
    (child,) = [process for process in launcher.children() if str(FAKE) in process.cmdline()]
    child.send_signal(signal.SIGKILL)
    return launcher


def keep_from_starting(server, tmp_path):
    """Kills a server; the next one does not answer before the file that this returns is gone."""
    slow = tmp_path / "base" / f"slow-{server.connections.port}"
    slow.touch()
    kill(server).wait(60)
    return slow


async def mended(engine):
    """Returns when all that died have been started."""
    await asyncio.gather(*engine._mending.values())
    assert all(one.available for one in engine.engines)


async def test_new_conversations_go_to_the_idlest_and_stay_where_they_began(engine):
    prompts = [(*SHARED, number) for number in (10, 20, 30, 40)]
    tasks = await in_flight(engine, prompts)
    assert await begun(engine) == [2, 2]
    await post(engine, "/release")
    turns = [await task for task in tasks]
    assert [turn.span.token_ids for turn in turns] == [tuple(range(n + 1, n + 5)) for n in (10, 20, 30, 40)]
    for place in (1, 3):  # nobody is busy, so a new conversation would begin at the first server
        again = (*prompts[place], *turns[place].span.token_ids, 60)
        third = (*again, *(await draw(engine, again)).span.token_ids, 70)
        await draw(engine, third)
    assert await begun(engine) == [2, 6]
    await draw(engine, (*SHARED, 50))
    assert await begun(engine) == [3, 6]


async def test_conversations_are_told_apart_where_nothing_is_said_to_be_shared(engine):
    long = tuple(range(1, 40))
    tasks = await in_flight(engine, [(*long, 41), (*long, 42)], shared=0)
    assert await begun(engine) == [1, 1]
    await post(engine, "/release")
    (_, turn) = await asyncio.gather(*tasks)
    await draw(engine, (*long, 42, *turn.span.token_ids, 50), shared=0)
    assert await begun(engine) == [1, 2]


async def test_a_version_is_published_when_all_have_it_and_each_removes_its_own_files(engine, tmp_path):
    old = await in_flight(engine, [(*SHARED, 10), (*SHARED, 20)])
    assert engine.policy.step == 0
    await engine.publish(1, version(tmp_path, 1))
    assert engine.policy.step == 1
    assert sorted(path.name for path in tmp_path.glob("v*")) == ["v0", "v0-1", "v1", "v1-1"]
    await post(engine, "/release")
    assert [(await task).span.policy_version for task in old] == [0, 0]
    new = await in_flight(engine, [(*SHARED, 30), (*SHARED, 40)])
    await post(engine, "/release")
    assert [(await task).span.policy_version for task in new] == [1, 1]
    for lines in await told(engine):
        assert [line for line in lines if "load" in line] == ["load policy@0", "load policy@1", "unload policy@0"]
    assert sorted(path.name for path in tmp_path.glob("v*")) == ["v1", "v1-1"]
    assert (tmp_path / "v1-1" / "weights").read_text() == "weights"


async def test_a_refused_adapter_raises_and_the_old_policy_goes_on(engine, tmp_path):
    with pytest.raises(EngineError, match="Loading lora policy@1 failed"):
        await engine.publish(1, version(tmp_path, 1, broken=True))
    assert engine.policy.step == 0
    assert (await draw(engine, (*SHARED, 10))).span.policy_version == 0


async def test_a_dead_replica_fails_its_own_requests_and_the_other_takes_its_conversations(engine, tmp_path):
    await engine.publish(1, version(tmp_path, 1))
    turn = await draw(engine, (*SHARED, 9))
    first, second = await in_flight(engine, [(*SHARED, 10), (*SHARED, 20)])
    kill(engine.servers[0])
    with pytest.raises(EngineError, match="its log:"):
        await first
    await post(engine, "/release")
    assert (await second).span.policy_version == 1
    before = (await engine.servers[1].connections.get("/told"))[1].count(b"begin policy@1")
    again = await draw(engine, (*SHARED, 9, *turn.span.token_ids, 50))  # of the dead one
    assert again.span.policy_version == 1
    assert (await engine.servers[1].connections.get("/told"))[1].count(b"begin policy@1") == before + 1
    await mended(engine)
    assert (await told(engine))[0] == ["load policy@1"]
    assert (await draw(engine, (*SHARED, 30))).span.policy_version == 1
    assert await begun(engine) == [1, before + 1]


async def test_weights_published_while_one_is_dead_are_those_of_its_next_start(engine, tmp_path):
    kill(engine.servers[1]).wait(60)
    await engine.publish(1, version(tmp_path, 1))
    await mended(engine)
    assert (await told(engine))[1] == ["load policy@1"]


async def test_nobody_waits_for_a_replica_that_starts_and_it_begins_with_the_newest_weights(engine, tmp_path):
    slow = keep_from_starting(engine.servers[0], tmp_path)
    for step in (1, 2):
        await engine.ready()
        turns = [await draw(engine, (*SHARED, number)) for number in (10, 20, 30)]
        assert {turn.span.policy_version for turn in turns} == {step - 1}
        await engine.publish(step, version(tmp_path, step))
        assert engine.policy.step == step
    assert not engine.engines[0].available
    slow.unlink()
    await mended(engine)
    assert (await told(engine))[0] == ["load policy@2"]
    tasks = await in_flight(engine, [(*SHARED, 40), (*SHARED, 50)])
    await post(engine, "/release")
    assert [(await task).span.policy_version for task in tasks] == [2, 2]
    assert (await begun(engine))[0] == 1
    assert sorted(path.name for path in tmp_path.glob("v*")) == ["v2", "v2-1"]


async def test_where_no_replica_is_left_the_first_that_starts_is_waited_for(engine, tmp_path):
    slow, _ = [keep_from_starting(server, tmp_path) for server in engine.servers]
    turn = asyncio.create_task(draw(engine, (*SHARED, 10)))
    slow.unlink()
    await engine.ready()
    assert (await turn).span.policy_version == 0
    assert [one.available for one in engine.engines] == [True, False]


async def test_a_rollout_that_runs_out_of_time_while_a_replica_starts_ran_out_of_its_own(engine, tmp_path):
    class House(Playhouse):
        async def ready(self, trainable):
            await engine.ready()

    class Once(Obedient):
        """Its second turn never comes."""

        async def sample(self, token_ids, **options):
            if self.temperatures:
                await asyncio.Event().wait()
            return await super().sample(token_ids, **options)

    keep_from_starting(engine.servers[0], tmp_path)
    sampler = Once()
    place, model = environment(limits=Limits(seconds=1.0)), await obedient(House(lambda: sampler))
    once = scenario(calls(("add", {"a": 2, "b": 3})), "5")
    async with desk_tools() as desk:
        (group,) = await gather_trajectory_groups([once], model=model, environment=place, toolbox=desk, rollouts=1)
    assert [one.trajectory.stop_reason for one in group.trajectories] == [StopReason.TIME_LIMIT]
    assert not engine.engines[0].available


async def test_a_replica_that_does_not_start_again_leaves_the_work_to_the_other(engine, tmp_path, capsys):
    def attempts():
        return capsys.readouterr().err.count("one of 2 engine replicas does not start: vLLM ended with exit code 1")

    kill(engine.servers[0]).wait(60)
    (tmp_path / "base" / "broken").touch()
    turns = await asyncio.gather(*(draw(engine, (*SHARED, number)) for number in range(10, 14)))
    assert {turn.span.policy_version for turn in turns} == {0}
    for step in (1, 2):
        await asyncio.wait(engine._mending.values())
        await asyncio.gather(*(engine.ready() for _ in range(4)))  # which does not try it again
        await asyncio.wait(engine._mending.values())
        assert attempts() == 1
        await engine.publish(step, version(tmp_path, step))
        assert (engine.policy.step, (await draw(engine, (*SHARED, 30))).span.policy_version) == (step, step)
    kill(engine.servers[1]).wait(60)
    with pytest.raises(EngineError, match="these weights are broken"):
        await engine.ready()
    with pytest.raises(EngineError, match="these weights are broken"):
        await draw(engine, (*SHARED, 40))
    (tmp_path / "base" / "broken").unlink()
    assert (await draw(engine, (*SHARED, 40))).span.policy_version == 2


async def test_weights_that_no_replica_was_left_to_take_are_those_of_the_next_start(engine, tmp_path):
    (tmp_path / "base" / "broken").touch()
    for server in engine.servers:
        kill(server).wait(60)
    with pytest.raises(EngineError, match="these weights are broken"):
        await engine.publish(1, version(tmp_path, 1))
    (tmp_path / "base" / "broken").unlink()
    again = tmp_path / "again"
    again.mkdir()
    await engine.publish(1, again)
    assert not again.exists()
    assert (await draw(engine, (*SHARED, 10))).span.policy_version == 1


async def test_closing_ends_what_waits_for_a_replica_and_leaves_no_task(engine, tmp_path, capsys):
    keep_from_starting(engine.servers[0], tmp_path)
    before = asyncio.all_tasks()
    await engine.ready()
    keep_from_starting(engine.servers[1], tmp_path)
    late = asyncio.create_task(engine.ready())
    while True:
        if all(server.alive for server in engine.servers):
            break
        await asyncio.sleep(0.01)
    assert len(asyncio.all_tasks() - before) > 2
    await engine.close()
    with pytest.raises(EngineError, match="closed"):
        await late
    assert asyncio.all_tasks() == before
    assert "does not start" not in capsys.readouterr().err
    with pytest.raises(EngineError, match="the engine is closed"):
        await engine.ready()


async def test_closing_leaves_no_process(engine):
    launchers = [psutil.Process(server._process.pid) for server in engine.servers]
    family = [process for launcher in launchers for process in (launcher, *launcher.children(recursive=True))]
    await engine.close()
    assert remaining(family) == []


def test_an_engine_has_at_least_one_replica():
    with pytest.raises(ConfigError, match="one replica or more, not 0"):
        open_engine(Served("policy", "base", "float32"), VllmSettings(replicas=0))
