"""The training loop on a policy that does as told: its order of work, its cursor, its stops."""

import gc
import math
from time import monotonic

import anyio
import pytest

from art_mcp.agent.loop import Plan, pick, summarize, train_loop
from art_mcp.errors import EngineError, EnvironmentLoadError, TrainError
from art_mcp.types import (
    FailedRollout,
    Malformed,
    MalformedKind,
    Scenario,
    Span,
    StopReason,
    ToolCall,
    ToolResult,
    ToolUse,
    TrainConfig,
    Trajectory,
    TrajectoryGroup,
)
from tests.agent.players import Obedient, Playhouse, Watcher, desk_tools, environment, obedient, scenario

pytestmark = pytest.mark.anyio


class Notebook:
    """A Recorder that remembers, and what was saved when."""

    def __init__(self):
        self.events = []
        self.lines = {}

    def groups(self, step, groups):
        self.events.append(f"groups {step}")

    def metrics(self, step, values):
        self.events.append(f"metrics {step}")
        self.lines[step] = values

    async def save(self, step):
        await anyio.lowlevel.checkpoint()  # writing takes time, in which it could be cancelled
        self.events.append(f"save {step}")

    @property
    def saved(self):
        return [event for event in self.events if event.startswith("save")]


TWO = (scenario("5"), scenario("6", id="two"))


async def loop(plan, *, house=None, notebook=None, scenarios=TWO, spent=0.0, config=None, progress=None, **fields):
    house, notebook = house or Playhouse(Obedient), notebook or Notebook()
    async with desk_tools() as toolbox:
        seconds = await train_loop(
            await obedient(house),
            environment(*scenarios, **fields),
            toolbox=toolbox,
            plan=plan,
            config=config or TrainConfig(),
            recorder=notebook,
            save=notebook.save,
            progress=progress,
            spent=spent,
        )
    return notebook, seconds


async def test_no_collection_looks_at_what_is_older_than_the_run_until_it_ends():
    before, frozen = gc.get_freeze_count(), []

    class Counting(Notebook):
        def groups(self, step, groups):
            frozen.append(gc.get_freeze_count())

    await loop(Plan(steps=3, groups=2, rollouts=2), notebook=Counting())
    assert len(frozen) == 3
    assert min(frozen) > before + 1000
    assert gc.get_freeze_count() <= before


