"""Options that several commands share, and how a command's answer reaches the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from art_mcp.errors import ConfigError

EnvironmentName = Annotated[
    str, typer.Argument(metavar="ENV", help="A name under environments/, a path to a .py file, or module:attribute.")
]
EnvironmentOptions = Annotated[
    list[str] | None, typer.Option("--option", "-o", metavar="KEY=VALUE", help="An option of the environment; repeatable.")
]
ModelName = Annotated[
    str, typer.Option("--model", "-m", help="tiny, a model folder, a run, run@step, or a hub id.", show_default=True)
]
ConfigFile = Annotated[str, typer.Option("--config", help="The mcpServers file.")]
Seed = Annotated[int, typer.Option("--seed", help="Decides every draw.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Lenient = Annotated[bool, typer.Option("--lenient", help="Also read tool calls written as bare or fenced JSON.")]
Deterministic = Annotated[bool, typer.Option("--deterministic", help="Same seed, same trajectories to the last bit; slower.")]


def parse_options(pairs: Sequence[str] | None) -> dict[str, str]:
    """`KEY=VALUE` pairs as a mapping. Raises ConfigError for anything else."""
    values: dict[str, str] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--option wants KEY=VALUE, such as levels=1-5, not {pair!r}")
        values[key] = value
    return values


def write(text: str) -> None:
    """A line for people or programs on stdout."""
    sys.stdout.write(text + "\n")


def write_json(value: Any) -> None:
    write(json.dumps(value))
