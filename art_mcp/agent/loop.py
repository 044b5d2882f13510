"""The training loop: pick scenarios, roll out, train, record; and from where a stopped run goes on."""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from statistics import fmean
from time import monotonic
from typing import Any, Literal, TypeAlias, TypeVar

import anyio

from art_mcp.agent.curriculum import Curriculum, outcomes_of, solved_shares
from art_mcp.agent.group import gather_trajectory_groups
from art_mcp.agent.heap import collect, collections_between_steps
from art_mcp.agent.overlap import Gather, Played, Rounds, open_rounds, staleness
from art_mcp.agent.places import Places, places_of
from art_mcp.core.samples import check_alive
from art_mcp.environment import Environment
from art_mcp.model import TrainableModel
from art_mcp.ports import Progress, Recorder, Toolboxes
from art_mcp.types import Scenario, TrainConfig, TrajectoryGroup
from art_mcp.values import CountFromOne, CountFromZero, FromZero, check_values

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to train: `groups` scenarios a step, each played `rollouts` times, until `steps` or `seconds` are spent.

    `concurrency` bounds the rollouts in flight. `save_every`: steps between checkpoints (0: only at the end). `seed` keys every
    draw of the run. `draw`: a walk through the split, or what is neither always nor never solved (`curriculum`).

    `overlap`: the rollouts of so many next steps begin while the last of this one's are played, and go on while it is trained;
    no token is older than so many steps when it is trained (`overlap.Rounds` has the rule). A curriculum then knows so many
    steps less, and two runs of the same seed differ, because how long a step takes decides which policy samples a turn.
    """

    steps: CountFromZero | None = None
    seconds: FromZero | None = None
    groups: CountFromOne = 16
    rollouts: CountFromOne = 8
    concurrency: CountFromOne = 128
    save_every: CountFromZero = 50
    seed: int = 0
    split: str = "train"
    draw: Literal["uniform", "solved"] = "uniform"
    overlap: CountFromZero = 0

    def __post_init__(self) -> None:
        check_values(self)

    def goes_on(self, step: int, *, spent: float) -> bool:
        """Whether `step` is to be taken, after so many seconds."""
        return (self.steps is None or step < self.steps) and (self.seconds is None or spent < self.seconds)


Save = Callable[[int], Awaitable[None]]
Outcomes: TypeAlias = tuple[int, Mapping[str, Sequence[int]]]
"""A step, and how often each of its scenarios was solved and played."""


async def train_loop(
    model: TrainableModel[Any],
    environment: Environment,
    *,
    toolbox: Toolboxes,
    plan: Plan,
    config: TrainConfig,
    recorder: Recorder,
    save: Save,
    progress: Progress | None = None,
    spent: float = 0.0,
    history: Iterable[Outcomes] = (),
) -> float:
    """Trains from the model's current step on; returns the seconds spent, `spent` before a resume included. `history` is what a
    curriculum knows from before a resume: the step and the outcomes of each that it drew.

    A checkpoint is saved every `plan.save_every` steps and when the loop ends, also by an error, of the `recorder` too, or a
    cancellation, which waits for a training step that has begun. Raises TrainError when every rollout of a step failed, with
    the first failure; one that lost its engine is played once more before that.
    """
    began = monotonic() - spent
    book = open_book(plan, environment, recorder, history=history, began=began)
    step = await model.get_step()

    async def gather(step: int, places: Places) -> Sequence[TrajectoryGroup]:
        return await gather_trajectory_groups(
            book.draw(plan, step),
            model=model,
            environment=environment,
            toolbox=toolbox,
            rollouts=plan.rollouts,
            concurrency=places,
            temperature=config.temperature,
            seed=plan.seed,
            step=step,
            progress=progress,
        )

    async with AsyncExitStack() as stack:
        taken = await stack.enter_async_context(saved_steps(model, save, every=plan.save_every))
        stack.enter_context(collections_between_steps())
        rounds = await stack.enter_async_context(rounds_of(plan, gather, spent=spent))
        while plan.goes_on(step, spent=monotonic() - began):
            played = await rounds.play(step)
            check_alive(played.groups)
            # a step that is trained but not recorded would be missing from the run
            await to_its_end(learn(model, played, config=config, book=book, places=rounds.places))
            step += 1
            await taken(step)
    return monotonic() - began


def rounds_of(plan: Plan, gather: Gather, *, spent: float) -> AbstractAsyncContextManager[Rounds]:
    """The batches of `plan`, of whose seconds so many are spent."""
    return open_rounds(
        gather,
        places=places_of(plan.concurrency),
        rollouts=plan.groups * plan.rollouts,
        ahead=plan.overlap,
        steps=plan.steps,
        until=math.inf if plan.seconds is None else anyio.current_time() + plan.seconds - spent,
    )


@asynccontextmanager
async def saved_steps(model: TrainableModel[Any], save: Save, *, every: int) -> AsyncGenerator[Save]:
    """Checkpoints of a loop, which tells what is yielded of each step that it has taken and recorded: after each `every` of
    them (0: none), and of the last that was taken when the block ends, however it does. One that is taken, but could not be
    recorded, is not taken again after a resume."""
    saved = await model.get_step() or None  # a model that has taken steps comes from a checkpoint

    async def taken(step: int) -> None:
        nonlocal saved
        if every and step % every == 0:
            await save(step)
            saved = step

    try:
        yield taken
    finally:
        with anyio.CancelScope(shield=True):
            step = await model.get_step()
            if saved != step:
                await save(step)


@dataclass(frozen=True, slots=True)
class Book:
    """What a run, which `began` then, draws from, and where its steps are recorded. The draw for a step knows the outcomes up
    to `lag` steps before the last one, after a resume too; later ones are `untold`. What is `drawn` for a step stays so until
    it is entered, also where it is played once more."""

    recorder: Recorder
    environment: Environment
    scenarios: Sequence[Scenario]
    curriculum: Curriculum | None
    began: float
    lag: int = 0
    untold: deque[Outcomes] = field(default_factory=deque[Outcomes])
    drawn: dict[int, list[Scenario]] = field(default_factory=dict[int, "list[Scenario]"])

    def draw(self, plan: Plan, step: int) -> list[Scenario]:
        """The scenarios of `step`."""
        if not self.curriculum:
            return pick(self.scenarios, step=step, count=plan.groups, seed=plan.seed)
        if step not in self.drawn:
            while self.untold and self.untold[0][0] < step - self.lag:
                self.curriculum.note(*self.untold.popleft())
            self.drawn[step] = self.curriculum.draw(step, plan.groups)
        return self.drawn[step]

    def enter(self, step: int, groups: Sequence[TrajectoryGroup], values: Mapping[str, Any]) -> None:
        """What is to be known of a step, and of its groups."""
        outcomes = outcomes_of(groups, self.environment)
        self.drawn.pop(step, None)
        if self.curriculum:
            self.untold.append((step, outcomes))
        told = {"outcomes": outcomes} if self.curriculum else {}
        self.recorder.metrics(step, {**summarize(groups), **solved_shares(groups, outcomes), **values, **told})


async def learn(model: TrainableModel[Any], played: Played, *, config: TrainConfig, book: Book, places: Places) -> None:
    """The second half of a step: trains on its groups and records it. They are written first: where there is no room for them,
    the step is not taken. No rollout's time limit pays for what is trained meanwhile, because engine and trainer may share a
    thread."""
    step = await model.get_step()
    book.recorder.groups(step, played.groups)
    collect()
    began = monotonic()
    with places.clocks.held():
        metrics = await model.train(played.groups, config=config)
    trained = monotonic()
    seconds = {"seconds_rollout": played.seconds, "seconds_waited": played.waited, "seconds_train": trained - began}
    told = {**seconds, "seconds_total": trained - book.began, "staleness": staleness(played.groups, step)}
    book.enter(step, played.groups, {**metrics, **told, **places.lap()})


def open_book(
    plan: Plan,
    environment: Environment,
    recorder: Recorder,
    *,
    history: Iterable[Outcomes],
    began: float,
) -> Book:
    scenarios = environment.split(plan.split)
    curriculum = None if plan.draw == "uniform" else Curriculum(scenarios, plan.seed)
    return Book(recorder, environment, scenarios, curriculum, began, plan.overlap, deque(history))


async def to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Awaits `work`, which no cancellation interrupts: one that comes meanwhile is raised at the first await after it."""
    task, waiting = asyncio.ensure_future(work), asyncio.current_task()
    with anyio.CancelScope(shield=True):
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:  # Ctrl-C cancels the task itself, which no scope holds back
            await asyncio.wait([task])
            task.result()
            assert waiting is not None
            waiting.uncancel()
            waiting.cancel()


