"""Puts concrete parts together for the command line: environment, servers, model, backend, run. Leaves load inside functions."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from art_mcp.agent.loop import Plan, train_loop
from art_mcp.environment import Environment, load_environment
from art_mcp.errors import EnvironmentLoadError, RunError
from art_mcp.model import TrainableModel
from art_mcp.ports import Progress, Recorder, Toolbox
from art_mcp.store.run import Run, new_run, open_run
from art_mcp.types import LoraSpec, Message, ModelSpec, TrainConfig, TrajectoryGroup

if TYPE_CHECKING:
    from art_mcp.agent.check import Verdict
    from art_mcp.agent.evaluate import Evaluation
    from art_mcp.local.backend import LocalBackend
    from art_mcp.observe.console import ConsoleProgress

RUNS = Path("runs")
RECORDED = ("art-mcp", "torch", "transformers", "peft", "mcp", "jinja2", "tokenizers", "numpy")


@dataclass(frozen=True, slots=True)
class Setting:
    """Where something is played: an environment with its options, a model, a config file, and how the backend runs."""

    environment: str
    options: Mapping[str, str] = field(default_factory=dict[str, str])
    model: str = "tiny"
    lora: int | None = None
    config: str = "config.json"
    seed: int = 0
    deterministic: bool = False
    in_process: bool | None = None
    lenient: bool = False


@dataclass(frozen=True, slots=True)
class Stage:
    """A Setting with everything open: ready to play."""

    environment: Environment
    toolbox: Toolbox
    model: TrainableModel[None]
    backend: LocalBackend


def model_spec(setting: Setting, *, resume: bool = False) -> ModelSpec:
    """The model that `setting.model` names: "tiny", a model folder, a run ("runs/x", "x", "x@50", "runs/latest"), a hub id."""
    lora = None if setting.lora is None else LoraSpec(rank=setting.lora)
    source = find_model(setting.model)
    return ModelSpec(source=source, lora=lora, seed=setting.seed, resume=resume, lenient=setting.lenient)


def find_model(text: str) -> str:
    """The folder or hub id that `text` stands for. Raises RunError for a run without (that) checkpoint."""
    name, _, step = text.partition("@")
    for folder in (Path(name), RUNS / name):
        if (folder / "manifest.json").is_file():
            return str(checkpoint_of(open_run(folder), step))
    return text


def checkpoint_of(run: Run, step: str) -> Path:
    steps = run.checkpoints()
    if not steps:
        raise RunError(f"{run.folder} has no checkpoint yet")
    if step and (not step.isdigit() or int(step) not in steps):
        raise RunError(f"{run.folder} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    return run.checkpoint(int(step) if step else steps[-1])


@asynccontextmanager
async def open_stage(setting: Setting, *, resume_from: str | None = None) -> AsyncGenerator[Stage]:
    """Opens the environment's servers and loads the model; everything is closed when the block ends."""
    from art_mcp.local.backend import LocalBackend
    from art_mcp.tools import open_tools

    environment = load_environment(setting.environment, **setting.options)
    spec = model_spec(setting) if resume_from is None else replace(model_spec(setting), source=resume_from, resume=True)
    model = TrainableModel(name="policy", spec=spec)
    async with (
        LocalBackend(in_process=setting.in_process, deterministic=setting.deterministic) as backend,
        open_tools(environment.servers, config=setting.config, only=environment.tools) as toolbox,
    ):
        await model.register(backend)
        yield Stage(environment, toolbox, model, backend)


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
    run = open_run(Path(folder) if Path(folder).exists() else RUNS / folder)
    training = read_training(run.manifest)
    training = replace(training, plan=replace(training.plan, **plan))
    run = replace(run, keep_seconds=not training.setting.deterministic)
    checkpoint = checkpoint_of(run, "")
    run.rewind(run.checkpoints()[-1])
    run.describe({"training": asdict(training), "status": "running"})
    return await carry_out(training, run, stream=stream, resume_from=str(checkpoint))


def read_training(manifest: Mapping[str, Any]) -> Training:
    values = dict(manifest["training"])
    config = dict(values["config"])
    bounds = config["sequence_ratio_bounds"]
    config["sequence_ratio_bounds"] = tuple(bounds) if bounds else None
    return Training(
        **{**values, "setting": Setting(**values["setting"]), "plan": Plan(**values["plan"]), "config": TrainConfig(**config)}
    )


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


