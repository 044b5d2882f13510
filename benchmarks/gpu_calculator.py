"""A real model learns the calculator on one GPU: before, a supervised start, reinforcement learning, after; one command of
at most ten minutes that keeps what it has when time runs out.

    python -m benchmarks.gpu_calculator --model MENDED --trainer unsloth --engine vllm --warm-start 4000 --seconds 300 --out DIR

From a weak start in two halves, each with a test of pairs against the start:

    … --warm-start 200 --warm-epochs 4 --progress 0.3 --save /tmp/half1 --out DIR/1
    … --resume /tmp/half1 --against DIR/1/result.json --progress 0.3 --save /tmp/half2 --out DIR/2

`--control shuffled` deals the rewards out anew; `--warm-start 0 --lenient` learns from rewards alone. `--seconds` is for the
supervised start and reinforcement learning together; the engine's start (in which the demonstrations are
played) and evaluations come on top.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio

from art_mcp.agent.demonstrate import Demonstration, sample_of
from art_mcp.agent.imitation import Lessons, imitation_loop
from art_mcp.core.samples import make_sample
from art_mcp.local.remote import packed
from art_mcp.types import Sample, ScoredTrajectory, TrainConfig
from benchmarks.gpu_look import look_at_engines, seen_loading
from benchmarks.gpu_reinforce import Run, compare_with_raw, reinforce, samples_of_a_step
from benchmarks.gpu_replay import Recorded
from benchmarks.gpu_report import Clock, Curve, Report, describe_run, mcnemar
from benchmarks.gpu_setup import make_backend, make_spec, parser_of
from benchmarks.gpu_stage import Condition, Draw, measure, open_conditions, play_demonstrations

MAIN, BEYOND = (1, 2, 3, 4, 5), (6, 7, 8)
DECODINGS = {"greedy": 0.0, "sampled": 1.0}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--warm-start", type=int, help="demonstrations, half with `evaluate` (2000; with --resume none)")
    parser.add_argument(
        "--warm-levels", type=json.loads, metavar="JSON", help="each level's share in them, [1, 1, …] unless given"
    )
    parser.add_argument("--warm-epochs", type=float, default=1.0)
    parser.add_argument("--warm-batch", type=int, default=64)
    parser.add_argument("--warm-rate", type=float, default=3e-4)
    parser.add_argument("--seconds", type=float, default=300.0, help="supervised start and reinforcement learning together")
    parser.add_argument("--steps", type=int, help="at most so many steps of reinforcement learning")
    parser.add_argument("--final-rate", type=float, help="the rate falls to this along a cosine")
    parser.add_argument("--target-kl", type=float, default=5e-4, help="how far a step may go, in nats a token; 0: any distance")
    parser.add_argument("--min-agreement", type=float, default=3.0, help="shorten steps while gradients agree less; 0: never")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the rollouts that are learned from")
    parser.add_argument("--scale-advantages", action="store_true")
    parser.add_argument("--objective", choices=("cispo", "reinforce", "ppo", "gspo"), default="cispo")
    parser.add_argument("--share", choices=("even", "learning"), default="even", help="how a step's questions are dealt out")
    parser.add_argument("--progress", type=float, default=0.0, help="reward for steps on the way, at most so much")
    parser.add_argument("--uniform", action="store_true", help="walk through the questions, without the curriculum")
    parser.add_argument(
        "--overlap", type=int, nargs="?", default=0, const=1, help="play so many steps ahead (1 without a number)"
    )
    parser.add_argument("--control", choices=("none", "shuffled"), default="none")
    parser.add_argument("--eval-n", type=int, default=500, help="held-out questions of levels 1 to 5, for each figure")
    parser.add_argument("--reserve", type=float, default=75.0, help="seconds kept for the evaluation after training")
    parser.add_argument(
        "--before",
        nargs="*",
        choices=tuple(DECODINGS),
        default=tuple(DECODINGS),
        help="evaluate so before training",
    )
    parser.add_argument("--no-before", dest="before", action="store_const", const=(), help="do not evaluate before training")
    parser.add_argument("--no-beyond", dest="beyond", action="store_false", help="do not ask levels 6 to 8")
    parser.add_argument("--against", type=Path, help="the result.json whose start is compared with")
    parser.add_argument("--save", type=Path, help="where the trained model is left")
    parser.add_argument(
        "--dump",
        type=Path,
        help="a file for the tokens and logprobs of the evaluations at temperature 1, and of one more step's rollouts",
    )
    parser.add_argument(
        "--look", type=Path, help="a folder in which vLLM's processes tell where they are while they read an adapter"
    )
    given = parser.parse_args(argv)
    if given.warm_start is None:
        given.warm_start = 0 if given.resume else 2000
    return given


async def evaluate_all(
    run: Run, label: str, *, levels: Sequence[int], reserve: float, decodings: Sequence[str] = tuple(DECODINGS)
) -> dict[str, Any]:
    """Every condition and decoding, the telling ones first; each is in the file as soon as it is done."""
    found: dict[str, Any] = {}
    each = max(1, run.arguments.eval_n // len(MAIN))
    kept: list[ScoredTrajectory] = []
    for decoding in decodings:
        for condition in run.conditions:
            figures = await measure(
                condition,
                model=run.model,
                levels=levels,
                each=each,
                temperature=DECODINGS[decoding],
                concurrency=run.arguments.concurrency,
                clock=run.clock,
                reserve=reserve,
                keep=kept if decoding == "sampled" else None,
            )
            found[f"{condition.name}/{decoding}"] = figures
            run.report.add(**{label: found})
            main = figures.get("levels_1_5", {})
            main = main if main.get("n") else figures  # where levels 6 to 8 are asked alone
            shown = f"{main.get('solved')} of {main.get('n')} in {figures.get('seconds')} s"
            run.clock.say(f"{label} {condition.name} {decoding}: {shown}")
    dump(run.arguments.dump, label, [make_sample(one.trajectory, 1.0) for one in kept])
    return found


def dump(path: Path | None, label: str, samples: Sequence[Sample]) -> None:
    """Adds `samples` under `label` to a JSON file, for checks of logprobs and gradients elsewhere."""
    if path is not None and samples:
        path.parent.mkdir(parents=True, exist_ok=True)
        values = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**values, label: [packed(sample) for sample in samples]}))


async def open_model(
    model: Recorded, backend: Any, conditions: Sequence[Condition], arguments: argparse.Namespace
) -> tuple[list[Demonstration], float]:
    """Starts engine and trainer; the demonstrations, which need neither, are played meanwhile: they, and their seconds."""
    shown: list[Demonstration] = []
    seconds = 0.0

    async def play() -> None:
        nonlocal seconds
        began = time.monotonic()
        shown.extend(
            await play_demonstrations(conditions, arguments.warm_levels, count=arguments.warm_start, seed=arguments.seed)
        )
        seconds = time.monotonic() - began

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(model.register, backend)
        if arguments.warm_start:
            tasks.start_soon(play)
    return shown, seconds


async def warm_start(run: Run, *, seconds: float) -> dict[str, Any]:
    """Supervised steps on demonstrations; what came of them."""
    given = run.arguments
    samples = [sample_of(one, dialect=run.model.dialect()) for one in run.shown]
    lessons = Lessons(len(samples), epochs=given.warm_epochs, batch=given.warm_batch, seconds=seconds)

    async def imitate(batch: Sequence[Sample], config: TrainConfig) -> Mapping[str, float]:
        return await run.backend.imitate(run.model, batch, config=config)

    async def save(step: int) -> None:
        pass  # what is kept is the end

    learned = await imitation_loop(
        run.model,
        samples,
        imitate=imitate,
        lessons=lessons,
        config=run.config,
        highest_rate=given.warm_rate,
        recorder=run.curve,
        save=save,
        seed=given.seed,
    )
    return {"demonstrations": len(samples), "seconds_learning": learned, "steps": len(run.curve.rows)}


async def learn(run: Run) -> None:
    """Both kinds of training within `--seconds`, which the deadline may shorten."""
    given = run.arguments
    seconds = min(given.seconds, run.clock.left(reserve=given.reserve))
    began = time.monotonic()
    if given.warm_start:
        run.report.add(warm_start=await warm_start(run, seconds=seconds), curve=run.curve.rows)
        if given.steps != 0 and given.warm_start < 1000:  # a weak start, against which the end is tested
            paused = time.monotonic()
            run.report.add(start=await evaluate_all(run, "start", levels=MAIN, reserve=60.0))
            began += time.monotonic() - paused
    left = min(seconds - (time.monotonic() - began), run.clock.left(reserve=given.reserve))
    run.report.add(reinforcement=await reinforce(run, seconds=left), training_seconds=time.monotonic() - began)


def compare(run: Run, after: Mapping[str, Any]) -> None:
    """Tests of pairs against the start of this run, or of the run that it goes on from."""
    values = json.loads(run.arguments.against.read_text()) if run.arguments.against else run.report.values
    before = values.get("start") or values.get("before") or {}
    pairs = {
        name: mcnemar(before[name]["solved_ids"], figures["solved_ids"], levels=MAIN)
        for name, figures in after.items()
        if "solved_ids" in figures and "solved_ids" in before.get(name, {})
    }
    run.report.add(pairs=pairs, compared_with="start" if values.get("start") else "before")


async def main(arguments: argparse.Namespace) -> None:
    if arguments.look:
        look_at_engines(arguments.look)
    clock = Clock(arguments.deadline)
    report = Report(arguments.out / "result.json", status="starting", **describe_run(vars(arguments)))
    report.add()
    try:
        async with AsyncExitStack() as stack:
            backend = await stack.enter_async_context(make_backend(arguments))
            opening = open_conditions(arguments.levels, progress=arguments.progress, processes=arguments.tool_processes)
            conditions = await stack.enter_async_context(opening)
            model = Recorded.of(make_spec(arguments))
            shown, playing = await open_model(model, backend, conditions, arguments)
            clock.say(f"started: {backend.facts(model)}; {len(shown)} demonstrations played in {playing:.1f} s")
            report.add(status="started", facts=backend.facts(model), seconds_start=clock.spent(), seconds_playing=playing)
            draw = Draw(conditions, seed=arguments.seed, curriculum=not arguments.uniform)
            if arguments.resume:
                draw.recall(arguments.resume)
            run = Run(arguments, model, backend, conditions, clock, report, Curve(clock), shown, draw)
            if arguments.before and not arguments.against:
                reserve = arguments.reserve + min(60.0, arguments.seconds)
                await evaluate_all(run, "before", levels=MAIN, reserve=reserve, decodings=arguments.before)
            await learn(run)
            report.add(status="trained", seconds_trained=clock.spent())
            if arguments.save:
                await backend.save(model, str(arguments.save))
                draw.save(arguments.save)
            await compare_with_raw(run)
            report.add(status="evaluating")
            after = await evaluate_all(run, "after", levels=MAIN, reserve=15.0)
            compare(run, after)
            if arguments.dump:
                dump(arguments.dump, "step", await samples_of_a_step(run))
            if arguments.beyond:
                await evaluate_all(run, "after_levels_6_8", levels=BEYOND, reserve=15.0)
            report.add(status="finished", seconds_total=clock.spent())
    except BaseException as error:
        report.add(status="failed", error=f"{type(error).__name__}: {error}", seconds_total=clock.spent())
        raise
    finally:
        if arguments.look:
            report.add(seen_loading=seen_loading(arguments.look))
        clock.say(f"ended: {report.values['status']}; {arguments.out / 'result.json'}")


if __name__ == "__main__":
    anyio.run(main, parse())
