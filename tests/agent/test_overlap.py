"""The next steps' rollouts beside this one's and its training: when they may begin, how old their tokens are, how they end."""

import asyncio
import math
import random
from collections import Counter
from dataclasses import replace

import anyio
import pytest

from art_mcp.agent.curriculum import recalled
from art_mcp.agent.loop import Plan, open_book, pick, train_loop
from art_mcp.agent.overlap import open_rounds, staleness
from art_mcp.agent.places import Meter, places_of
from art_mcp.errors import EngineError
from art_mcp.types import Policy, Span, StopReason, TrainConfig, Trajectory, TrajectoryGroup
from tests.agent.players import Obedient, Playhouse, Watcher, calls, desk_tools, environment, obedient, scenario, tokenizer

pytestmark = pytest.mark.anyio

ADD = calls(("add", {"a": 2, "b": 3}))


class Stage(Playhouse):
    """A backend whose sampler and trainer wait for what a test says at every turn (`turn(step, number, turn)`) and training
    step (`learn(step)`). `log` has the beginnings of rollouts, each of which has two turns, and of training steps, in order.

    Step s plays the scenarios whose prompts end with "of step s"."""

    def __init__(self, *, rollouts, turn=None, learn=None):
        super().__init__(lambda: self)
        self.rollouts, self.on_turn, self.on_learn = rollouts, turn, learn
        self.context_length = 100_000
        self.log, self.begun, self.in_flight, self.most = [], {}, 0, 0

    @property
    def policy(self):
        return Policy("staged", self.step)

    async def sample(self, token_ids, **options):
        text = tokenizer().decode(token_ids)
        step = int(text.partition("of step ")[2].partition("<")[0])
        turn = text.count("<|im_start|>assistant") - 1
        if turn == 0:
            number = self.begun.get(step, 0)
            self.begun[step] = number + 1
            self.log.append(f"begin {step}")
            asyncio.current_task().number = number
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            if self.on_turn:
                await self.on_turn(step, asyncio.current_task().number, turn)
            await anyio.lowlevel.checkpoint()
        finally:
            self.in_flight -= 1
        return await Obedient(self.step).sample(token_ids, **options)

    async def train(self, trainable, groups, *, config):
        self.log.append(f"train {self.step}")
        if self.on_learn:
            await self.on_learn(self.step)
        return await super().train(trainable, groups, config=config)


class Notebook:
    """A Recorder that remembers, and what was saved when."""

    def __init__(self):
        self.events, self.lines = [], {}

    def groups(self, step, groups):
        self.events.append(f"groups {step}")

    def metrics(self, step, values):
        self.events.append(f"metrics {step}")
        self.lines[step] = values

    async def save(self, step):
        await anyio.lowlevel.checkpoint()
        self.events.append(f"save {step}")


def scenarios_of(steps, groups):
    """Scenarios of which a walk with seed 0 gives those "of step s" to step s."""
    order = pick(list(range(steps * groups)), step=0, count=steps * groups, seed=0)
    return [scenario(ADD, f"{place} of step {order.index(place) // groups}", id=str(place)) for place in range(steps * groups)]


async def loop(house, *, steps, groups=1, notebook=None, progress=None, seconds=None, spent=0.0, overlap=1, **fields):
    notebook = notebook or Notebook()
    concurrency = fields.pop("concurrency", groups * house.rollouts)
    plan = Plan(steps, seconds, groups, house.rollouts, concurrency, save_every=0, overlap=overlap)
    async with desk_tools() as toolbox:
        await train_loop(
            await obedient(house),
            environment(*scenarios_of(steps + 1, groups), **fields),
            toolbox=toolbox,
            plan=plan,
            config=TrainConfig(),
            recorder=notebook,
            save=notebook.save,
            progress=progress,
            spent=spent,
        )
    return notebook


def begins(house):
    return [int(line.removeprefix("begin ")) for line in house.log if line.startswith("begin")]


