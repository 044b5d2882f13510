"""`art-mcp train`: a training run from before to after, or on from where one stopped."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from art_mcp.cli import completion
from art_mcp.cli import options as o
from art_mcp.errors import ConfigError

if TYPE_CHECKING:
    from art_mcp.wiring.training import Training

HELP = "Train a model on an environment by reinforcement learning and show what it gained on held-out scenarios."
EXAMPLE = "Example: art-mcp train calculator --seconds 170"
DEFAULT_STEPS = 200

EnvironmentOrNone = Annotated[
    str | None,
    typer.Argument(metavar="ENV", help="The environment (not needed with --resume).", autocompletion=completion.environments),
]
RunOrNone = Annotated[
    str | None,
    typer.Option("--resume", metavar="RUN", help="Go on with this run.", autocompletion=completion.runs),
]
LearningRate = Annotated[
    float | None,
    o.number("--lr", min=0, help="Default: 1e-4 (LoRA), 3e-4 (under 10 M parameters), else 1e-5."),
]
TargetKl = Annotated[
    float, o.number("--target-kl", min=0, help="How far a step may move the policy, in nats a token; 0: any distance.")
]
MinAgreement = Annotated[
    float,
    o.number("--min-agreement", min=0, help="Shorten steps while the last gradients agree less than by this t; 0: never."),
]
Temperature = Annotated[
    float, o.number("--temperature", min=0.01, help="Of the rollouts; 1.2 explores more where groups are mostly ties.")
]
Control = Annotated[
    Literal["none", "shuffled"],
    typer.Option("--control", help="shuffled: deal the rewards out anew, so nothing is learned."),
]
WarmStart = Annotated[
    int | None,
    typer.Option("--warm-start", min=1, metavar="N", help="First learn from so many demonstrations (see art-mcp sft)."),
]
WarmEpochs = Annotated[float, o.number("--warm-epochs", min=0, help="How often --warm-start sees each demonstration.")]
Curriculum = Annotated[
    bool, typer.Option("--curriculum", help="Draw scenarios that are neither always nor never solved, as measured so far.")
]
Concurrency = Annotated[int, typer.Option("--concurrency", min=1, help="Rollouts at once; with --overlap best half a step's.")]
Overlap = Annotated[
    int,
    typer.Option(
        "--overlap",
        min=0,
        metavar="N",
        help="Play N steps ahead while this one's last rollouts are played and it is trained (off-policy by at most N steps).",
    ),
]


def command(
    context: typer.Context,
    environment: EnvironmentOrNone = None,
    option: o.EnvironmentOptions = None,
    model: o.ModelName = "tiny",
    config: o.ConfigFile = "config.json",
    name: o.RunName = None,
    resume: RunOrNone = None,
    steps: Annotated[int | None, typer.Option("--steps", min=0, help="Steps by reward in all, sft's apart.")] = None,
    seconds: Annotated[float | None, o.number("--seconds", min=0, help="Time in all, sft's too, evaluation apart.")] = None,
    groups: Annotated[int, typer.Option("--groups", min=1, help="Scenarios in a step.")] = 16,
    rollouts: Annotated[int, typer.Option("--rollouts", min=2, help="Rollouts of each scenario.")] = 8,
    learning_rate: LearningRate = None,
    target_kl: TargetKl = 5e-4,
    min_agreement: MinAgreement = 3.0,
    temperature: Temperature = 1.0,
    lora: o.Lora = None,
    warm_start: WarmStart = None,
    warm_epochs: WarmEpochs = 1.0,
    curriculum: Curriculum = False,
    overlap: Overlap = 0,
    concurrency: Concurrency = 128,
    prepare: o.Prepare = False,
    control: Control = "none",
    eval_n: o.EvalN = 1000,
    save_every: o.SaveEvery = 50,
    keep: o.Keep = 3,
    seed: o.Seed = 0,
    deterministic: o.Deterministic = False,
    in_process: o.InProcess = None,
    lenient: o.Lenient = False,
    engine: o.Engine = None,
    engine_python: o.EnginePython = None,
    engine_arg: o.EngineArgs = None,
    engine_replicas: o.EngineReplicas = 1,
    tool_processes: o.ToolProcesses = 0,
    trainer: o.Trainer = None,
    weave: o.Weave = None,
    wandb: o.Wandb = None,
    json: o.Json = False,
) -> None:
    import anyio

    show(anyio.run(carry_out, context), json=json)


async def carry_out(context: typer.Context) -> dict[str, Any]:
    """The new run that a command line asks for, or the old one gone on with; returns its report."""
    from art_mcp.wiring import training

    given = context.params
    limits = {key: given[key] for key in ("steps", "seconds") if given[key] is not None}
    if given["resume"] is not None:
        refuse_others(context)
        return await training.resume(given["resume"], plan=limits, stream=sys.stderr)
    return await training.train(asked_for(given, limits), name=given["name"], stream=sys.stderr)


def asked_for(given: Mapping[str, Any], limits: Mapping[str, Any]) -> Training:
    """The run that a command line asks for, with `limits` of the plan, where there are any. Raises ConfigError without an
    environment, and for epochs of no demonstrations."""
    from art_mcp.agent.imitation import Lessons
    from art_mcp.agent.loop import Plan
    from art_mcp.types import TrainConfig
    from art_mcp.wiring.training import Training

    if given["environment"] is None:
        raise ConfigError("name an environment (such as calculator), or --resume RUN")
    shape = {name: given[name] for name in ("groups", "rollouts", "concurrency", "save_every", "seed", "overlap")}
    plan = Plan(**shape, **(limits or {"steps": DEFAULT_STEPS}), draw="solved" if given["curriculum"] else "uniform")
    objective = {name: given[name] for name in ("learning_rate", "temperature", "control", "seed")}
    bounds: dict[str, Any] = {name: given[name] or None for name in ("target_kl", "min_agreement")}
    config = TrainConfig(**objective, **bounds)
    epochs: float = given["warm_epochs"]
    if epochs != 1.0 and not given["warm_start"]:
        raise ConfigError(f"--warm-epochs {epochs:g} is how often demonstrations are seen: name --warm-start N too")
    lessons = Lessons(given["warm_start"], epochs=epochs) if given["warm_start"] else None
    more = {name: given[name] for name in ("eval_n", "keep", "prepare", "wandb")}
    return Training(o.setting_of(given), plan, config, **more, warm_start=lessons)


def refuse_others(context: typer.Context) -> None:
    """Raises ConfigError for a value that a resumed run would not heed: it has its own in the manifest."""
    heeded = ("resume", "steps", "seconds", "json")
    options = {param.name or "": param.opts[0] for param in context.command.params if param.name not in heeded}
    sources = {option: context.get_parameter_source(name) for name, option in options.items()}
    others = [option for option, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if others:
        raise ConfigError(f"--resume goes on with the run's own settings: leave out {', '.join(others)}")


def show(report: dict[str, Any], *, json: bool) -> None:
    """The report for people: solved before, after the warm start where rewards followed one, and after, by level, with 95 %
    intervals; and for programs, where they want it."""
    steps = "1 step" if report["steps"] == 1 else f"{report['steps']} steps"
    o.write(f"{report['run']}: {steps} in {report['train_seconds']:.0f} s")
    warm: dict[str, Any] = report.get("warm_start", {})
    rewarded = bool(warm) and report["steps"] > warm["steps"]
    columns = ": before -> after the warm start -> after training" if rewarded else ""
    for decoding, after in report["after"].items():
        taught = [warm.get("after", {}).get(decoding)] if rewarded else []
        measured = [report["before"].get(decoding), *taught, after]
        o.write(f"solved on held-out scenarios, {decoding}, 95 % interval{columns}")
        for level in ("all", *after["by_level"]):
            figures = [one if one is None or level == "all" else one["by_level"].get(level) for one in measured]
            o.write(f"  level {level:>3}  n={(figures[-1] or after)['n']:<5} {' -> '.join(map(share, figures))}")
    if json:
        o.write_json(report)


def share(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return "-"
    low, high = figures["ci95"]
    return f"{figures['solved']:.3f} [{low:.3f}, {high:.3f}]"
