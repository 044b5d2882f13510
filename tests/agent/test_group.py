"""Groups: order, one limit on what is in flight, and what a broken world does to whom."""

import math
import re
import sys
from pathlib import Path

import anyio
import pytest

from art_mcp.agent.group import gather_trajectory_groups
from art_mcp.errors import EngineError, EnvironmentLoadError, ToolServerError
from art_mcp.tools import open_tools
from art_mcp.types import FailedRollout, Limits, ScoredTrajectory, ServerSpec, StopReason, ToolCall
from tests.agent.players import Desk, Obedient, Playhouse, calls, desk_tools, dialect, environment, obedient, said, scenario

pytestmark = pytest.mark.anyio

ODD = str(Path(__file__).parents[1] / "tools" / "odd_server.py")
ADD = calls(("add", {"a": 2, "b": 3}))


async def gather(scenarios, *, model=None, place=None, toolbox=None, **options):
    model, place = model or await obedient(), place or environment()
    if toolbox is not None:
        return await gather_trajectory_groups(scenarios, model=model, environment=place, toolbox=toolbox, **options)
    async with desk_tools() as desk:
        return await gather_trajectory_groups(scenarios, model=model, environment=place, toolbox=desk, **options)


class Watcher:
    def __init__(self):
        self.seen = []

    def finished(self, outcome):
        self.seen.append(outcome)


async def test_groups_stand_in_the_order_of_their_scenarios_and_rollouts_in_that_of_their_numbers():
    scenarios = [scenario("5", id="easy"), scenario(ADD, ADD, "5", id="long"), scenario(ADD, "6", id="wrong")]
    watcher = Watcher()
    groups = await gather(scenarios, rollouts=3, seed=7, step=4, progress=watcher)
    assert [group.scenario for group in groups] == scenarios
    ids = [[one.trajectory.rollout_id for one in group.trajectories] for group in groups]
    assert ids == [[f"7:4:{name}:{number}" for number in range(3)] for name in ("easy", "long", "wrong")]
    assert [[one.reward for one in group.trajectories] for group in groups] == [[1.0] * 3, [1.0] * 3, [0.0] * 3]
    assert sorted(one.trajectory.rollout_id for one in watcher.seen) == sorted(name for names in ids for name in names)
    assert all(isinstance(one, ScoredTrajectory) for one in watcher.seen)


async def test_the_step_of_the_model_keys_the_draws_unless_another_is_given():
    model = await obedient(Playhouse(Obedient, step=9))
    (group,) = await gather([scenario("5")], model=model, rollouts=1)
    assert group.trajectories[0].trajectory.rollout_id == "0:9:one:0"


async def test_rollouts_are_played_with_the_system_message_and_the_limits_of_their_environment():
    place = environment(system="You add.", limits=Limits(turns=1))
    (group,) = await gather([scenario(ADD, "5")], place=place, rollouts=1)
    (played,) = [one.trajectory for one in group.trajectories]
    assert played.messages[0] == {"role": "system", "content": "You add."}
    assert played.stop_reason is StopReason.TURN_LIMIT


async def test_a_scenario_that_stands_twice_in_a_batch_is_drawn_anew():
    groups = await gather([scenario("5"), scenario("5", id="two"), scenario("5")], rollouts=2, step=0)
    ids = [one.trajectory.rollout_id for group in groups for one in group.trajectories]
    assert ids == ["0:0:one:0", "0:0:one:1", "0:0:two:0", "0:0:two:1", "0:0:one:2", "0:0:one:3"]


@pytest.mark.parametrize(("concurrency", "most"), [(1, 1), (3, 3), (100, 8)])
async def test_the_limit_on_rollouts_in_flight_holds_over_all_groups(concurrency, most):
    sampler = Obedient()
    model = await obedient(Playhouse(lambda: sampler))
    scenarios = [scenario(ADD, "5", id=str(number)) for number in range(4)]
    groups = await gather(scenarios, model=model, rollouts=2, concurrency=concurrency)
    assert sampler.most == most
    assert sum(len(group.trajectories) for group in groups) == 8


async def test_no_rollouts_time_pays_for_an_engine_that_is_started_anew():
    deadlines = []

    class Reviving(Playhouse):
        """Its engine has died: it can be sampled from once somebody waited until it is ready."""

        sampling = False

        async def ready(self, trainable):
            deadlines.append(anyio.current_effective_deadline())
            await anyio.lowlevel.checkpoint()
            self.sampling = True

    class Timed(Obedient):
        """It dies with each turn."""

        async def sample(self, token_ids, **options):
            assert house.sampling
            assert anyio.current_effective_deadline() < math.inf
            turn = await super().sample(token_ids, **options)
            house.sampling = False
            return turn

    house = Reviving(Timed)
    (group,) = await gather([scenario(ADD, ADD, "5")], model=await obedient(house), rollouts=2, concurrency=1)
    assert [one.reward for one in group.trajectories] == [1.0] * 2
    assert deadlines == [math.inf] * 6


