"""A training run from before to after: what is asked for, what is recorded, how it goes on after a stop."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from secrets import token_hex
from time import monotonic
from typing import Any

from art_mcp.agent.curriculum import recalled
from art_mcp.agent.imitation import Lessons
from art_mcp.agent.loop import Plan, train_loop
from art_mcp.errors import RunError, boundary
from art_mcp.ports import Recorder
from art_mcp.store.run import RUNS, Run, new_run, refuse_name
from art_mcp.store.versions import installed
from art_mcp.store.whole import replacing
from art_mcp.types import TrainConfig
from art_mcp.wiring.measured import known_at, measure, note_chance, note_cuts, note_decline, note_nothing, recall_taught
from art_mcp.wiring.stage import Setting, Stage, find_run, note_unseen_tools, open_stage, refuse_overlap
from art_mcp.wiring.stopping import status_kept
from art_mcp.wiring.tags import check_tags
from art_mcp.wiring.warm import (
    Both,
    checkpoints_of,
    find_demonstrations,
    keep_demonstrations,
    learn_by_example,
    say_where_done,
    seconds_of,
)

RECORDED = ("art-mcp", "torch", "transformers", "peft", "mcp", "jinja2", "tokenizers", "numpy")


@dataclass(frozen=True, slots=True)
class Training:
    """A whole training run as it was asked for; all of it is in the manifest, so that it can be resumed and repeated.

    `warm_start`: what is learned by example before rewards count; with `plan.steps` 0 that is all. The steps of `plan` come
    after those of the warm start, its seconds are those of both.
    """

    setting: Setting
    plan: Plan = field(default_factory=Plan)
    config: TrainConfig = field(default_factory=TrainConfig)
    eval_n: int = 1000
    eval_split: str = "test"
    keep: int = 3
    warm_start: Lessons | None = None
    prepare: bool = False
    wandb: str | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """Those that the run plays."""
        return (self.plan.split, self.eval_split) if self.eval_n else (self.plan.split,)


async def train(training: Training, *, name: str | None, stream: Any) -> dict[str, Any]:
    """A new run from before to after. Returns the report that the command prints; the run folder holds it too. The folder is
    made once everything is open, so that a mistake leaves none behind."""
    refuse_name(RUNS, name)
    refuse_recorders(training)
    refuse_overlap(training.setting, training.plan)
    clock = Clock()
    training = replace(training, setting=check_tags(training.setting, prepare=training.prepare))
    async with open_stage(training.setting, splits=training.splits, stream=stream) as stage:
        lessons = training.warm_start
        if not lessons:
            note_unseen_tools(stage, stream=stream)
        shown = await find_demonstrations(stage, lessons, plan=training.plan, stream=stream) if lessons else ()
        run = new_run(RUNS, name, keep_seconds=not training.setting.deterministic)
        with run.held():
            run.describe(describe_stage(stage))
            if lessons:
                keep_demonstrations(run, shown, tools=stage.toolbox.tools)
            return await carry_out(training, run, stage=stage, clock=clock, stream=stream)


async def resume(folder: str, *, plan: Mapping[str, Any], stream: Any) -> dict[str, Any]:
    """Goes on with a run from its last checkpoint, or from its start where it has none yet. `plan` (steps, seconds), unless it
    is empty, takes the place of what the run was asked for. Raises RunError, before anything is touched, for a run that another
    process goes on with."""
    run = find_run(folder)
    with run.held():
        return await go_on(run, plan=plan, stream=stream)


async def go_on(run: Run, *, plan: Mapping[str, Any], stream: Any) -> dict[str, Any]:
    """`resume` of a run that is ours."""
    training = read_training(run)
    refuse_recorders(training)
    recall_taught(run)
    if plan:
        training = replace(training, plan=replace(training.plan, **{"steps": None, "seconds": None, **plan}))
    run = replace(run, keep_seconds=not training.setting.deterministic)
    clock = Clock()
    last = run.checkpoints()[-1:]
    training = replace(training, plan=no_less_than_taken(training.plan, run, last[0] if last else 0))
    checkpoint = str(run.checkpoint(last[0])) if last else None
    async with open_stage(training.setting, splits=training.splits, resume_from=checkpoint, stream=stream) as stage:
        run.rewind(last[0] if last else 0)
        resumed = {"step": last[0] if last else 0, **describe_stage(stage)}
        run.describe({"resumed": [*run.manifest.get("resumed", []), resumed]})
        return await carry_out(training, run, stage=stage, clock=clock, stream=stream)


def no_less_than_taken(plan: Plan, run: Run, step: int) -> Plan:
    """The plan of a run that stands at `step`; steps that it has taken already are not taken back by asking for fewer."""
    taken = step - run.manifest.get("warm_start", {}).get("steps", 0)
    return plan if plan.steps is None else replace(plan, steps=max(plan.steps, taken))


def read_training(run: Run) -> Training:
    """What a run was asked for. Raises RunError where its manifest is not of this version."""
    with boundary(RunError, f"{run.folder}: its manifest is not one that can be resumed", KeyError, TypeError, ValueError):
        values: dict[str, Any] = dict(run.manifest["training"])
        config: dict[str, Any] = dict(values["config"])
        bounds = config["sequence_ratio_bounds"]
        config["sequence_ratio_bounds"] = tuple(bounds) if bounds else None
        values |= {"setting": Setting(**values["setting"]), "plan": Plan(**values["plan"]), "config": TrainConfig(**config)}
        lessons: dict[str, Any] | None = values.get("warm_start")
        values["warm_start"] = None if lessons is None else Lessons(**lessons)
        return Training(**values)


async def carry_out(training: Training, run: Run, *, stage: Stage, clock: Clock, stream: Any) -> dict[str, Any]:
    """The run on an open stage, recorded from here on, however it ends."""
    clock.lap("start")
    run.describe({"training": asdict(training)})
    with status_kept(run, stream), metrics_to(training, run) as others:
        before = run.manifest.get("before") or await measure(stage, training, stream=stream, label="before training")
        clock.lap("evaluate_before")
        run.describe({"before": before})
        if training.warm_start and not run.manifest.get("warm_start", {}).get("done"):
            await warm_up(training, run, stage=stage, clock=clock, others=others, stream=stream)
        trained = await train_stage(stage, training, run, others=others, stream=stream)
        clock.lap("train")
        step = await stage.model.get_step()
        after = known_at(run, step) or await measure(stage, training, stream=stream, label="after training")
        clock.lap("evaluate_after")
        note_decline(run, after, setting=training.setting, step=step, stream=stream)
        note_nothing(before, after, step=step, stream=stream)
        note_cuts(run, stream=stream)
        note_chance(run, stream=stream)
        finish(run, training)
        told = {"after": after, "seconds": clock.laps, "train_seconds": trained, "steps": step}
        run.describe({**told, "status": "finished"})
    report = {"run": str(run.folder), "steps": step, "train_seconds": trained, "before": before, "after": after}
    return report | ({"warm_start": run.manifest["warm_start"]} if training.warm_start else {})


async def warm_up(training: Training, run: Run, *, stage: Stage, clock: Clock, others: Sequence[Recorder], stream: Any) -> None:
    """The supervised part of a run, and what it gave."""
    assert training.warm_start is not None
    lessons, plan = training.warm_start, training.plan
    limits = [seconds for seconds in (lessons.seconds, plan.seconds) if seconds is not None]
    learned = await learn_by_example(
        stage,
        run,
        lessons=replace(lessons, seconds=min(limits, default=None)),
        plan=plan,
        config=training.config,
        keep=training.keep,
        others=others,
        stream=stream,
    )
    clock.lap("warm_start")
    after = await measure(stage, training, stream=stream, label="after the warm start")
    clock.lap("evaluate_warm_start")
    run.describe({"warm_start": {**learned, "after": after, "done": True}, "seconds": clock.laps})


async def train_stage(stage: Stage, training: Training, run: Run, *, others: Sequence[Recorder], stream: Any) -> float:
    """Trains by reward, recorded by `others` too; returns the seconds spent on training, those before a resume and of a warm
    start included."""
    from art_mcp.observe.console import ConsoleProgress

    plan, first = training.plan, await stage.model.get_step()
    taught = run.manifest.get("warm_start", {}).get("steps", 0)
    spent, left = seconds_of(run, first, plan.seconds)
    if "resumed" in run.manifest or plan.steps != 0:
        say_where_done(plan, taken=first, taught=taught, spent=spent, stream=stream)
    if plan.steps is not None:
        plan = replace(plan, steps=plan.steps + taught)
    with ConsoleProgress(stream, label="training", first=first, steps=plan.steps, seconds=left) as console:
        recorder: Recorder = Both(run, console, others)
        return await train_loop(
            stage.model,
            stage.environment,
            toolbox=stage.toolbox,
            plan=plan,
            config=training.config,
            recorder=recorder,
            save=checkpoints_of(stage, run, keep=training.keep),
            progress=console,
            spent=spent,
            history=recalled(run.read_metrics()),
        )


def refuse_recorders(training: Training) -> None:
    """Raises ConfigError, before anything is opened or made, where what was asked to record the run is not installed."""
    if training.wandb:
        from art_mcp.observe.wandb_metrics import refuse_missing

        refuse_missing()


@contextmanager
def metrics_to(training: Training, run: Run) -> Generator[Sequence[Recorder]]:
    """Who else records the run within the block: its metrics go to a wandb project, with what was asked for as their config.
    The id there is in the manifest, so that a resumed run goes on in the same place, and another of its name in its own."""
    if not training.wandb:
        yield ()
        return
    from art_mcp.observe.wandb_metrics import open_wandb

    id = run.manifest.get("wandb_id") or token_hex(8)
    run.describe({"wandb_id": id})
    with open_wandb(training.wandb, id=id, name=run.folder.name, folder=run.folder, settings=asdict(training)) as metrics:
        yield (metrics,)


def finish(run: Run, training: Training) -> None:
    from art_mcp.observe.plots import plot_reward

    path, metrics = run.folder / "reward.png", [line for line in run.read_metrics() if "reward" in line]
    if not metrics:
        return
    with boundary(RunError, f"writing {path}"), replacing(path) as aside:
        plot_reward(aside, metrics, title=f"{training.setting.environment}, {run.folder.name}")


def describe_stage(stage: Stage) -> dict[str, Any]:
    """What a manifest says of the parts: versions, the model really loaded, hashes of what the model is shown."""
    from art_mcp.local.models import load_tokenizer, model_source, template_source
    from art_mcp.local.prepare import read_record

    template = template_source(load_tokenizer(model_source(stage.model.spec.source)))
    tools = [tool.schema() for tool in stage.toolbox.tools]
    shared, rest = stage.model.dialect().opening([{"role": "user", "content": ""}], stage.toolbox.tools)
    return {
        "versions": {"python": platform.python_version(), **{name: installed(name) for name in RECORDED}},
        "machine": {"platform": platform.platform(), "processor": platform.processor()},
        "model": {**stage.backend.facts(stage.model), "prepared": read_record(stage.model.spec.source)},
        "template_sha256": digest(template),
        "tools": [tool.name for tool in stage.toolbox.tools],
        "tool_schema_sha256": digest(json.dumps(tools, sort_keys=True)),
        "opening_sha256": digest(json.dumps([*shared, *rest])),
    }


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Clock:
    """Seconds of each phase, since it was made."""

    def __init__(self) -> None:
        self._last = monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = monotonic()
        self.laps[name], self._last = self.laps.get(name, 0.0) + now - self._last, now