def test_every_scenario_comes_once_in_each_pass_and_each_pass_has_its_own_order():
    scenarios = [Scenario(str(number), "") for number in range(10)]
    walk = [one.id for step in range(10) for one in pick(scenarios, step=step, count=3, seed=1)]
    passes = [walk[start : start + 10] for start in range(0, 30, 10)]
    assert all(sorted(one) == sorted(walk[:10]) for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    assert len(set(walk[:10])) == 10
    assert [one.id for one in pick(scenarios, step=0, count=30, seed=1)] == walk
    assert [one.id for one in pick(scenarios, step=0, count=30, seed=2)] != walk


async def test_a_step_is_rolled_out_trained_recorded_and_saved_in_this_order():
    notebook, seconds = await loop(Plan(steps=3, groups=1, rollouts=2, save_every=2))
    made = [f"{what} {step}" for step in range(3) for what in ("groups", "metrics")]
    assert notebook.events == [*made[:4], "save 2", *made[4:], "save 3"]
    line = notebook.lines[2]
    assert line["loss"] == 0.25
    assert line["rollouts"] == 2
    assert 0 <= line["seconds_rollout"] <= line["seconds_total"] <= seconds
    assert 0 <= line["seconds_train"] <= line["seconds_total"]


async def test_rollouts_are_played_as_the_plan_and_the_config_say_and_are_watched():
    sampler, watcher = Obedient(), Watcher()
    plan, config = Plan(steps=1, groups=2, rollouts=4, concurrency=3), TrainConfig(temperature=0.75)
    await loop(plan, house=Playhouse(lambda: sampler), config=config, progress=watcher)
    assert sampler.temperatures == [0.75] * 8
    assert sampler.most == 3
    assert len(watcher.seen) == 8


async def test_the_seconds_of_a_step_are_those_of_its_rollouts_and_of_its_training():
    class Slow(Obedient):
        async def sample(self, token_ids, **options):
            await anyio.sleep(0.05)
            return await super().sample(token_ids, **options)

    class Thorough(Playhouse):
        async def train(self, trainable, groups, *, config):
            await anyio.sleep(0.1)
            return await super().train(trainable, groups, config=config)

    notebook, _ = await loop(Plan(steps=1, groups=1, rollouts=1), house=Thorough(Slow))
    line = notebook.lines[0]
    assert line["seconds_rollout"] >= 0.05
    assert line["seconds_train"] >= 0.1
    assert line["seconds_total"] >= line["seconds_rollout"] + line["seconds_train"]


async def test_a_loop_that_is_to_save_at_the_end_alone_does():
    notebook, _ = await loop(Plan(steps=2, groups=1, rollouts=1, save_every=0))
    assert notebook.saved == ["save 2"]


async def test_the_groups_of_a_step_are_the_walk_through_the_split():
    house = Playhouse(Obedient)
    scenarios = [scenario("5", id=str(number)) for number in range(3)]
    await loop(Plan(steps=3, groups=2, rollouts=2, seed=5), house=house, scenarios=scenarios)
    played = [[group.scenario for group in groups] for groups in house.trained]
    assert played == [pick(scenarios, step=step, count=2, seed=5) for step in range(3)]
    assert house.trained[1][0].trajectories[0].trajectory.rollout_id.startswith("5:1:")


async def test_a_loop_goes_on_from_the_step_of_its_model():
    notebook, _ = await loop(Plan(steps=5, groups=1, rollouts=2), house=Playhouse(Obedient, step=3))
    assert list(notebook.lines) == [3, 4]
    assert notebook.saved == ["save 5"]


async def test_a_loop_that_has_nothing_left_to_do_leaves_its_checkpoint_alone():
    for plan in (Plan(steps=3), Plan(seconds=0.0)):
        began = monotonic()
        notebook, seconds = await loop(plan, house=Playhouse(Obedient, step=3), spent=12.0)
        assert notebook.events == []
        assert 12.0 <= seconds <= 12.0 + monotonic() - began


async def test_a_loop_without_steps_saves_what_it_began_with():
    assert (await loop(Plan(steps=0)))[0].events == ["save 0"]


async def test_seconds_spent_before_a_resume_count():
    notebook, seconds = await loop(Plan(seconds=1000.0, steps=2, groups=1, rollouts=2), spent=500.0)
    assert notebook.lines[0]["seconds_total"] >= 500.0
    assert seconds >= notebook.lines[1]["seconds_total"]
    notebook, _ = await loop(Plan(seconds=1000.0, steps=2, groups=1, rollouts=2), spent=1000.0)
    assert notebook.lines == {}


class Mortal(Playhouse):
    """Its engine dies in the first batches of two groups of two, so many of them, and is another for the batch that follows."""

    def __init__(self, deaths):
        super().__init__(self.turns)
        self.deaths, self.waited = deaths, 0

    async def ready(self, trainable):
        self.waited += 1
        await anyio.lowlevel.checkpoint()

    def turns(self):
        house = self

        class Dying(Obedient):
            async def sample(self, token_ids, **options):
                if house.waited <= 4 * house.deaths:
                    raise EngineError("vLLM was killed by SIGKILL")
                return await super().sample(token_ids, **options)

        return Dying()


async def test_a_batch_that_lost_its_engine_is_played_once_more_with_the_one_that_follows():
    house = Mortal(deaths=1)
    notebook, _ = await loop(Plan(steps=2, groups=2, rollouts=2), house=house)
    assert [(notebook.lines[step]["rollouts"], notebook.lines[step]["failed_rollouts"]) for step in (0, 1)] == [(4, 4), (4, 0)]
    ids = [one.trajectory.rollout_id for groups in house.trained for group in groups for one in group.trajectories]
    assert len(ids) == len(set(ids)) == 8
    assert house.waited == 3 * 4


async def test_an_engine_that_dies_again_in_the_same_batch_ends_the_run():
    house = Mortal(deaths=2)
    with pytest.raises(TrainError, match="every rollout failed, first with EngineError: vLLM was killed by SIGKILL"):
        await loop(Plan(steps=2, groups=2, rollouts=2), house=house)
    assert house.waited == 2 * 4


async def test_a_step_in_which_every_rollout_failed_stops_the_run_with_the_first_failure_and_a_checkpoint():
    def broken(trajectory):
        raise ValueError("out of order")

    notebook = Notebook()
    with pytest.raises(
        TrainError, match="every rollout failed, first with RewardError: reward 'broken': ValueError: out of order"
    ):
        await loop(Plan(steps=2), rewards={"broken": broken}, notebook=notebook)
    assert notebook.events == ["save 0"]


async def test_a_cancelled_loop_saves_the_last_step_that_it_recorded():
    class Interrupted(Obedient):
        async def sample(self, token_ids, **options):
            if house.step == 1:
                scope.cancel()
            return await super().sample(token_ids, **options)

    notebook, house = Notebook(), Playhouse(Interrupted)
    with anyio.CancelScope() as scope:
        await loop(Plan(steps=9, groups=1, rollouts=2), house=house, notebook=notebook)
    assert notebook.events == ["groups 0", "metrics 0", "save 1"]


async def test_a_training_step_that_has_begun_is_finished_and_recorded_before_a_cancelled_loop_ends():
    class Slow(Playhouse):
        async def train(self, trainable, groups, *, config):
            scope.cancel()
            await anyio.sleep(0.05)
            return await super().train(trainable, groups, config=config)

    notebook = Notebook()
    with anyio.CancelScope() as scope:
        await loop(Plan(steps=9, groups=1, rollouts=2), house=Slow(Obedient), notebook=notebook)
    assert notebook.events == ["groups 0", "metrics 0", "save 1"]


class Full(Notebook):
    """Takes no more of this kind from step 1 on."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def groups(self, step, groups):
        self.take("groups", step)
        super().groups(step, groups)

    def metrics(self, step, values):
        self.take("metrics", step)
        super().metrics(step, values)

    def take(self, what, step):
        if what == self.what and step >= 1:
            raise OSError(f"no room for {what} {step}")


async def test_a_step_whose_groups_cannot_be_recorded_is_not_taken_and_those_before_it_are_saved():
    notebook, house = Full("groups"), Playhouse(Obedient)
    with pytest.raises(OSError, match="no room for groups 1"):
        await loop(Plan(steps=9, groups=1, rollouts=2), house=house, notebook=notebook)
    assert house.step == 1
    assert notebook.events == ["groups 0", "metrics 0", "save 1"]


async def test_a_step_that_is_trained_but_not_recorded_is_saved_so_that_it_is_not_taken_twice():
    notebook, house = Full("metrics"), Playhouse(Obedient)
    with pytest.raises(OSError, match="no room for metrics 1"):
        await loop(Plan(steps=9, groups=1, rollouts=2), house=house, notebook=notebook)
    assert notebook.events == ["groups 0", "metrics 0", "groups 1", "save 2"]
    resumed, _ = await loop(Plan(steps=3, groups=1, rollouts=2), house=house)
    assert resumed.events == ["groups 2", "metrics 2", "save 3"]


async def test_a_split_that_the_environment_does_not_have_is_told():
    with pytest.raises(EnvironmentLoadError, match="no split 'practice'; it has train, test"):
        await loop(Plan(steps=1, split="practice"))


def trajectory(reward, *, uses=(), turns=1, reason=StopReason.ANSWERED):
    spans = (Span((1, 2)), Span((3, 4, 5), (-0.1,) * 3, 0))
    messages = ({"role": "assistant", "content": "5"},) * turns
    played = Trajectory(scenario("5"), f"r{reward}{reason}", messages, spans, reason, tuple(uses))
    return played.scored(reward, {"said": reward, "extra": 0.0} if reward else {"said": reward})


def test_a_step_is_summed_up_over_its_rollouts():
    bad = ToolUse(Malformed("x", "y", MalformedKind.EMPTY), ToolResult("y", is_error=True), 0)
    wrong = ToolUse(ToolCall("add", {}), ToolResult("no", is_error=True), 0)
    failed = FailedRollout("r", "ToolServerError", "gone")
    groups = [
        TrajectoryGroup((trajectory(1.0, uses=[bad, wrong], turns=3), trajectory(0.0)), (failed,)),
        TrajectoryGroup((), (failed,)),
        TrajectoryGroup((trajectory(0.0),)),
    ]
    found = summarize(groups)
    assert math.isclose(found.pop("reward"), 1 / 3)
    assert math.isclose(found.pop("reward/said"), 1 / 3)
    assert math.isclose(found.pop("turns"), 5 / 3)
    assert found == {
        "reward/extra": 0.0,
        "tool_calls": 2.0,
        "malformed": 1.0,
        "tool_errors": 1.0,
        "sampled_tokens": 9.0,
        "rollouts": 3.0,
        "failed_rollouts": 2.0,
        "out_of_time": 0.0,
    }


def test_the_reward_of_a_step_is_that_of_the_rollouts_that_the_clock_did_not_end():
    late = trajectory(0.0, reason=StopReason.TIME_LIMIT)
    found = summarize([TrajectoryGroup((trajectory(1.0), late)), TrajectoryGroup((late,))])
    assert (found["reward"], found["reward/said"]) == (1.0, 1.0)
    assert (found["rollouts"], found["sampled_tokens"], found["failed_rollouts"]) == (3.0, 9.0, 0.0)
    assert math.isclose(found["out_of_time"], 2 / 3)
    found = summarize([TrajectoryGroup((late,))])
    assert (found["reward"], found["out_of_time"]) == (0.0, 1.0)
