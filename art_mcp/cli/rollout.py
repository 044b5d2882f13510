"""`art-mcp rollout`: one conversation, readable, with what the policy wrote set apart from what the world did."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from art_mcp.cli import options as o

if TYPE_CHECKING:
    from art_mcp.wiring.play import Played

HELP = "Play one scenario and print the conversation: tool calls and results marked, the tokens that training sees coloured."
EXAMPLE = "Example: art-mcp rollout calculator --model runs/latest"

MOST_LINES, WIDTH = 20, 120
"""Of a turn that is shown to people."""


def command(
    context: typer.Context,
    environment: o.EnvironmentName,
    option: o.EnvironmentOptions = None,
    model: o.AnyModelName = "tiny",
    api_key: o.ApiKey = None,
    config: o.ConfigFile = "config.json",
    split: o.Split = "test",
    number: Annotated[int, typer.Option("--number", min=0, help="Which scenario of the split.")] = 0,
    temperature: Annotated[float, o.number("--temperature", min=0, help="0 is greedy.")] = 1.0,
    tokens: Annotated[bool, typer.Option("--tokens", help="Print the whole token stream as text.")] = False,
    seed: o.Seed = 0,
    lenient: o.Lenient = False,
    engine: o.Engine = None,
    engine_python: o.EnginePython = None,
    engine_arg: o.EngineArgs = None,
    engine_replicas: o.EngineReplicas = 1,
    weave: o.Weave = None,
    json: o.Json = False,
) -> None:
    import anyio

    from art_mcp.core.address import without_login
    from art_mcp.wiring.play import play_one

    setting = o.setting_of(context.params, trainer="torch")  # nothing is trained, and it is the quicker one to load

    async def run() -> Played:
        return await play_one(setting, split=split, number=number, temperature=temperature, stream=sys.stderr, api_key=api_key)

    played = anyio.run(run)
    if tokens and not played.parts:
        o.write(f"{without_login(model)} is an endpoint, whose tokens nobody sees; the conversation:")
    show(played, tokens=tokens)
    if json:
        o.write_json(played.to_json())


def show(played: Played, *, tokens: bool = False) -> None:
    """The conversation (its tokens, where they are asked for and there are any) and how it ended."""
    for author, text in (tokens and played.parts) or played.lines:
        o.write(marked(author, text if tokens else shortened(text)))
    parts = ", ".join(f"{name} {value + 0.0:g}" for name, value in played.rewards.items())  # + 0.0: no -0
    o.write(f"stopped: {played.stop_reason}, reward {played.reward:.3f} ({parts})")


def shortened(text: str) -> str:
    """A turn's first lines, a very long one counted as several, and how many more there are."""
    room, kept = MOST_LINES * WIDTH, text.split("\n")[:MOST_LINES]
    shown = "\n".join(kept)[:room]
    rest = text[len(shown) :].removeprefix("\n")
    if not rest:
        return text
    lines = rest.count("\n") + 1
    more = f"{lines} more lines" if lines > 1 else f"{len(rest)} more characters"
    return f"{shown}\n  … ({more}; --json has all)"


def marked(author: str, text: str) -> str:
    """What the policy wrote in green, results in cyan, on a terminal; with a mark before it everywhere."""
    marks = {"policy": "»", "tool": "«"}
    line = f"{marks.get(author, ' ')} {author}: {text}"
    colour = {"policy": o.GREEN, "tool": o.CYAN}.get(author)
    return o.coloured(line, colour) if colour else line
