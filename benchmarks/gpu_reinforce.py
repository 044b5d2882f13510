"""The reinforcement learning of `gpu_calculator`, one step after the other or the next beside this one; its speed beside raw
vLLM's."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import anyio

from art_mcp.agent.demonstrate import Demonstration
from art_mcp.agent.heap import collect, collections_between_steps
from art_mcp.agent.loop import summarize
from art_mcp.agent.overlap import Played, Rounds, open_rounds, staleness
from art_mcp.agent.places import Places, places_of
from art_mcp.core.samples import check_alive, make_samples
from art_mcp.types import Sample, Scenario, TrainConfig, TrajectoryGroup
from benchmarks.gpu_replay import Recorded, cpu_seconds, cpu_seconds_of, first_token, replay, tool_processes
from benchmarks.gpu_report import Clock, Curve, Delays, Report
from benchmarks.gpu_stage import Condition, Draw, play


@dataclass(frozen=True, slots=True)
class Run:
    """Everything open."""

    arguments: argparse.Namespace
    model: Recorded
    backend: Any
    conditions: Sequence[Condition]
    clock: Clock
    report: Report
    curve: Curve
    shown: Sequence[Demonstration]
    draw: Draw

    @property
    def config(self) -> TrainConfig:
        given = self.arguments
        return TrainConfig(
            learning_rate=given.learning_rate,
            target_kl=given.target_kl or None,
            min_agreement=given.min_agreement or None,
            scale_advantages=given.scale_advantages,
            objective=given.objective,
            micro_batch_tokens=given.micro_batch_tokens,
            control=given.control,
            seed=given.seed,
            temperature=given.temperature,
        )


@dataclass(slots=True)
class Stepper:
    """What the steps of a run share; `picked` are the questions of those that are not trained yet, by condition."""

    run: Run
    picked: dict[int, list[list[Scenario]]] = field(default_factory=dict[int, list[list[Scenario]]])
    delays: Delays = field(default_factory=Delays)

    async def gather(self, step: int, places: Places) -> list[TrajectoryGroup]:
        """A step's questions with `evaluate` offered and those without: as many of each, or by what there is to learn."""
        given, conditions = self.run.arguments, self.run.conditions
        if step not in self.picked:
            counts = self.run.draw.shares(given.groups, even=given.share == "even")
            chosen = zip(conditions, counts, strict=True)
            self.picked[step] = [self.run.draw.pick(condition, step=step, count=count) for condition, count in chosen]
        played = await play(
            conditions,
            self.picked[step],
            model=self.run.model,
            rollouts=given.rollouts,
            concurrency=places,
            seed=given.seed,
            step=step,
            temperature=given.temperature,
        )
        return [group for part in played for group in part]

    async def learn(self, played: Played, rounds: Rounds, *, step: int, rate: float) -> dict[str, Any]:
        """One training step, and its figures."""
        check_alive(played.groups)
        collect()
        began, solved, first = time.monotonic(), dict[str, float](), 0
        with rounds.places.clocks.held():
            metrics = await self.run.model.train(played.groups, config=self.run.config.with_(learning_rate=rate))
        metrics["delay_in_publish"] = self.delays.worst(metrics.get("seconds_publish", 0.0))
        times = {"seconds_train": time.monotonic() - began, "seconds_rollout": played.seconds, "seconds_waited": played.waited}
        for condition, picked in zip(self.run.conditions, self.picked.pop(step), strict=True):
            part, first = played.groups[first : first + len(picked)], first + len(picked)
            self.run.draw.observe(condition, part, step=step)
            each = [condition.train.solved(one) for group in part for one in group.trajectories]
            solved[f"solved_{condition.name}"] = sum(each) / max(1, len(each))
        figures = {**times, **rounds.places.lap(), "staleness": staleness(played.groups, step), "levels": self.run.draw.state()}
        return {**summarize(played.groups), **metrics, **solved, **figures}


