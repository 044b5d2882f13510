"""Looks for a second tool call after the first one's result: in trajectories, and in what a policy finds likely. What is
trained, and how, is in `beyond`."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any

import torch

from art_mcp.agent.check import play_script, reference
from art_mcp.agent.evaluate import balanced, wilson
from art_mcp.agent.group import gather_trajectory_groups
from art_mcp.core.samples import common_prefix, demonstration
from art_mcp.environment import Environment, Reward, load_environment
from art_mcp.local.backend import LocalBackend
from art_mcp.local.models import load_tokenizer, model_source
from art_mcp.local.worker import Worker
from art_mcp.model import TrainableModel
from art_mcp.ports import Sampler, Toolbox
from art_mcp.sampling.scripted import ScriptedSampler
from art_mcp.sampling.tokenizer import BackendTokenizer
from art_mcp.tools import open_tools
from art_mcp.types import (
    Completion,
    Policy,
    Sample,
    SamplingParams,
    ScoredTrajectory,
    ToolCall,
    Trajectory,
    TrajectoryGroup,
)

ROOT = Path(__file__).resolve().parent.parent
CONTEXTS = 256
"""Held-out questions of two operations in which the likelihood of a second call is looked at."""
CREDIT = 0.3
TAKEN_FOR = -20.0
"""Logprob that a pushed token is recorded with. Its own (that of the mixture) would cancel the push: the importance weight
would be next to nothing. With this one the weight is at its cap: the policy learns from the token as if it had been likely."""


def made(trajectory: Trajectory) -> list[tuple[int, ToolCall, str]]:
    """The calls that could be made: turn, call, and what came back."""
    return [(use.turn, use.call, use.result.text) for use in trajectory.uses if isinstance(use.call, ToolCall)]


def calls_again(trajectory: Trajectory) -> bool:
    """Whether a call was made after another one's result."""
    return len({turn for turn, _, _ in made(trajectory)}) > 1


def takes_up(trajectory: Trajectory) -> bool:
    """Whether a later call has an earlier call's result for an operand."""
    calls = made(trajectory)
    return any(
        later > turn and text in map(str, call.arguments.values()) for turn, _, text in calls for later, call, _ in calls
    )


def first_is_right(trajectory: Trajectory) -> bool:
    """Whether the first call is the reference solution's, operands in either order where that makes no difference."""
    assert trajectory.scenario is not None
    step, calls = trajectory.scenario.facts["steps"][0], made(trajectory)
    if not calls or calls[0][1].name != step["name"]:
        return False
    order = sorted if step["name"] in ("add", "multiply") else list
    return order(calls[0][1].arguments.values()) == order(step["arguments"].values())


SIGNS = {"second": calls_again, "takes-up": takes_up, "first": first_is_right}
"""What an arm may give credit for, in questions of two operations."""


def credit_for(name: str) -> Reward:
    def credit(trajectory: Trajectory) -> float:
        assert trajectory.scenario is not None
        return CREDIT * (trajectory.scenario.level > 1 and SIGNS[name](trajectory))

    return credit


def calculator(levels: str = "1-2", *, credit: Sequence[str] = (), without: Sequence[str] = ()) -> Environment:
    """The calculator with its server in this process, with credit for some of SIGNS, and without some of its own rewards."""
    plain = load_environment(str(ROOT / "environments" / "calculator.py"), levels=levels)
    own = {name: reward for name, reward in plain.rewards.items() if name not in without}
    more = {name: credit_for(name) for name in credit}
    patient = replace(plain.limits, seconds=3600.0)  # a process that is paused for a while loses no rollout
    servers = [f"{ROOT}/servers/calculator/server.py:server"]
    return replace(plain, servers=servers, rewards={**own, **more}, limits=patient)


def tally(scored: Sequence[ScoredTrajectory], environment: Environment) -> dict[str, dict[str, int]]:
    """Counts by level: rollouts, those solved, and those of each of SIGNS."""
    levels: dict[str, list[ScoredTrajectory]] = {}
    for one in scored:
        levels.setdefault(str(one.trajectory.scenario.level if one.trajectory.scenario else 0), []).append(one)
    return {
        level: {
            "n": len(part),
            "solved": sum(environment.solved(one) for one in part),
            **{name: sum(sign(one.trajectory) for one in part) for name, sign in SIGNS.items()},
        }
        for level, part in sorted(levels.items())
    }


@dataclass(frozen=True, slots=True)
class Counts:
    """A Recorder that keeps a tally of every step."""

    environment: Environment
    steps: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def groups(self, step: int, groups: Sequence[TrajectoryGroup]) -> None:
        played = [one for group in groups for one in group.trajectories]
        self.steps.append({"step": step, **tally(played, self.environment)})

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        kept = ("reward", "entropy", "samples_with_signal", "gradient_norm")
        self.steps[-1] |= {name: round(values[name], 4) for name in kept if name in values}