def pick(items: Sequence[Item], *, step: int, count: int, seed: int) -> list[Item]:
    """The items of `step`: a walk through all of them, shuffled anew for each pass; the step alone is the cursor."""
    first, size = step * count, len(items)
    laps = range(first // size, (first + count - 1) // size + 1)
    walk = [place for lap in laps for place in shuffled_order(size, seed, lap)]
    start = first - laps[0] * size
    return [items[place] for place in walk[start : start + count]]


def shuffled_order(count: int, seed: int, lap: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}:{lap}:order").shuffle(order)
    return order


def summarize(groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """Means over a step's rollouts: reward and its parts (of those that are compared, unless there are none), turns, calls,
    tokens; how many failed, and the share that the clock ended."""
    everyone = [one for group in groups for one in group.rollouts]
    compared = [one for group in groups for one in group.compared]
    scored, played = compared or everyone, [one.trajectory for one in everyone]
    names = sorted({name for one in scored for name in one.parts})
    return {
        "reward": fmean([one.reward for one in scored]),
        **{f"reward/{name}": fmean([one.parts.get(name, 0.0) for one in scored]) for name in names},
        "turns": fmean([trajectory.turns for trajectory in played]),
        "tool_calls": float(sum(len(trajectory.uses) for trajectory in played)),
        "malformed": float(sum(trajectory.malformed for trajectory in played)),
        "tool_errors": float(sum(trajectory.tool_errors for trajectory in played)),
        "sampled_tokens": float(sum(one.trajectory.policy_tokens for group in groups for one in group.trajectories)),
        "rollouts": float(len(everyone)),
        "failed_rollouts": float(sum(len(group.failures) for group in groups)),
        "out_of_time": 1 - len(compared) / len(everyone),
    }