async def reinforce(run: Run, *, seconds: float) -> dict[str, Any]:
    """Reinforcement learning for so many seconds. `tokens_per_second` are those that the engine sampled from the first step's
    beginning to the last one's end, whatever became of them."""
    given, began, start = run.arguments, time.monotonic(), await run.model.get_step()
    stepper, sampled, step = Stepper(run), run.model.sampled, start
    holders = tool_processes()
    until = math.inf if given.steps is None else start + given.steps
    async with AsyncExitStack() as stack:
        stack.enter_context(collections_between_steps())
        playing = open_rounds(
            stepper.gather,
            places=places_of(given.concurrency),
            rollouts=given.groups * given.rollouts,
            ahead=given.overlap,
            steps=None if given.steps is None else start + given.steps,
            until=anyio.current_time() + seconds,
        )
        rounds = await stack.enter_async_context(playing)
        watching = await stack.enter_async_context(anyio.create_task_group())
        stack.callback(watching.cancel_scope.cancel)
        watching.start_soon(stepper.delays.watch)
        while (spent := time.monotonic() - began) < seconds and step < until:
            keep_requests(run)
            started, cpu, cpu_there, before = time.monotonic(), cpu_seconds(), cpu_seconds_of(holders), run.model.sampled
            played = await rounds.play(step)
            answered, waited = run.model.sampled - before, max(1e-9, time.monotonic() - started)
            used, used_there = (cpu_seconds() - cpu) / waited, (cpu_seconds_of(holders) - cpu_there) / waited
            row = await stepper.learn(played, rounds, step=step, rate=rate_at(given, spent / seconds))
            first = await first_token(run.model, run.model.requests[0].token_ids)
            row |= {"client_cpu_in_rollout": used, "tool_cpu_in_rollout": used_there, "tokens_while_waiting": answered}
            row |= {"seconds_first_token": first, "seconds": time.monotonic() - began}
            run.curve.metrics(step, row)
            run.report.add(curve=run.curve.rows)
            step += 1
        taken, tokens = time.monotonic() - began, run.model.sampled - sampled
    rate = tokens / max(1e-9, taken)
    return {
        "steps": step - start,
        "seconds": taken,
        "sampled_tokens": tokens,
        "tokens_per_second": rate,
        "levels": run.draw.state(),
    }


def keep_requests(run: Run) -> None:
    """Of the requests so far, those that are replayed should no further step come: none where the next step's are all to come,
    else the last ones, some three for each of a step's rollouts."""
    count = 3 * run.arguments.groups * run.arguments.rollouts if run.arguments.overlap else 0
    del run.model.requests[: max(0, len(run.model.requests) - count)]


def rate_at(arguments: argparse.Namespace, share: float) -> float:
    if arguments.final_rate is None:
        return arguments.learning_rate
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    return arguments.final_rate + (arguments.learning_rate - arguments.final_rate) * fall


async def samples_of_a_step(run: Run) -> list[Sample]:
    """What another step would learn from, which is not taken: its samples with an advantage, sampled under the weights that
    are saved."""
    step = await run.model.get_step()
    groups = await Stepper(run).gather(step, places_of(run.arguments.concurrency))
    return [sample for sample in make_samples(groups, run.config, step=step) if sample.advantage]


async def compare_with_raw(run: Run) -> None:
    """The last step's requests again, without tools: what the rollouts could have been.

    `rollout_to_raw` is the speed of the last step's rollouts; where steps overlap, that of all rollouts while the loop waited
    for some, the first step apart. `training_to_raw` is that of the whole of reinforcement learning, training and all.
    """
    given, learned, row = run.arguments, run.report.values.get("reinforcement", {}), (run.curve.rows or [{}])[-1]
    if given.engine != "vllm" or given.control != "none" or not run.model.requests or "seconds_rollout" not in row:
        return  # a control's time goes to its questions
    raw = await replay(list(run.model.requests), worker=run.backend.sampler(run.model), concurrency=given.concurrency)
    whole, fastest = learned["tokens_per_second"], raw["tokens_per_second"]
    ours = waiting_rate(run.curve.rows) if given.overlap else row["sampled_tokens"] / row["seconds_rollout"]
    run.report.add(raw=raw, training_tokens_per_second=whole, training_to_raw=whole / fastest)
    run.report.add(rollout_tokens_per_second=ours, rollout_to_raw=ours / fastest)
    run.clock.say(f"rollouts {ours:.0f} tokens/s, all of training {whole:.0f}, raw {fastest:.0f}")


def waiting_rate(rows: Sequence[dict[str, Any]]) -> float:
    """Tokens a second that were answered while the loop waited for rollouts, the first step apart, whose wait has no other's
    training beside it."""
    learned = [row for row in rows if "tokens_while_waiting" in row][1:]
    return sum(row["tokens_while_waiting"] for row in learned) / max(1e-9, sum(row["seconds_waited"] for row in learned))