@pytest.mark.parametrize("ahead", [1, 2])
async def test_the_next_steps_rollouts_begin_while_the_longest_conversations_of_those_before_are_played(ahead):
    other = anyio.Event()

    async def turn(step, number, turn):
        if step == ahead:
            other.set()
        elif number == 0 and turn == 1:
            await other.wait()  # for ever, were the last step to wait for any of them

    house = Stage(rollouts=3, turn=turn)
    await loop(house, steps=ahead + 1, overlap=ahead)
    assert house.log.index(f"begin {ahead}") < house.log.index("train 0")
    assert house.step == ahead + 1


@pytest.mark.parametrize("ahead", [1, 2])
async def test_rollouts_ahead_are_played_while_a_step_is_trained_and_no_further_step_begins(ahead):
    watcher = Watcher()

    async def learn(step):
        while step == 0 and len(watcher.seen) < 3 * (1 + ahead):  # all of step 0 and those ahead
            await anyio.lowlevel.checkpoint()
        for _ in range(100):
            await anyio.lowlevel.checkpoint()

    house = Stage(rollouts=3, learn=learn)
    await loop(house, steps=4, progress=watcher, overlap=ahead)
    for step in range(3 - ahead):
        next_one = step + 1 + ahead
        assert house.log.index(f"train {step}") < house.log.index(f"begin {next_one}") < house.log.index(f"train {next_one}")
    assert len(watcher.seen) == 12


async def test_without_overlap_a_step_begins_when_the_one_before_is_trained():
    house = Stage(rollouts=2)
    notebook = await loop(house, steps=3, overlap=0)
    assert house.log == [line for step in range(3) for line in (f"begin {step}", f"begin {step}", f"train {step}")]
    assert [line["staleness"] for line in notebook.lines.values()] == [0.0] * 3


@pytest.mark.parametrize("ahead", [1, 2, 3])
@pytest.mark.parametrize(("groups", "rollouts", "concurrency"), [(1, 4, 1), (2, 2, 3), (2, 3, 6), (1, 3, 50), (3, 2, 7)])
async def test_at_any_pace_steps_begin_in_order_and_no_token_is_older_than_asked(groups, rollouts, concurrency, ahead):
    for seed in range(6):
        rng = random.Random(seed)

        async def give_way(*_, rng=rng):
            for _ in range(rng.choice([0, 1, 5, 60])):
                await anyio.lowlevel.checkpoint()

        house, steps, each = Stage(rollouts=rollouts, turn=give_way, learn=give_way), 5, groups * rollouts
        notebook = await loop(house, steps=steps, groups=groups, concurrency=concurrency, overlap=ahead)
        assert begins(house) == [step for step in range(steps) for _ in range(each)]
        assert house.most <= concurrency
        for step in range(ahead + 1, steps):
            assert house.log.index(f"begin {step}") > house.log.index(f"train {step - ahead - 1}")
        rollout_ids = set()
        for step, batch in enumerate(house.trained):
            played = [one.trajectory for group in batch for one in group.trajectories]
            rollout_ids |= {one.rollout_id for one in played}
            versions = {span.policy_version for one in played for span in one.spans if span.logprobs is not None}
            assert versions <= set(range(max(0, step - ahead), step + 1))
            assert notebook.lines[step]["staleness"] == staleness(batch, step)
        assert len(rollout_ids) == steps * each


async def test_a_conversation_that_goes_on_under_the_next_policy_says_so_of_each_turn_and_the_step_how_old_its_tokens_are():
    trained = anyio.Event()

    async def turn(step, number, turn):
        if (step, turn) == (1, 1):
            await trained.wait()

    class Telling(Stage):
        async def train(self, trainable, groups, *, config):
            try:
                return await super().train(trainable, groups, config=config)
            finally:
                trained.set()

    house = Telling(rollouts=1, turn=turn)
    notebook = await loop(house, steps=2, concurrency=2)
    first, second = [span for span in house.trained[1][0].trajectories[0].trajectory.spans if span.logprobs]
    assert (first.policy_version, second.policy_version) == (0, 1)
    share = len(first.token_ids) / (len(first.token_ids) + len(second.token_ids))
    assert [notebook.lines[step]["staleness"] for step in (0, 1)] == [0.0, share]


