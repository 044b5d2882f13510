"""`art-mcp sft`: a short supervised start on demonstrations, from which reinforcement learning goes on."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import typer

from art_mcp.cli import options as o
from art_mcp.cli.train import show

HELP = "Teach a model by demonstrations: an environment's own solutions, the model's own successes, or conversations in a file."
EXAMPLE = (
    "Example: art-mcp sft calculator --demonstrations 500 --name start; "
    "with rewards it goes on by: art-mcp train --resume start --steps 200"
)

Demonstrations = Annotated[int, typer.Option("--demonstrations", "-d", min=1, metavar="N", help="How many there are at most.")]
Source = Annotated[
    str,
    typer.Option(
        "--from",
        metavar="SOURCE",
        help="solutions (the environment's), successes (the model's own rollouts that solved their scenario, calls read "
        "leniently), or a JSONL file of conversations: messages with tool_calls, and tools where they are others.",
    ),
]
LearningRate = Annotated[float | None, o.number("--lr", min=0, help="Default: 2e-4 (LoRA), 1e-3 (tiny), else 2e-5.")]
Schedule = Annotated[Literal["cosine", "constant"], typer.Option("--schedule", help="How the learning rate goes on.")]


def command(
    context: typer.Context,
    environment: o.EnvironmentName,
    option: o.EnvironmentOptions = None,
    model: o.ModelName = "tiny",
    config: o.ConfigFile = "config.json",
    name: o.RunName = None,
    demonstrations: Demonstrations = 1000,
    source: Source = "solutions",
    epochs: Annotated[float, o.number("--epochs", min=0, help="How often each one is seen.")] = 1.0,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Batches in all (in place of --epochs).")] = None,
    seconds: Annotated[float | None, o.number("--seconds", min=0, help="The longest that training takes.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Demonstrations in a step.")] = 32,
    learning_rate: LearningRate = None,
    schedule: Schedule = "cosine",
    lora: o.Lora = None,
    prepare: o.Prepare = False,
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
    wandb: o.Wandb = None,
    json: o.Json = False,
) -> None:
    import anyio

    from art_mcp.agent.imitation import Lessons
    from art_mcp.agent.loop import Plan
    from art_mcp.types import TrainConfig
    from art_mcp.wiring import training

    setting = o.setting_of(context.params, lenient=lenient or source == "successes")
    lessons = Lessons(demonstrations, source, epochs, steps, seconds, batch, learning_rate, schedule)
    plan = Plan(steps=0, save_every=save_every, seed=seed)
    asked = training.Training(
        setting, plan, TrainConfig(seed=seed), eval_n, keep=keep, warm_start=lessons, prepare=prepare, wandb=wandb
    )
    report = anyio.run(lambda: training.train(asked, name=name, stream=sys.stderr))
    show(report, json=json)
    sys.stderr.write(f"to go on by reward: art-mcp train --resume {report['run']} --steps 100\n")
