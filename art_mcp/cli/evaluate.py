"""`art-mcp eval`: how good a model is on a split of an environment."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from art_mcp.cli import options as o

if TYPE_CHECKING:
    from art_mcp.agent.evaluate import Evaluation
    from art_mcp.types import Usage

HELP = "Measure how many scenarios of a split a model solves, overall and by level, with 95 % intervals."
EXAMPLE = "Example: art-mcp eval calculator --model runs/latest --split test --json"


PRICED = "tokens that an endpoint read"
Concurrency = Annotated[
    int | None, typer.Option("--concurrency", min=1, help="Rollouts at once (default: 128; with an endpoint 16).")
]


def command(
    context: typer.Context,
    environment: o.EnvironmentName,
    option: o.EnvironmentOptions = None,
    model: o.AnyModelName = "tiny",
    api_key: o.ApiKey = None,
    config: o.ConfigFile = "config.json",
    split: o.Split = "test",
    n: Annotated[int, typer.Option("--n", min=1, help="How many, balanced over levels.")] = 1000,
    temperature: Annotated[float, o.number("--temperature", min=0, help="0 is greedy.")] = 0.0,
    seed: o.Seed = 0,
    deterministic: o.Deterministic = False,
    lenient: o.Lenient = False,
    engine: o.Engine = None,
    engine_python: o.EnginePython = None,
    engine_arg: o.EngineArgs = None,
    engine_replicas: o.EngineReplicas = 1,
    tool_processes: o.ToolProcesses = 0,
    concurrency: Concurrency = None,
    price_in: Annotated[float | None, o.number("--price-in", min=0, help=f"What a million {PRICED} costs.")] = None,
    price_out: Annotated[float | None, o.number("--price-out", min=0, help="And a million that it wrote.")] = None,
    weave: o.Weave = None,
    json: o.Json = False,
) -> None:
    import anyio

    from art_mcp.core.address import without_login
    from art_mcp.wiring.stage import evaluate_stage, is_endpoint, note_unseen_tools, open_scene

    setting = o.setting_of(context.params, trainer="torch")  # nothing is trained, and it is the quicker one to load
    at_once = concurrency or (16 if is_endpoint(model) else 128)

    async def run() -> Evaluation:
        async with open_scene(setting, splits=(split,), api_key=api_key, stream=sys.stderr) as scene:
            note_unseen_tools(scene, stream=sys.stderr)
            return await evaluate_stage(
                scene, split=split, n=n, temperature=temperature, seed=seed, stream=sys.stderr, concurrency=at_once
            )

    result = anyio.run(run)
    shown = without_login(model)
    o.write(f"{environment} {split}, model {shown}, temperature {temperature:g}, n={result.n}, failed={result.failed}")
    show(result)
    cost = cost_of(result.usage, price_in, price_out) if result.usage else None
    if result.usage:
        cached = f" ({result.usage.cached_tokens} cached)" if result.usage.cached_tokens else ""
        priced = "" if cost is None else f", cost {cost:.4f}"
        o.write(f"  tokens in {result.usage.prompt_tokens}{cached}, out {result.usage.completion_tokens}{priced}")
    if json:
        o.write_json(result.to_json() | ({} if cost is None else {"cost": cost}))


def show(result: Evaluation) -> None:
    """The figures of all, of each level, and of the calls."""
    o.write(f"  solved {result.solved:.3f} [{result.ci95[0]:.3f}, {result.ci95[1]:.3f}]  reward {result.reward:.3f}")
    for level, figures in result.by_level.items():
        low, high = figures.ci95
        o.write(f"  level {level}  n={figures.n:<5} solved {figures.solved:.3f} [{low:.3f}, {high:.3f}]")
    o.write(f"  malformed calls {result.malformed_rate:.3f}, tool errors {result.tool_error_rate:.3f}")
    o.write(f"  turns {result.turns_mean:.2f}")


def cost_of(usage: Usage, price_in: float | None, price_out: float | None) -> float | None:
    """By prices for a million tokens, where they are given, else what the endpoint says; None where nobody does."""
    if price_in is None and price_out is None:
        return usage.cost
    return (usage.prompt_tokens * (price_in or 0.0) + usage.completion_tokens * (price_out or 0.0)) / 1e6
