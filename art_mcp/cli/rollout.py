"""`art-mcp rollout`: one conversation, readable, with what the policy wrote set apart from what the world did."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from art_mcp.cli import options as o

HELP = "Play one scenario and print the conversation: tool calls and results marked, the tokens that training sees coloured."
EXAMPLE = "Example: art-mcp rollout calculator --model runs/latest"
POLICY, RESULT, PLAIN = "\x1b[32m", "\x1b[36m", "\x1b[0m"


def command(
    environment: o.EnvironmentName,
    option: o.EnvironmentOptions = None,
    model: o.ModelName = "tiny",
    config: o.ConfigFile = "config.json",
    split: Annotated[str, typer.Option("--split", help="Which scenarios.")] = "test",
    number: Annotated[int, typer.Option("--number", min=0, help="Which scenario of the split.")] = 0,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 is greedy.")] = 1.0,
    tokens: Annotated[bool, typer.Option("--tokens", help="Print the whole token stream as text.")] = False,
    seed: o.Seed = 0,
    lenient: o.Lenient = False,
    json: o.Json = False,
) -> None:
    import anyio

    from art_mcp.wiring.play import play_one
    from art_mcp.wiring.stage import Setting

    setting = Setting(environment, o.parse_options(option), model, None, config, seed, lenient=lenient)
    played = anyio.run(lambda: play_one(setting, split=split, number=number, temperature=temperature))
    for author, text in played.parts if tokens else played.lines:
        o.write(coloured(author, text))
    parts = ", ".join(f"{name} {value + 0.0:g}" for name, value in played.rewards.items())  # + 0.0: no -0
    o.write(f"stopped: {played.stop_reason}, reward {played.reward:.3f} ({parts})")
    if json:
        o.write_json(played.to_json())


def coloured(author: str, text: str) -> str:
    """What the policy wrote in green, results in cyan, on a terminal; with a mark before it everywhere."""
    marks = {"policy": "»", "tool": "«"}
    line = f"{marks.get(author, ' ')} {author}: {text}"
    colour = {"policy": POLICY, "tool": RESULT}.get(author)
    return f"{colour}{line}{PLAIN}" if colour and sys.stdout.isatty() and not os.environ.get("NO_COLOR") else line
