"""The supervised start of a run: demonstrations are made or read, kept in the run's folder, and learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from art_mcp.agent.demonstrate import Demonstration, read_line, sample_of, show_solutions, show_successes, write_line
from art_mcp.agent.evaluate import balanced
from art_mcp.agent.group import gather_trajectory_groups
from art_mcp.agent.imitation import Lessons, imitation_loop
from art_mcp.agent.loop import Plan, Save, pick
from art_mcp.errors import ConfigError, RunError, TrainError, boundary
from art_mcp.observe.console import DETAIL, DURATIONS, ConsoleProgress, Part
from art_mcp.observe.waiting import waiting
from art_mcp.ports import Recorder
from art_mcp.store.run import Run
from art_mcp.store.whole import replace_text
from art_mcp.types import Sample, Scenario, Tool, TrainConfig, TrajectoryGroup
from art_mcp.wiring.stage import Stage

DEMONSTRATIONS = "demonstrations.jsonl"
"""In the run's folder: what was learned, as a file that `--from` reads."""


class LessonProgress(ConsoleProgress):
    """The progress line of supervised steps; its tokens are the ones that are learned."""

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        self._tokens += int(values["trainable_tokens"])
        seconds = Part(f"train {values['seconds_train']:.2f} s", DURATIONS)
        self._over(step + 1, (Part(f"loss {values['loss']:.3f}"), Part(f"lr {values['learning_rate']:.1e}", DETAIL), seconds))


@dataclass(frozen=True, slots=True)
class Both:
    """A Recorder that is a run folder and a console, and others where they are wanted. A RunError of the others is told, once
    for each of them, and ends nothing: the folder has it all."""

    run: Run
    console: ConsoleProgress
    others: Sequence[Recorder] = ()
    failed: set[str] = field(default_factory=set[str])

    def groups(self, step: int, groups: Sequence[TrajectoryGroup]) -> None:
        self.run.groups(step, groups)
        self._others(step, lambda other: other.groups(step, groups))

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        self.run.metrics(step, values)
        self.console.metrics(step, values)
        self._others(step, lambda other: other.metrics(step, values))

    def _others(self, step: int, record: Callable[[Recorder], None]) -> None:
        for other in self.others:
            name = type(other).__name__
            try:
                record(other)
            except RunError as error:
                if name not in self.failed:
                    self.console.say(
                        f"note: {error}, and may miss others: training goes on, and {self.run.folder} has them all"
                    )
                self.failed.add(name)


def checkpoints_of(stage: Stage, run: Run, *, keep: int) -> Save:
    """Saves a step of `stage` among the run's checkpoints, of which the last `keep` stay."""

    async def save(step: int) -> None:
        await stage.backend.save(stage.model, str(run.checkpoint(step)))
        run.prune(keep)

    return save


def seconds_of(run: Run, first: int, most: float | None) -> tuple[float, float | None]:
    """The seconds of training that a run which goes on at step `first` has spent, and how many of `most` are left."""
    lines = run.read_metrics() if first else []  # a first step that could not be recorded has none
    spent = float(lines[-1]["seconds_total"]) if lines else 0.0
    return spent, None if most is None else max(0.0, most - spent)


def say_where_done(plan: Plan, *, taken: int, taught: int, spent: float, stream: Any) -> None:
    """Tells `stream` where nothing is left of `plan` for a run with so many steps `taken`, of which sft's `taught` do not
    count, and so many seconds `spent`, of which sft's do."""
    after = f" beside sft's {taught}" if taught else ""
    if plan.seconds is not None and spent >= plan.seconds:
        included = ", sft's included," if taught else ""
        what = f"spent {spent:.0f} s{included} of {plan.seconds:g}: ask for more with --seconds {100 * (int(spent) // 100 + 2)}"
    elif plan.steps is not None and taken - taught >= plan.steps:
        what = f"taken {taken - taught} steps of {plan.steps}{after}: ask for more with --steps {taken - taught + 100}"
    else:
        return
    stream.write(f"nothing is left to train: the run has {what}\n")


