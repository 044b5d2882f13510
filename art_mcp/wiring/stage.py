"""Opens what a command plays on: the environment, its servers, the model that a name stands for, a backend."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from art_mcp.core.address import without_login
from art_mcp.environment import Environment, load_environment
from art_mcp.errors import ConfigError, ModelError, boundary
from art_mcp.local.folders import check_folder
from art_mcp.model import Model, TrainableModel
from art_mcp.observe.waiting import waiting
from art_mcp.ports import Progress, Toolboxes, Tracer
from art_mcp.store.run import RUNS, Run, open_run, run_folder, stored_model
from art_mcp.types import LoraSpec, ModelSpec

if TYPE_CHECKING:
    from art_mcp.agent.evaluate import Evaluation
    from art_mcp.agent.loop import Plan
    from art_mcp.local.backend import LocalBackend

KNOWN_TOOLS = "art_mcp_tools.json"
"""In the folder of a model that can use a few tools only: which ones, and what it was trained on."""


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
    engine: Literal["transformers", "vllm"] | None = None
    engine_python: str | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict[str, Any])
    engine_replicas: int = 1
    tool_processes: int = 0
    trainer: Literal["torch", "unsloth"] | None = None
    weave: str | None = None


@dataclass(frozen=True, slots=True)
class Scene:
    """Ready to play and to evaluate, with any model."""

    environment: Environment
    toolbox: Toolboxes
    model: Model[None]
    tracer: Tracer | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """A Setting with everything open: ready to train, too."""

    environment: Environment
    toolbox: Toolboxes
    model: TrainableModel[None]
    backend: LocalBackend


def model_spec(setting: Setting, *, resume: bool = False) -> ModelSpec:
    """The model that `setting.model` names: "tiny", a model folder, a run ("runs/x", "x", "x@50", "runs/latest"), a hub id.
    Raises ModelError for a folder from which none can be loaded; torch, which takes seconds, is not loaded for that."""
    lora = None if setting.lora is None else LoraSpec(rank=setting.lora)
    source = look_over(find_model(setting.model))
    return ModelSpec(source=source, lora=lora, seed=setting.seed, resume=resume, lenient=setting.lenient)


def find_model(text: str) -> str:
    """The folder or hub id that `text` stands for. Raises RunError for a run without (that) checkpoint."""
    if is_endpoint(text):
        raise ConfigError(
            f"{without_login(text)} is an endpoint, whose weights are elsewhere: "
            "it can be played (rollout) and measured (eval) only"
        )
    return stored_model(text)


def look_over(source: str) -> str:
    """What `find_model` gave, unless it is a folder from which no model can be loaded: then ModelError."""
    if source != "tiny":
        check_folder(source)
    return source


def find_run(text: str) -> Run:
    """The run that a path, or a name under runs/, stands for. Raises RunError, naming the runs there are."""
    return open_run(run_folder(text) or RUNS / Path(text).name)


def backend_of(setting: Setting) -> LocalBackend:
    """A backend as the setting has it; nothing runs before it is opened. Slow to import: check what is asked for first."""
    from art_mcp.local.backend import LocalBackend

    return LocalBackend(
        in_process=setting.in_process,
        deterministic=setting.deterministic,
        engine=setting.engine,
        engine_python=setting.engine_python,
        engine_args=setting.engine_args,
        engine_replicas=setting.engine_replicas,
        trainer=setting.trainer,
        weave=setting.weave or False,
    )


@asynccontextmanager
async def open_stage(
    setting: Setting, *, splits: Sequence[str] = (), resume_from: str | None = None, stream: Any = None
) -> AsyncGenerator[Stage]:
    """Opens the environment's servers and loads the model (with its optimizer, where it resumes from a checkpoint);
    everything is closed when the block ends. `splits` will be played: a wrong one is told before anything is opened. A terminal
    on `stream` is shown that this takes its time."""
    environment = load_environment(setting.environment, **setting.options)
    for name in splits:
        environment.split(name)
    spec = model_spec(replace(setting, model=resume_from or setting.model), resume=resume_from is not None)
    model = TrainableModel(name="policy", spec=spec)
    async with AsyncExitStack() as stack:
        with waiting(stream, "loading"):
            from art_mcp.tools import open_servers  # a slow import: only now, so that a wrong name is told at once

            backend = await stack.enter_async_context(backend_of(setting))
            servers = open_servers(environment, config=setting.config, processes=setting.tool_processes)
            toolbox = await stack.enter_async_context(servers)
            await model.register(backend)
        yield Stage(environment, toolbox, model, backend)


@asynccontextmanager
async def open_scene(
    setting: Setting, *, splits: Sequence[str], api_key: str | None = None, stream: Any = None
) -> AsyncGenerator[Scene]:
    """As `open_stage`, but the model may also be an endpoint; nothing is loaded for that."""
    if not is_endpoint(setting.model):
        async with open_stage(setting, splits=splits, stream=stream) as stage:
            yield Scene(stage.environment, stage.toolbox, stage.model, stage.backend.tracer)
        return
    from art_mcp.tools import open_servers
    from art_mcp.wiring.remote import remote_model, weave_tracer

    environment = load_environment(setting.environment, **setting.options)
    for name in splits:
        environment.split(name)
    model = await remote_model(setting, api_key=api_key)
    async with (
        weave_tracer(setting.weave) as tracer,
        open_servers(environment, config=setting.config, processes=setting.tool_processes) as toolbox,
    ):
        yield Scene(environment, toolbox, model, tracer)


def note_unseen_tools(stage: Stage | Scene, *, stream: Any) -> None:
    """Tells `stream` where the model knows a few tools only, and is offered others."""
    if not isinstance(stage.model, TrainableModel):
        return
    unseen = told_unseen(stage.model.spec.source, stage.toolbox)
    if unseen:
        stream.write(f"note: {unseen}: name another --model, or teach it first, by art-mcp sft\n")


def told_unseen(source: str, toolbox: Toolboxes) -> str:
    """That the model `source` knows a few tools only, as its folder says, and which others it is offered; "" where none."""
    from art_mcp.local.models import model_source

    path = Path(model_source(source)) / KNOWN_TOOLS
    if not path.is_file():
        return ""
    with boundary(ModelError, f"reading {path}", OSError, ValueError, KeyError, TypeError):
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        unseen = [tool.name for tool in toolbox.tools if tool.name not in known["tools"]]
        few = f"{', '.join(unseen[:3])}{', …' if len(unseen) > 3 else ''}"
        return f"{source} was trained on {known['trained_on']} and never saw {few}" if unseen else ""


def refuse_overlap(setting: Setting, plan: Plan) -> None:
    """Raises ConfigError where the policy that samples a turn would depend on time, and must not."""
    if plan.overlap and setting.deterministic:
        raise ConfigError(
            "a deterministic run cannot overlap its steps: how long one takes would decide which policy samples a turn of "
            "those after it; leave out --overlap or --deterministic"
        )


def is_endpoint(model: str) -> bool:
    return model.startswith(("http://", "https://"))


async def evaluate_stage(
    stage: Stage | Scene,
    *,
    split: str,
    n: int,
    temperature: float,
    seed: int,
    stream: Any,
    label: str = "evaluating",
    concurrency: int = 128,
    hopeless_after: int | None = None,
) -> Evaluation:
    """Plays `n` scenarios of `split` once each (all there are, where there are fewer), with progress on `stream`, which is told
    where it ended with the first `hopeless_after`."""
    from art_mcp.agent.evaluate import balanced, evaluate
    from art_mcp.observe.console import ConsoleProgress

    count = len(balanced(stage.environment.split(split), n))
    with ConsoleProgress(stream, rollouts=count, label=label) as console:
        progress: Progress = console
        found = await evaluate(
            stage.model,
            stage.environment,
            toolbox=stage.toolbox,
            split=split,
            n=n,
            temperature=temperature,
            seed=seed,
            concurrency=concurrency,
            progress=progress,
            tracer=stage.tracer if isinstance(stage, Scene) else None,
            hopeless_after=hopeless_after,
        )
    if found.failed:
        failed = f"{found.failed} of {found.n + found.failed} rollouts failed and count neither way"
        stream.write(f"{label}: {failed}, first with {found.first_failure}\n")
    if found.n + found.failed < count:
        stream.write(f"{label}: none of {found.n} is solved, so the other {count - found.n} are not played\n")
    return found
