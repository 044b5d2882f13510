"""Where a training step's time goes on one GPU, and how near the rollouts come to what vLLM does without tools.

    python -m benchmarks.gpu_step_budget --resume SAVED --trainer unsloth --engine vllm --steps 6 --out DIR

Raw: every request of the last two steps (same prompt tokens, same output lengths, `ignore_eos`) is sent to the same server
again, as many in flight as there were rollouts, without tools in between; under a cache salt of its own, so that nothing is
found of what the run computed. The first step compiles and is left out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from statistics import fmean
from typing import Any

import anyio

from art_mcp.core.samples import check_alive, make_samples
from art_mcp.types import TrainConfig
from benchmarks.gpu_replay import Recorded, Request, cpu_seconds, first_token, replay
from benchmarks.gpu_report import Clock, Report, describe_run
from benchmarks.gpu_setup import make_backend, make_spec, parser_of
from benchmarks.gpu_stage import Draw, open_conditions, play

PEAK = 989e12
"""bf16 operations a second of an H100 or H200, by their data sheets."""


async def take_step(
    model: Recorded, conditions: Sequence[Any], draw: Draw, *, arguments: argparse.Namespace, config: TrainConfig
) -> tuple[dict[str, Any], list[Request]]:
    """One step, its times in seconds and its rates; and its requests."""
    step = await model.get_step()
    model.requests.clear()
    picked = [draw.pick(one, step=step, count=arguments.groups // len(conditions)) for one in conditions]
    options = {
        "rollouts": arguments.rollouts,
        "concurrency": arguments.concurrency,
        "seed": arguments.seed,
        "step": step,
        "temperature": 1.0,
    }
    began, cpu = time.monotonic(), cpu_seconds()
    played = await play(conditions, picked, model=model, **options)
    rolled, used = time.monotonic(), cpu_seconds() - cpu
    groups = [group for part in played for group in part]
    check_alive(groups)
    requests = list(model.requests)
    metrics = dict(await model.train(groups, config=config))
    trained = time.monotonic()
    first = await first_token(model, requests[0].token_ids)
    for condition, part in zip(conditions, played, strict=True):
        draw.observe(condition, part, step=step)
    scoring = time.monotonic()
    for condition, part in zip(conditions, played, strict=True):
        for group in part:
            for one in group.trajectories:
                await condition.train.score(one.trajectory, condition.toolbox)
    scoring = time.monotonic() - scoring
    samples = make_samples(groups, config, step=step)
    sampled = sum(request.sampled for request in requests)
    publish = float(metrics.get("seconds_publish", 0.0))
    computed = sum(len(sample.token_ids) for sample in samples if sample.advantage)
    busy = union_seconds(requests)
    row = {
        "step": step,
        "rollout": rolled - began,
        "of_it_scoring": scoring,
        "of_it_engine_idle": (rolled - began) - busy,
        "train": trained - rolled - publish,
        "publish": publish,
        "first_new_token_after_last_gradient": publish + first,
        "total": trained - began,
        "requests": len(requests),
        "tool_calls": sum(len(one.trajectory.uses) for group in groups for one in group.trajectories),
        "sampled_tokens": sampled,
        "rollout_tokens_per_second": sampled / (rolled - began),
        "trained_tokens": computed,
        "train_tokens_per_second": computed / max(1e-9, trained - rolled - publish),
        "client_cpu_in_rollout": used / (rolled - began),
        "metrics": {name: float(f"{value:.5g}") for name, value in metrics.items()},
    }
    return row, requests


def union_seconds(requests: Sequence[Request]) -> float:
    """Seconds in which at least one request was in flight."""
    total, end = 0.0, 0.0
    for request in sorted(requests, key=lambda request: request.began):
        total += max(0.0, request.ended - max(end, request.began))
        end = max(end, request.ended)
    return total


async def main(arguments: argparse.Namespace) -> None:
    clock = Clock(arguments.deadline)
    report = Report(arguments.out / "step_budget.json", status="starting", **describe_run(vars(arguments)))
    config = TrainConfig(
        learning_rate=arguments.learning_rate, micro_batch_tokens=arguments.micro_batch_tokens, seed=arguments.seed
    )
    async with AsyncExitStack() as stack:
        backend = await stack.enter_async_context(make_backend(arguments))
        conditions = await stack.enter_async_context(
            open_conditions(arguments.levels, progress=0.0, processes=arguments.tool_processes)
        )
        model = Recorded.of(make_spec(arguments))
        await model.register(backend)
        facts = backend.facts(model)
        report.add(status="started", facts=facts, seconds_start=clock.spent())
        clock.say(f"started: {facts}")
        draw = Draw(conditions, seed=arguments.seed, curriculum=True)
        rows: list[dict[str, Any]] = []
        kept: list[list[Request]] = []
        while len(rows) < arguments.steps and clock.left(reserve=60.0) > 0:
            row, requests = await take_step(model, conditions, draw, arguments=arguments, config=config)
            kept = [*kept[-1:], requests]
            rows.append(row)
            report.add(steps=rows)
            clock.say(
                f"step {row['step']}: " + "  ".join(f"{k} {row[k]:.2f}" for k in ("rollout", "train", "publish", "total"))
            )
        later = rows[1:] or rows
        names = [name for name, value in later[0].items() if isinstance(value, float)]
        mean = {name: fmean([row[name] for row in later]) for name in names}
        report.add(mean=mean, model_flop_utilization=4 * facts["parameters"] * mean["train_tokens_per_second"] / PEAK)
        if arguments.engine == "vllm":
            raw = [await replay(one, worker=backend.sampler(model), concurrency=arguments.concurrency) for one in kept]
            ratios = [
                row["rollout_tokens_per_second"] / one["tokens_per_second"] for row, one in zip(rows[-2:], raw, strict=True)
            ]
            report.add(raw=raw, rollout_to_raw=ratios)
            clock.say(f"raw {[round(one['tokens_per_second']) for one in raw]} tokens/s; rollouts to raw {ratios}")
        report.add(status="finished", seconds_total=clock.spent())


if __name__ == "__main__":
    options = parser_of(__doc__)
    options.add_argument("--steps", type=int, default=6)
    anyio.run(main, options.parse_args())