async def evaluate_stage(
    stage: Stage, *, split: str, n: int, temperature: float, seed: int, stream: Any, label: str = "evaluating"
) -> Evaluation:
    """Plays `n` scenarios of `split` once each, with progress on `stream`."""
    from art_mcp.agent.evaluate import evaluate
    from art_mcp.observe.console import ConsoleProgress

    with ConsoleProgress(stream, total=n, label=label) as console:
        progress: Progress = console
        return await evaluate(
            stage.model,
            stage.environment,
            toolbox=stage.toolbox,
            split=split,
            n=n,
            temperature=temperature,
            seed=seed,
            progress=progress,
        )


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


@dataclass(frozen=True, slots=True)
class Played:
    """One rollout for the terminal: (author, text) `parts` of the token stream, `lines` of the conversation."""

    parts: list[tuple[str, str]]
    lines: list[tuple[str, str]]
    stop_reason: str
    reward: float
    rewards: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


async def play_one(setting: Setting, *, split: str, number: int, temperature: float) -> Played:
    """Plays one scenario. Raises EnvironmentLoadError where the split has fewer."""
    from art_mcp.agent.rollout import rollout
    from art_mcp.local.models import load_tokenizer, model_source
    from art_mcp.sampling.tokenizer import BackendTokenizer

    async with open_stage(setting) as stage:
        scenarios = stage.environment.scenarios(split)
        if number >= len(scenarios):
            raise EnvironmentLoadError(
                f"split {split!r} has {len(scenarios)} scenarios: --number is at most {len(scenarios) - 1}"
            )
        trajectory = await rollout(
            scenarios[number],
            sampler=stage.model.sampler(),
            dialect=stage.model.dialect(),
            toolbox=stage.toolbox,
            system=stage.environment.system,
            limits=stage.environment.limits,
            temperature=temperature,
            key=(setting.seed, 0),
        )
        scored = await stage.environment.score(trajectory, stage.toolbox)
        tokenizer = BackendTokenizer(load_tokenizer(model_source(stage.model.spec.source)))
    authors = [("world" if span.logprobs is None else "policy", tokenizer.decode(span.token_ids)) for span in trajectory.spans]
    return Played(authors, spoken(trajectory.messages), trajectory.stop_reason.value, scored.reward, dict(scored.parts))


def spoken(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Who said what: the user, the policy (its calls as name and arguments), the tools."""
    lines: list[tuple[str, str]] = []
    for message in messages:
        author = "policy" if message["role"] == "assistant" else str(message["role"])
        if message.get("content") or not message.get("tool_calls"):
            lines.append((author, str(message.get("content") or "")))
        for made in message.get("tool_calls") or ():
            function = made["function"]
            lines.append((author, f"calls {function['name']}({json.dumps(function['arguments'], ensure_ascii=False)})"))
    return lines


async def check(setting: Setting, *, split: str, n: int) -> tuple[str, Verdict]:
    """What the model would see of the first scenario, and whether lazy policies stay below the reference solution."""
    from art_mcp.agent.check import check_environment
    from art_mcp.local.models import load_dialect, load_tokenizer, model_source
    from art_mcp.sampling.scripted import ScriptedSampler
    from art_mcp.sampling.tokenizer import BackendTokenizer
    from art_mcp.tools import open_tools

    environment = load_environment(setting.environment, **setting.options)
    spec = model_spec(setting)
    dialect = load_dialect(spec)
    async with open_tools(environment.servers, config=setting.config, only=environment.tools) as toolbox:
        messages: list[Message] = [{"role": "system", "content": environment.system}] if environment.system else []
        messages.append({"role": "user", "content": environment.scenarios(split)[0].prompt})
        shared, rest = dialect.opening(messages, toolbox.tools)
        opening = BackendTokenizer(load_tokenizer(model_source(spec.source))).decode([*shared, *rest])
        verdict = await check_environment(environment, dialect=dialect, toolbox=toolbox, play=ScriptedSampler, split=split, n=n)
    return opening, verdict
