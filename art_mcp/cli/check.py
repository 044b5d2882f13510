"""`art-mcp check`: whether an environment works and rewards what it means to."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from art_mcp.cli import options as o
from art_mcp.cli import rollout

HELP = "Open an environment's servers, show what the model would see, and prove that lazy policies do not score."
EXAMPLE = "Example: art-mcp check calculator"


def command(
    environment: o.EnvironmentName,
    option: o.EnvironmentOptions = None,
    model: o.ModelName = "tiny",
    config: o.ConfigFile = "config.json",
    split: o.Split = "train",
    n: Annotated[int, typer.Option("--n", min=1, help="How many scenarios each policy plays.")] = 20,
    lenient: o.Lenient = False,
    json: o.Json = False,
) -> None:
    import anyio

    from art_mcp.wiring.play import check
    from art_mcp.wiring.stage import Setting

    setting = Setting(environment, o.parse_options(option), model, None, config, lenient=lenient)
    opening, verdict, example = anyio.run(lambda: check(setting, split=split, n=n, stream=sys.stderr))
    show(opening, verdict)
    if example and verdict.example:
        o.write(o.harmless(f"\nexample: {verdict.example.words}"))
        rollout.show(example)
    if json:
        told = {"failures": verdict.failures, "unchecked": verdict.unchecked, "warnings": verdict.warnings}
        shown = {"example": example.to_json() if example else None}
        o.write_json({"rewards": verdict.rewards, "solved": verdict.solved, **told, **shown})
    if verdict.failures:
        raise typer.Exit(1)


def show(opening: str, verdict: Any) -> None:
    o.write(f"What the model sees:\n{opening}\n")
    width = max(map(len, verdict.rewards))
    for name, reward in verdict.rewards.items():
        o.write(f"{name:<{width}}  reward {reward:6.3f}  solved {verdict.solved[name]:.2f}")
    for warning in verdict.warnings:
        o.write(o.harmless(f"WARNING: {warning}"))
    for failure in verdict.failures:
        o.write(o.harmless(f"FAILED: {failure}"))
    for question in verdict.unchecked:
        o.write(f"not checked: {question}")
    if not verdict.failures and not verdict.unchecked:
        o.write("ok: the reference solution scores above every lazy policy")