async def learn_by_example(
    stage: Stage,
    run: Run,
    *,
    lessons: Lessons,
    plan: Plan,
    config: TrainConfig,
    keep: int,
    others: Sequence[Recorder],
    stream: Any,
) -> dict[str, Any]:
    """The supervised steps that are left, recorded by `others` too, and a checkpoint whose optimizer begins anew; returns what
    the manifest says."""
    from art_mcp.local.rates import imitation_rate

    async def imitate(samples: Sequence[Sample], config: TrainConfig) -> Mapping[str, float]:
        return await stage.backend.imitate(stage.model, samples, config=config)

    save = checkpoints_of(stage, run, keep=keep)
    samples, facts = await find_samples(stage, run, lessons=lessons, plan=plan, stream=stream)
    model = stage.backend.facts(stage.model)
    rate = imitation_rate(lora=bool(model["lora"]), parameters=model["parameters"])
    rate = rate if lessons.learning_rate is None else lessons.learning_rate
    first, steps = await stage.model.get_step(), lessons.steps_for(len(samples))
    run.describe({"warm_start": {**facts, "steps": steps, "learning_rate": rate}})
    spent, left = seconds_of(run, first, lessons.seconds)
    with LessonProgress(stream, label="warm start", first=first, steps=steps, seconds=left) as console:
        seconds = await imitation_loop(
            stage.model,
            samples,
            imitate=imitate,
            lessons=lessons,
            config=config,
            highest_rate=rate,
            recorder=Both(run, console, others),
            save=save,
            save_every=plan.save_every,
            seed=plan.seed,
            spent=spent,
        )
    step = await stage.model.get_step()
    await stage.backend.reset_optimizer(stage.model)
    await save(step)
    return {**facts, "steps": step, "learning_rate": rate, "seconds": seconds, "optimizer_reset_at_step": step}


async def find_samples(
    stage: Stage, run: Run, *, lessons: Lessons, plan: Plan, stream: Any
) -> tuple[list[Sample], dict[str, Any]]:
    """What is learned, and how many there are of what was asked for. A run that goes on learns what it began with."""
    kept = run.folder / DEMONSTRATIONS
    if not kept.is_file():  # a kill came between the folder and what it was made for
        keep_demonstrations(run, await find_demonstrations(stage, lessons, plan=plan, stream=stream), tools=stage.toolbox.tools)
    shown = read_file(kept, offered=stage.toolbox.tools)
    samples = [sample_of(one, dialect=stage.model.dialect()) for one in shown]
    most = stage.model.sampler().context_length
    fitting = [sample for sample in samples if len(sample.token_ids) <= most]
    if not fitting:
        raise TrainError(f"none of {len(samples)} demonstrations fits into the model's {most} tokens")
    counts = {"asked": lessons.demonstrations, "demonstrations": len(fitting), "too_long": len(samples) - len(fitting)}
    return fitting, {"source": lessons.source, **counts, "learned_tokens": sum(sum(sample.trainable) for sample in fitting)}


def keep_demonstrations(run: Run, shown: Sequence[Demonstration], *, tools: Sequence[Tool]) -> None:
    path = run.folder / DEMONSTRATIONS
    with boundary(RunError, f"writing {path}"):
        replace_text(path, "".join(write_line(one, offered=tools) + "\n" for one in shown))


async def find_demonstrations(stage: Stage, lessons: Lessons, *, plan: Plan, stream: Any) -> list[Demonstration]:
    """What is to be learned: played now, or read from a file, every line of which is tried."""
    if lessons.source not in ("solutions", "successes"):
        read = read_file(Path(lessons.source), offered=stage.toolbox.tools)[: lessons.demonstrations]
        for shown in read:
            sample_of(shown, dialect=stage.model.dialect())
        return read
    environment = stage.environment
    scenarios = draw(environment.split(plan.split), lessons.demonstrations, seed=plan.seed)
    if lessons.source == "solutions":
        with waiting(stream, "playing demonstrations"):
            return await show_solutions(scenarios, environment=environment, toolbox=stage.toolbox, concurrency=plan.concurrency)
    rollouts = len(scenarios) * plan.rollouts
    with ConsoleProgress(stream, rollouts=rollouts, label="looking for successes") as console:
        groups = await gather_trajectory_groups(
            scenarios,
            model=stage.model,
            environment=environment,
            toolbox=stage.toolbox,
            rollouts=plan.rollouts,
            concurrency=plan.concurrency,
            seed=plan.seed,
            progress=console,
        )
    shown = show_successes(groups, environment=environment, tools=stage.toolbox.tools)
    if not shown:
        raise TrainError(f"none of {rollouts} rollouts succeeded: there is nothing to imitate; begin with solutions or a file")
    return shown


def draw(scenarios: Sequence[Scenario], count: int, *, seed: int) -> list[Scenario]:
    """So many scenarios at random, as many of each level as there can be."""
    return balanced(pick(scenarios, step=0, count=len(scenarios), seed=seed), count)


def read_file(path: Path, *, offered: Sequence[Tool]) -> list[Demonstration]:
    """The demonstrations in a JSONL file. Raises ConfigError, naming the line that is none."""
    with boundary(ConfigError, f"reading demonstrations from {path}", OSError, ValueError):
        lines = path.read_text(encoding="utf-8").split("\n")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ConfigError(f"{path} holds no demonstrations")
    return [read_line(line, offered=offered, where=f"{path}, line {number},") for number, line in numbered]