def test_staleness_is_a_mean_over_sampled_tokens():
    spans = (Span((1, 2, 3)), Span((4,), (-0.5,), 6), Span((5, 6, 7), (-0.5,) * 3, 7))
    one = Trajectory(None, "r", (), spans, StopReason.ANSWERED).scored(1.0)
    assert staleness([TrajectoryGroup((one,))], 7) == 0.25
    assert staleness([TrajectoryGroup(())], 7) == 0.0


async def test_the_last_step_has_nothing_ahead():
    house = Stage(rollouts=2)
    await loop(house, steps=2, concurrency=100)
    assert begins(house) == [0, 0, 1, 1]


async def play_rounds(gather, count, **options):
    options = {"places": places_of(2), "rollouts": 1, "ahead": 1, **options}
    async with open_rounds(gather, **options) as rounds:
        return [(await rounds.play(step)).groups for step in range(count)]


async def test_seconds_that_run_out_cancel_what_is_ahead_and_nothing_more_begins():
    asked, cancelled = [], anyio.Event()

    async def gather(step, places):
        asked.append(step)
        async with places.take():
            if step == 0:
                await cancelled.wait()
            else:
                try:
                    await anyio.sleep_forever()
                finally:
                    cancelled.set()
        return [TrajectoryGroup(())]

    await play_rounds(gather, 1, until=anyio.current_time() + 0.1)
    assert asked == [0, 1]
    asked.clear()
    await play_rounds(gather, 1, until=anyio.current_time() - 1)
    assert asked == [0]


async def test_a_step_is_not_even_drawn_before_all_rollouts_of_the_one_before_have_begun():
    events = []

    async def gather(step, places):
        events.append(f"ask {step}")
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        async with places.take():
            events.append(f"begin {step}")
        return [TrajectoryGroup(())]

    await play_rounds(gather, 3, steps=3)
    assert events == [f"{what} {step}" for step in range(3) for what in ("ask", "begin")]


async def test_seconds_that_run_out_while_a_step_is_this_one_do_not_cut_it_and_the_end_of_the_block_cuts_what_is_ahead():
    async def gather(step, places):
        async with places.take():
            while step == 1 and anyio.current_time() < until + 0.1:
                await anyio.lowlevel.checkpoint()
            if step == 2:
                await anyio.sleep_forever()
        return [TrajectoryGroup((), scenario=scenario(str(step)))]

    until = anyio.current_time() + 0.2
    assert [groups[0].scenario.prompt for groups in await play_rounds(gather, 2, until=until)] == ["0", "1"]
    with anyio.fail_after(60):
        await play_rounds(gather, 2)


@pytest.mark.parametrize("ahead", [1, 2])
async def test_a_step_that_was_cancelled_ahead_and_is_wanted_all_the_same_is_played(ahead):
    """Two clocks may disagree on whether the seconds have run out."""
    asked = []

    async def gather(step, places):
        asked.append(step)
        async with places.take():
            pass
        return [TrajectoryGroup((), scenario=scenario(str(step)))]

    found = await play_rounds(gather, 3, until=anyio.current_time() - 1, ahead=ahead)
    assert asked == [0, 1, 2]
    assert [groups[0].scenario.prompt for groups in found] == ["0", "1", "2"]


async def test_a_loop_whose_seconds_are_spent_keeps_what_was_recorded_and_drops_what_is_ahead():
    async def learn(step):
        while house.in_flight:
            await anyio.lowlevel.checkpoint()

    async def turn(step, number, turn):
        if step == 1:
            await anyio.sleep_forever()

    house = Stage(rollouts=2, turn=turn, learn=learn)
    notebook = await loop(house, steps=9, seconds=0.5)
    assert notebook.events == ["groups 0", "metrics 0", "save 1"]
    assert set(begins(house)) <= {0, 1}


