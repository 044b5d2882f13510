"""`art-mcp eval`: how good a model is on a split of an environment."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from art_mcp.cli import options as o

HELP = "Measure how many scenarios of a split a model solves, overall and by level, with 95 % intervals."
EXAMPLE = "Example: art-mcp eval calculator --model runs/latest --split test --json"


def command(
    context: typer.Context,
    environment: o.EnvironmentName,
    option: o.EnvironmentOptions = None,
    model: o.ModelName = "tiny",
    config: o.ConfigFile = "config.json",
    split: o.Split = "test",
    n: Annotated[int, typer.Option("--n", min=1, help="How many, balanced over levels.")] = 1000,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 is greedy.")] = 0.0,
    seed: o.Seed = 0,
    deterministic: o.Deterministic = False,
    lenient: o.Lenient = False,
    engine: o.Engine = None,
    engine_python: o.EnginePython = None,
    engine_arg: o.EngineArgs = None,
    engine_replicas: o.EngineReplicas = 1,
    json: o.Json = False,
) -> None:
    import anyio

    from art_mcp.agent.evaluate import Evaluation
    from art_mcp.wiring.stage import evaluate_stage, open_stage

    setting = o.setting_of(context.params, trainer="torch")  # nothing is trained, and it is the quicker one to load

    async def run() -> Evaluation:
        async with open_stage(setting, splits=(split,)) as stage:
            return await evaluate_stage(stage, split=split, n=n, temperature=temperature, seed=seed, stream=sys.stderr)

    result = anyio.run(run)
    o.write(f"{environment} {split}, model {model}, temperature {temperature:g}, n={result.n}, failed={result.failed}")
    o.write(f"  solved {result.solved:.3f} [{result.ci95[0]:.3f}, {result.ci95[1]:.3f}]  reward {result.reward:.3f}")
    for level, figures in result.by_level.items():
        low, high = figures.ci95
        o.write(f"  level {level}  n={figures.n:<5} solved {figures.solved:.3f} [{low:.3f}, {high:.3f}]")
    o.write(f"  malformed calls {result.malformed_rate:.3f}, tool errors {result.tool_error_rate:.3f}")
    o.write(f"  turns {result.turns_mean:.2f}")
    if json:
        o.write_json(result.to_json())