@dataclass(frozen=True, slots=True)
class Pushed:
    """A Sampler that in a `share` of the turns after a first result puts the token `call` into the policy's mouth, which goes
    on from there."""

    sampler: Sampler
    call: int
    share: float

    @property
    def policy(self) -> Policy:
        return self.sampler.policy

    @property
    def context_length(self) -> int:
        return self.sampler.context_length

    async def sample(
        self, token_ids: Sequence[int], *, params: SamplingParams, stop: frozenset[int], shared: int = 0
    ) -> Completion:
        after_first = token_ids[shared:].count(self.call) == 1
        if not after_first or Random(f"push {params.seed}").random() >= self.share:
            return await self.sampler.sample(token_ids, params=params, stop=stop, shared=shared)
        rest = replace(params, max_tokens=params.max_tokens - 1)
        told = await self.sampler.sample([*token_ids, self.call], params=rest, stop=stop, shared=shared)
        span = replace(
            told.span,
            token_ids=(self.call, *told.span.token_ids),
            logprobs=(TAKEN_FOR, *(told.span.logprobs or ())),
        )
        return replace(told, span=span)


class Pushing(TrainableModel[None]):
    """The same model on the same backend, whose rollouts are pushed to call again."""

    def __init__(self, model: TrainableModel[None], share: float) -> None:
        super().__init__(name=model.name, spec=model.spec)
        self._backend = model.backend
        (self._call,) = BackendTokenizer(load_tokenizer(model_source(model.spec.source))).encode("<tool_call>")
        self._share = share

    def sampler(self) -> Sampler:
        return Pushed(super().sampler(), self._call, self._share)


@dataclass(frozen=True, slots=True)
class Stage:
    """A policy with everything open. `second_turns` are reference solutions in which only the second call is looked at."""

    model: TrainableModel[None]
    toolbox: Toolbox
    second_turns: Sequence[Sample]


@asynccontextmanager
async def open_stage(source: str, *, contexts: int = CONTEXTS, seed: int = 0) -> AsyncGenerator[Stage]:
    environment = calculator("2")
    model = TrainableModel(name="policy", base_model=source, seed=seed)
    async with (
        LocalBackend(in_process=True, threads=1) as backend,
        open_tools(environment.servers, only=environment.tools) as toolbox,
    ):
        await model.register(backend)
        samples = [
            second_turn(
                await play_script(
                    reference(environment),
                    scenario,
                    environment=environment,
                    dialect=model.dialect(),
                    toolbox=toolbox,
                    play=ScriptedSampler,
                )
            )
            for scenario in environment.split("test")[:contexts]
        ]
        yield Stage(model, toolbox, samples)


def second_turn(scored: ScoredTrajectory) -> Sample:
    """The trajectory up to its second turn, of which that turn alone counts."""
    spans = scored.trajectory.spans
    place = [number for number, span in enumerate(spans) if span.logprobs is not None][1]
    return demonstration([(span.token_ids, number == place) for number, span in enumerate(spans[: place + 1])])


async def second_call_chances(stage: Stage, *, temperature: float = 1.0) -> dict[str, float]:
    """How likely the policy is, after the right first call and its result, to begin another call (mean and median over the
    questions), and to write the whole right one (mean)."""
    worker = stage.model.sampler()
    assert isinstance(worker, Worker)

    def look() -> list[list[float]]:
        with torch.no_grad():
            samples = stage.second_turns
            scores = worker.trainer.score(samples, prefix=common_prefix(samples), temperature=temperature)
        return [list(map(float, scores.log_probs[scores.rows == row])) for row in range(len(samples))]

    turns = await worker.engine.exclusive(look)
    begun, whole = [math.exp(turn[0]) for turn in turns], [math.exp(sum(turn)) for turn in turns]
    return {"begun": fmean(begun), "begun_median": median(begun), "whole": fmean(whole)}


async def measure(stage: Stage, *, n: int, seed: int) -> dict[str, Any]:
    """Tallies on `n` held-out questions, once each, greedy and at temperature 1; the chances of a second call beside them."""
    environment = calculator()
    found: dict[str, Any] = {"chances": await second_call_chances(stage)}
    for decoding, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        groups = await gather_trajectory_groups(
            balanced(environment.split("test"), n),
            model=stage.model,
            environment=environment,
            toolbox=stage.toolbox,
            rollouts=1,
            temperature=temperature,
            seed=seed,
            step=-1,
        )
        counts = tally([one for group in groups for one in group.trajectories], environment)
        found[decoding] = {level: {**one, "ci95": wilson(one["solved"], one["n"])} for level, one in counts.items()}
    return found