async def test_an_engine_that_cannot_be_started_fails_each_rollout_and_no_other_batch():
    class Dead(Playhouse):
        dead = True

        async def ready(self, trainable):
            if self.dead:
                raise EngineError("these weights are broken")

    house = Dead(Obedient)
    model = await obedient(house)
    (group,) = await gather([scenario("5")], model=model, rollouts=2)
    assert [(failure.kind, failure.message) for failure in group.failures] == [("EngineError", "these weights are broken")] * 2
    assert group.trajectories == ()
    house.dead = False
    (group,) = await gather([scenario("5")], model=model, rollouts=2)
    assert group.failures == ()


async def test_a_dead_server_fails_the_rollouts_that_need_it_and_no_others():
    def odd(name):
        return ServerSpec(name, "stdio", command=sys.executable, args=(ODD,))

    async with open_tools([odd("mortal"), odd("steady")]) as toolbox:
        dying = scenario(calls(("mortal_die", {})), "5", id="dying")
        steady = scenario(calls(("steady_add", {"a": 2, "b": 3})), "5", id="steady")
        with anyio.fail_after(30):
            first, second = await gather([dying, steady], toolbox=toolbox, rollouts=3, step=0)
        with anyio.fail_after(30):
            (later,) = await gather([steady], toolbox=toolbox, rollouts=1)
        with pytest.raises(ToolServerError):
            await toolbox.call(ToolCall("mortal_add", {"a": 1, "b": 1}))
    assert first.trajectories == ()
    assert [failure.rollout_id for failure in first.failures] == [f"0:0:dying:{number}" for number in range(3)]
    assert {failure.kind for failure in first.failures} == {"ToolServerError"}
    assert all("mortal" in failure.message for failure in first.failures)
    assert [one.reward for one in (*second.trajectories, *later.trajectories)] == [1.0] * 4
    assert second.failures == ()


async def test_parallel_calls_that_lose_their_server_together_make_one_failure():
    async with open_tools([ServerSpec("odd", "stdio", command=sys.executable, args=(ODD,))]) as toolbox:
        waiting = calls(("pause", {"seconds": 100}), ("pause", {"seconds": 100}), ("die", {}))
        with anyio.fail_after(30):
            (group,) = await gather([scenario(waiting, "5")], toolbox=toolbox, rollouts=1)
    assert [failure.kind for failure in group.failures] == ["ToolServerError"]


async def test_a_failing_reward_fails_its_rollout_and_names_its_place():
    def picky(trajectory):
        return float(trajectory.scenario.facts["weight"])

    place = environment(rewards={"said": said, "picky": picky})
    watcher = Watcher()
    bad, good = await gather([scenario("5"), scenario("5", id="two", weight=1)], place=place, rollouts=2, progress=watcher)
    assert bad.trajectories == ()
    assert {failure.kind for failure in bad.failures} == {"RewardError"}
    assert "reward 'picky': KeyError: 'weight'" in bad.failures[0].message
    assert "test_group.py, line " in bad.failures[0].message
    assert [one.parts for one in good.trajectories] == [{"said": 1.0, "picky": 1.0}] * 2
    assert sum(isinstance(outcome, FailedRollout) for outcome in watcher.seen) == 2


async def test_a_reward_may_call_tools_that_the_policy_is_not_offered_and_one_that_no_server_has_is_told_with_its_line():
    async def written(trajectory, toolbox):
        tool = trajectory.scenario.facts.get("tool", "write")
        assert (await toolbox.call(ToolCall(tool, {"text": trajectory.scenario.id}))).text == "written"
        return 1.0

    desk = Desk()
    wants_to_write = scenario(calls(("write", {"text": "by the policy"})), "5", id="wants")
    wrong = scenario("5", id="wrong", tool="wrte")
    async with desk_tools(desk, only=["add"]) as toolbox:
        place = environment(rewards={"written": written})
        played, failed = await gather([wants_to_write, wrong], place=place, toolbox=toolbox, rollouts=1)
    assert desk.log == ["begin wants", "end wants"]
    (scored,) = played.trajectories
    assert scored.parts == {"written": 1.0}
    assert 'there is no tool "write". The only tool is "add"' in scored.trajectory.uses[0].result.text
    (failure,) = failed.failures
    assert failure.kind == "RewardError"
    told = r"reward 'written': LookupError: no server has a tool 'wrte'; did you mean 'write'\? there are: .*"
    assert re.match(told + r"test_group\.py, line \d+", failure.message)


class Confused:
    """A dialect with a bug."""

    def __getattr__(self, name):
        return getattr(dialect(), name)

    def read(self, token_ids, tools):
        raise KeyError("a bug")


async def test_a_bug_is_not_swallowed_but_raised_as_it_is():
    model = await obedient(Playhouse(Obedient, own_dialect=Confused()))
    with pytest.raises(KeyError, match="a bug"):
        await gather([scenario("5")], model=model, rollouts=4)


async def test_a_failure_that_is_not_the_worlds_reaches_the_caller_by_its_name():
    async def lost(trajectory):
        raise EnvironmentLoadError("not a rollout's failure")

    with pytest.raises(EnvironmentLoadError, match="not a rollout's failure"):
        await gather([scenario("5")], place=environment(rewards={"lost": lost}), rollouts=4)


async def test_a_cancelled_batch_ends():
    with anyio.move_on_after(60) as scope:
        await gather([scenario(calls(("nap", {"seconds": 60})), "5")], rollouts=4)
    assert scope.cancelled_caught