@pytest.mark.parametrize("ahead", [1, 2])
async def test_a_batch_that_lost_its_engine_is_played_once_more_and_so_is_what_was_ahead_of_it(ahead):
    deaths = [anyio.Event(), anyio.Event()]

    async def turn(step, number, turn):
        if step == 0 and number == 0:
            raise EngineError("vLLM was killed by SIGKILL")
        if step == 0 and number == 1:
            await deaths[0].wait()
            raise EngineError("vLLM was killed by SIGKILL")
        if step == 1 and number == 0:
            deaths[0].set()
            try:
                await anyio.sleep_forever()
            finally:
                deaths[1].set()

    house, steps = Stage(rollouts=2, turn=turn), ahead + 1
    notebook = await loop(house, steps=steps, overlap=ahead)
    assert deaths[1].is_set()
    assert begins(house)[:4] == [0, 0, 1, 1]
    assert begins(house)[-2 * steps :] == [step for step in range(steps) for _ in range(2)]
    failed = [(notebook.lines[step]["rollouts"], notebook.lines[step]["failed_rollouts"]) for step in range(steps)]
    assert failed == [(2, 2), *[(2, 0)] * ahead]
    ids = [one.trajectory.rollout_id for groups in house.trained for group in groups for one in group.trajectories]
    assert len(set(ids)) == 2 * steps


async def test_a_bug_ahead_ends_the_run_though_this_step_is_still_played():
    async def turn(step, number, turn):
        if step == 1:
            raise KeyError("a bug")
        if number == 0 and turn == 1:
            await anyio.sleep_forever()

    house, notebook = Stage(rollouts=2, turn=turn), Notebook()
    with pytest.raises(KeyError, match="a bug"):
        await loop(house, steps=3, notebook=notebook)
    assert notebook.events == ["save 0"]
    assert house.in_flight == 0


async def test_a_bug_ahead_does_not_undo_a_training_step_that_has_begun():
    learning, broken = anyio.Event(), anyio.Event()

    async def turn(step, number, turn):
        if step == 1:
            await learning.wait()
            broken.set()
            raise KeyError("a bug")

    async def learn(step):
        learning.set()
        await broken.wait()
        for _ in range(50):
            await anyio.lowlevel.checkpoint()

    house, notebook = Stage(rollouts=2, turn=turn, learn=learn), Notebook()
    with pytest.raises(KeyError, match="a bug"):
        await loop(house, steps=3, notebook=notebook)
    assert notebook.events == ["groups 0", "metrics 0", "save 1"]


async def test_a_training_step_that_fails_ends_what_is_ahead():
    async def turn(step, number, turn):
        if step == 1:
            await anyio.sleep_forever()

    async def learn(step):
        raise RuntimeError("out of memory")

    house, notebook = Stage(rollouts=2, turn=turn, learn=learn), Notebook()
    with pytest.raises(RuntimeError, match="out of memory"):
        await loop(house, steps=3, notebook=notebook)
    assert (notebook.events, house.in_flight) == (["groups 0", "save 0"], 0)


@pytest.mark.parametrize("when", ["played", "trained"])
async def test_ctrl_c_cancels_what_is_ahead_keeps_what_was_recorded_and_leaves_no_task(when):
    ahead, reached = anyio.Event(), anyio.Event()

    async def turn(step, number, turn):
        if step == 2:
            ahead.set()
            await anyio.sleep_forever()
        if when == "played" and (step, number, turn) == (1, 0, 1):
            await ahead.wait()
            reached.set()
            await anyio.sleep_forever()

    async def learn(step):
        if step == 1:
            await ahead.wait()
            reached.set()
            for _ in range(50):
                await anyio.lowlevel.checkpoint()

    house, notebook, before = Stage(rollouts=2, turn=turn, learn=learn), Notebook(), asyncio.all_tasks()
    run = asyncio.create_task(loop(house, steps=9, notebook=notebook))
    await reached.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    steps = {"played": 1, "trained": 2}[when]
    recorded = [f"{what} {step}" for step in range(steps) for what in ("groups", "metrics")]
    assert notebook.events == [*recorded, f"save {steps}"]
    assert house.in_flight == 0
    assert asyncio.all_tasks() == before


LEVELS = [
    scenario(answer, id=f"{level}-{number}", level=level) for level, answer in ((1, "5"), (2, "6")) for number in range(9)
]


