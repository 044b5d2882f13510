"""`art-mcp doctor`: what this machine can run, and what a model can do on it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from art_mcp.cli import completion
from art_mcp.cli import options as o

if TYPE_CHECKING:
    from art_mcp.local.doctor import Finding
    from art_mcp.wiring.doctor import Visit

HELP = "Say what this machine can run; with a model, whether it can call tools and what memory it needs; and in an environment."
EXAMPLE = "Example: art-mcp doctor tiny calculator"
YELLOW, RED = "33", "31"
COLOURS = {"ok": o.GREEN, "warning": YELLOW, "problem": RED}

ModelOrNone = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="tiny, a model folder, a run, run@step, or a hub id.", autocompletion=completion.models
    ),
]
EnvironmentOrNone = Annotated[
    str | None,
    typer.Argument(
        metavar="ENV",
        help="A name under environments/, a path to a .py file, or module:attribute.",
        autocompletion=completion.environments,
    ),
]


def command(
    model: ModelOrNone = None,
    environment: EnvironmentOrNone = None,
    option: o.EnvironmentOptions = None,
    config: o.ConfigFile = "config.json",
    lora: Annotated[int | None, typer.Option("--lora", metavar="RANK", min=1, help="Reckon LoRA of this rank alone.")] = None,
    groups: Annotated[int, typer.Option("--groups", min=1, help="Scenarios in a step.")] = 16,
    rollouts: Annotated[int, typer.Option("--rollouts", min=1, help="Rollouts of each scenario.")] = 8,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=1, help="Tokens of a conversation (default: as the reference solutions).")
    ] = None,
    json: o.Json = False,
) -> None:
    import anyio

    from art_mcp.local.doctor import is_sick
    from art_mcp.wiring.doctor import Visit

    visit = Visit(model, environment, o.parse_options(option), config, lora, groups, rollouts, tokens)
    findings = anyio.run(examine, visit)
    if json:
        o.write_json({"findings": [finding.to_json() for finding in findings], "healthy": not is_sick(findings)})
    if is_sick(findings):
        raise typer.Exit(1)


async def examine(visit: Visit) -> list[Finding]:
    """All findings, each shown when it is made."""
    from art_mcp.wiring.doctor import examine as visited

    findings: list[Finding] = []
    async for finding in visited(visit, tell):
        show(finding)
        findings.append(finding)
    return findings


def tell(text: str) -> None:
    sys.stderr.write(f"{text} …\n")


def show(finding: Finding) -> None:
    """A line with the verdict; a counterexample, and what to do, are set in below it."""
    first, *rest = o.harmless(finding.text).splitlines() or [""]
    o.write(f"{o.coloured(f'{finding.level:<7}', COLOURS[finding.level])}  {finding.about}: {first}")
    remedy = [f"→ {o.harmless(finding.remedy)}"] if finding.remedy else []
    for line in [*(line.strip() for line in rest), *remedy]:
        o.write(f"{'':<9}{line}")
