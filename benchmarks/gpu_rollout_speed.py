"""How near rollouts come to what vLLM does without tools, by how many are in flight of how many, in which order they begin, and
whether the next batch begins before this one ends; nothing is trained.

    python -m benchmarks.gpu_rollout_speed --resume SAVED --engine vllm --engine-replicas 3 --out DIR

A setting is GROUPSxROLLOUTS@CONCURRENCY, with `L` for the longest conversations first (by the mean of their condition and
level, as measured in a first batch), with `A` for the next of three batches beginning in the places that this one leaves, `AA`
for the next two. Each setting has questions of its own. Raw: the requests of a setting once more, as many in flight, without
tools (`gpu_replay`).
"""

from __future__ import annotations

import argparse
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import anyio

from art_mcp.agent.overlap import open_rounds
from art_mcp.agent.places import Places, places_of
from art_mcp.types import TrajectoryGroup
from benchmarks.gpu_replay import Recorded, cpu_seconds, replay
from benchmarks.gpu_report import Clock, Report, describe_run
from benchmarks.gpu_setup import make_backend, make_spec, parser_of
from benchmarks.gpu_stage import Condition, Draw, open_conditions, play

SETTINGS = "64x8@512,64x8@384,64x8@384L,64x8@256L,128x8@512,128x8@512L,128x8@384L,64x8@512A,64x8@384A,64x8@256A"
AHEAD = 3
"""Batches of a setting with `A`."""


@dataclass(frozen=True, slots=True)
class Setting:
    name: str
    groups: int
    rollouts: int
    concurrency: int
    longest_first: bool
    ahead: int


def read_setting(text: str) -> Setting:
    found = re.fullmatch(r"(\d+)x(\d+)@(\d+)(L?)(A*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no setting: write GROUPSxROLLOUTS@CONCURRENCY, then L or nothing, then A, AA or nothing"
        )
    groups, rollouts, concurrency, longest, ahead = found.groups()
    return Setting(text, int(groups), int(rollouts), int(concurrency), bool(longest), len(ahead))


@dataclass(slots=True)
class Player:
    """Plays batches, and learns from them how long the conversations of a condition and level are."""

    arguments: argparse.Namespace
    model: Recorded
    conditions: Sequence[Condition]
    draw: Draw
    lengths: dict[tuple[str, int], list[int]] = field(default_factory=lambda: defaultdict(list))
    step: int = 1000

    def expected(self, condition: str, level: int) -> float:
        known = self.lengths.get((condition, level))
        return fmean(known) if known else 0.0

    def means(self) -> dict[str, float]:
        return {f"{name}/{level}": self.expected(name, level) for name, level in sorted(self.lengths)}

    async def play(self, setting: Setting, step: int, places: Places) -> list[TrajectoryGroup]:
        counts = self.draw.shares(setting.groups, even=True)
        jobs = [(one, self.draw.pick(one, step=step, count=count)) for one, count in zip(self.conditions, counts, strict=True)]
        if setting.longest_first:
            for one, picked in jobs:
                picked.sort(key=lambda scenario: -self.expected(one.name, scenario.level))
            jobs.sort(key=lambda job: -self.expected(job[0].name, job[1][0].level))
        played = await play(
            [one for one, _ in jobs],
            [picked for _, picked in jobs],
            model=self.model,
            rollouts=setting.rollouts,
            concurrency=places,
            seed=self.arguments.seed,
            step=step,
            temperature=1.0,
        )
        for (one, picked), part in zip(jobs, played, strict=True):
            self.draw.observe(one, part, step=step)
            for scenario, group in zip(picked, part, strict=True):
                self.lengths[one.name, scenario.level] += [each.trajectory.policy_tokens for each in group.trajectories]
        return [group for part in played for group in part]

    async def measure(self, setting: Setting) -> dict[str, Any]:
        """Tokens a second of one batch, or of several that follow each other closely; and of their requests alone."""
        batches = AHEAD if setting.ahead else 1
        first, self.step = self.step, self.step + batches
        places = places_of(setting.concurrency)
        self.model.requests.clear()
        began, cpu = time.monotonic(), cpu_seconds()
        async with open_rounds(
            lambda step, places: self.play(setting, step, places),
            places=places,
            rollouts=setting.groups * setting.rollouts,
            ahead=setting.ahead,
            steps=first + batches,
        ) as rounds:
            played = [await rounds.play(step) for step in range(first, first + batches)]
        seconds, used, lap = time.monotonic() - began, cpu_seconds() - cpu, places.lap()
        requests = list(self.model.requests)
        failures = [failure for one in played for group in one.groups for failure in group.failures]
        worker = self.model.backend.sampler(self.model)
        raw = await replay(requests, worker=worker, concurrency=setting.concurrency)
        tokens = sum(request.sampled for request in requests)
        return {
            "setting": setting.name,
            "rollouts": batches * setting.groups * setting.rollouts,
            "failed": len(failures),
            "first_failure": f"{failures[0].kind}: {failures[0].message}" if failures else "",
            "requests": len(requests),
            "sampled_tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "client_cpu": used / seconds,
            **lap,
            "raw": raw,
            "rollout_to_raw": tokens / seconds / raw["tokens_per_second"],
        }


async def main(arguments: argparse.Namespace) -> None:
    clock = Clock(arguments.deadline)
    report = Report(arguments.out / "rollout_speed.json", status="starting", **describe_run(vars(arguments)))
    settings = [read_setting(text) for text in arguments.settings.split(",")]
    async with AsyncExitStack() as stack:
        backend = await stack.enter_async_context(make_backend(arguments))
        conditions = await stack.enter_async_context(
            open_conditions(arguments.levels, progress=0.0, processes=arguments.tool_processes)
        )
        model = Recorded.of(make_spec(arguments))
        await model.register(backend)
        report.add(status="started", facts=backend.facts(model), seconds_start=clock.spent())
        clock.say("started")
        player = Player(arguments, model, conditions, Draw(conditions, seed=arguments.seed, curriculum=True))
        first = read_setting(f"{arguments.groups}x{arguments.rollouts}@{arguments.concurrency}")
        rows = [{**await player.measure(first), "warm_up": True}]
        for _ in range(arguments.rounds):
            for setting in settings:
                if clock.left(reserve=3 * rows[-1]["seconds"] + 10.0) > 0:
                    rows.append(await player.measure(setting))
                    report.add(measured=rows, lengths=player.means())
                    ours, raw = rows[-1]["tokens_per_second"], rows[-1]["raw"]["tokens_per_second"]
                    clock.say(f"{setting.name}: {ours:.0f} tokens/s, raw {raw:.0f}, ratio {ours / raw:.3f}")
        report.add(status="finished", seconds_total=clock.spent())


if __name__ == "__main__":
    options = parser_of(__doc__)
    options.add_argument("--settings", default=SETTINGS)
    options.add_argument("--rounds", type=int, default=2)
    anyio.run(main, options.parse_args())
