"""A training run from before to after: what is asked for, what is recorded, how it goes on after a stop."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from time import monotonic
from typing import TYPE_CHECKING, Any

from art_mcp.agent.loop import Plan, train_loop
from art_mcp.ports import Recorder
from art_mcp.store.run import Run, new_run
from art_mcp.types import TrainConfig, TrajectoryGroup
from art_mcp.wiring.stage import RUNS, Setting, Stage, checkpoint_of, evaluate_stage, find_run, open_stage

if TYPE_CHECKING:
    from art_mcp.observe.console import ConsoleProgress

RECORDED = ("art-mcp", "torch", "transformers", "peft", "mcp", "jinja2", "tokenizers", "numpy")


@dataclass(frozen=True, slots=True)
class Training:
    """A whole training run as it was asked for; all of it is in the manifest, so that it can be resumed and repeated."""

    setting: Setting
    plan: Plan = field(default_factory=Plan)
    config: TrainConfig = field(default_factory=TrainConfig)
    eval_n: int = 1000
    eval_split: str = "test"
    keep: int = 3


@dataclass(frozen=True, slots=True)
class Both:
    """A Recorder that is a run folder and a console."""

    run: Run
    console: ConsoleProgress

    def groups(self, step: int, groups: Sequence[TrajectoryGroup]) -> None:
        self.run.groups(step, groups)

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        self.run.metrics(step, values)
        self.console.metrics(step, values)


async def train(training: Training, *, name: str | None, stream: Any) -> dict[str, Any]:
    """A new run from before to after. Returns the report that the command prints; the run folder holds it too."""
    run = new_run(RUNS, name, keep_seconds=not training.setting.deterministic)
    run.describe({"training": asdict(training), "status": "running"})
    return await carry_out(training, run, stream=stream, resume_from=None)


async def resume(folder: str, *, plan: Mapping[str, Any], stream: Any) -> dict[str, Any]:
    """Goes on with a run from its last checkpoint; `plan` overrides (steps, seconds) what it was asked for before."""
    run = find_run(folder)
    training = read_training(run.manifest)
    training = replace(training, plan=replace(training.plan, **plan))
    run = replace(run, keep_seconds=not training.setting.deterministic)
    checkpoint = checkpoint_of(run, "")
    run.rewind(run.checkpoints()[-1])
    run.describe({"training": asdict(training), "status": "running"})
    return await carry_out(training, run, stream=stream, resume_from=str(checkpoint))


def read_training(manifest: Mapping[str, Any]) -> Training:
    values: dict[str, Any] = dict(manifest["training"])
    config: dict[str, Any] = dict(values["config"])
    bounds = config["sequence_ratio_bounds"]
    config["sequence_ratio_bounds"] = tuple(bounds) if bounds else None
    values |= {"setting": Setting(**values["setting"]), "plan": Plan(**values["plan"]), "config": TrainConfig(**config)}
    return Training(**values)


async def carry_out(training: Training, run: Run, *, stream: Any, resume_from: str | None) -> dict[str, Any]:
    clock = Clock()
    async with open_stage(training.setting, resume_from=resume_from) as stage:
        clock.lap("start")
        run.describe(describe_stage(stage))
        manifest = run.manifest
        before = manifest.get("before") or await measure(stage, training, stream=stream, label="before training")
        clock.lap("evaluate_before")
        run.describe({"before": before})
        spent = float((run.read_metrics() or [{}])[-1].get("seconds_total", 0.0)) if resume_from else 0.0
        trained = await train_stage(stage, training, run, stream=stream, spent=spent)
        clock.lap("train")
        after = await measure(stage, training, stream=stream, label="after training")
        clock.lap("evaluate_after")
        step = await stage.model.get_step()
    finish(run, training)
    report = {"run": str(run.folder), "steps": step, "train_seconds": trained, "before": before, "after": after}
    run.describe({"after": after, "seconds": clock.laps, "train_seconds": trained, "steps": step, "status": "finished"})
    return report


async def train_stage(stage: Stage, training: Training, run: Run, *, stream: Any, spent: float) -> float:
    from art_mcp.observe.console import ConsoleProgress

    async def save(step: int) -> None:
        await stage.backend.save(stage.model, str(run.checkpoint(step)))
        run.prune(training.keep)

    plan = training.plan
    seconds = None if plan.seconds is None else max(0.0, plan.seconds - spent)
    with ConsoleProgress(stream, total=plan.steps, seconds=seconds, label="training") as console:
        recorder: Recorder = Both(run, console)
        return await train_loop(
            stage.model,
            stage.environment,
            toolbox=stage.toolbox,
            plan=plan,
            config=training.config,
            recorder=recorder,
            save=save,
            progress=console,
            spent=spent,
        )


def finish(run: Run, training: Training) -> None:
    from art_mcp.observe.plots import plot_reward

    plot_reward(run.folder / "reward.png", run.read_metrics(), title=f"{training.setting.environment}, {run.folder.name}")


async def measure(stage: Stage, training: Training, *, stream: Any, label: str) -> dict[str, Any]:
    """Solved rates on the evaluation split, greedy and at temperature 1; empty when no evaluation was asked for."""
    if not training.eval_n:
        return {}
    results: dict[str, Any] = {}
    for decoding, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        result = await evaluate_stage(
            stage,
            split=training.eval_split,
            n=training.eval_n,
            temperature=temperature,
            seed=training.setting.seed,
            stream=stream,
            label=f"{label}, {decoding}",
        )
        results[decoding] = result.to_json()
    return results


def describe_stage(stage: Stage) -> dict[str, Any]:
    """What a manifest says of the parts: versions, the model really loaded, hashes of what the model is shown."""
    tools = [tool.schema() for tool in stage.toolbox.tools]
    shared, rest = stage.model.dialect().opening([{"role": "user", "content": ""}], stage.toolbox.tools)
    return {
        "versions": {"python": platform.python_version(), **{name: installed(name) for name in RECORDED}},
        "machine": {"platform": platform.platform(), "processor": platform.processor()},
        "model": stage.backend.facts(stage.model),
        "tools": [tool.name for tool in stage.toolbox.tools],
        "tool_schema_sha256": digest(json.dumps(tools, sort_keys=True)),
        "opening_sha256": digest(json.dumps([*shared, *rest])),
    }


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # an extra that is not installed: the manifest says so
        return None


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self._last = monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = monotonic()
        self.laps[name], self._last = now - self._last, now
