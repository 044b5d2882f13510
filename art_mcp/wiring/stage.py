"""Opens what a command plays on: the environment, its servers, the model that a name stands for, a backend."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from art_mcp.environment import Environment, load_environment
from art_mcp.errors import RunError
from art_mcp.model import TrainableModel
from art_mcp.ports import Progress, Toolbox
from art_mcp.store.run import Run, open_run
from art_mcp.types import LoraSpec, ModelSpec

if TYPE_CHECKING:
    from art_mcp.agent.evaluate import Evaluation
    from art_mcp.local.backend import LocalBackend

RUNS = Path("runs")


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


def find_run(text: str) -> Run:
    """The run that a path, or a name under runs/, stands for."""
    return open_run(Path(text) if Path(text).exists() else RUNS / text)


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