@pytest.mark.parametrize("ahead", [1, 2])
async def test_a_curriculum_draws_after_a_resume_as_if_the_run_had_never_stopped(ahead):
    async def drawn(first, history):
        house, notebook = Playhouse(Obedient, step=first), Notebook()
        plan = Plan(steps=7, groups=4, rollouts=2, draw="solved", overlap=ahead)
        async with desk_tools() as toolbox:
            await train_loop(
                await obedient(house),
                environment(*LEVELS),
                toolbox=toolbox,
                plan=plan,
                config=TrainConfig(),
                recorder=notebook,
                save=notebook.save,
                history=history,
            )
        return [[group.scenario for group in groups] for groups in house.trained], notebook.lines

    whole, lines = await drawn(0, ())
    known = [{"step": step, **lines[step]} for step in range(7)]
    for stop in range(1, 7):
        assert (await drawn(stop, recalled(known[:stop])))[0] == whole[stop:]


def test_a_step_that_is_played_once_more_has_the_scenarios_that_were_drawn_for_it():
    plan = Plan(steps=9, groups=4, rollouts=2, draw="solved", overlap=1)
    outcomes = {one.id: (2, 2) if one.level == 1 else (1, 2) for one in LEVELS}
    book = open_book(plan, environment(*LEVELS), Notebook(), history=[(0, outcomes)], began=0.0)
    drawn = book.draw(plan, 1)  # which does not know step 0 yet
    book.draw(plan, 2)  # which does
    assert book.draw(plan, 1) == drawn
    assert Counter(one.level for one in drawn) == {1: 2, 2: 2}
    knowing = open_book(replace(plan, overlap=0), environment(*LEVELS), Notebook(), history=[(0, outcomes)], began=0.0)
    assert Counter(one.level for one in knowing.draw(plan, 1)) == {2: 4}


async def test_no_time_limit_runs_while_a_step_is_trained():
    deadlines, learning, trained = {}, anyio.Event(), anyio.Event()

    async def turn(step, number, turn):
        if step == 1:
            for name, event in (("before", None), ("during", learning), ("after", trained)):
                if event:
                    await event.wait()
                deadlines.setdefault(name, anyio.current_effective_deadline())

    async def learn(step):
        learning.set()
        while "during" not in deadlines:
            await anyio.lowlevel.checkpoint()

    class Telling(Notebook):
        def metrics(self, step, values):
            trained.set()
            super().metrics(step, values)

    await loop(Stage(rollouts=1, turn=turn, learn=learn), steps=2, concurrency=2, notebook=Telling())
    assert deadlines["before"] < math.inf
    assert deadlines["during"] == math.inf
    assert deadlines["before"] < deadlines["after"] < math.inf


def test_the_meter_tells_when_nothing_was_in_flight_and_how_long_a_place_was_free(monkeypatch):
    now = 100.0
    monkeypatch.setattr("art_mcp.agent.places.monotonic", lambda: now)
    meter = Meter(began=now, since=now)
    for seconds, change in ((1.0, 1), (2.0, 1), (3.0, -2), (4.0, 1)):
        now += seconds
        meter.count(change)
    assert meter.lap(4) == {"seconds_idle": 5.0, "seconds_free": 10.0 - (2.0 * 1 + 3.0 * 2) / 4}
    now += 2.0
    assert meter.lap(4) == {"seconds_idle": 0.0, "seconds_free": 1.5}


async def test_the_seconds_of_a_step_say_what_it_waited_for_and_when_the_engine_was_idle():
    async def turn(step, number, turn):
        await anyio.sleep(0.02)

    async def learn(step):
        await anyio.sleep(0.1)

    lines = {}
    for overlap in (0, 1):
        notebook = await loop(Stage(rollouts=2, turn=turn, learn=learn), steps=3, overlap=overlap, concurrency=4)
        lines[overlap] = notebook.lines[1]
        assert notebook.lines[1]["seconds_free"] >= notebook.lines[1]["seconds_idle"] >= 0
    alone, beside = lines[False], lines[True]
    assert alone["seconds_waited"] >= alone["seconds_rollout"] >= 0.04
    assert alone["seconds_idle"] >= alone["seconds_train"] >= 0.1
    assert beside["seconds_rollout"] >= 0.04
    assert beside["seconds_waited"] + beside["seconds_train"] <= beside["seconds_total"]
