"""`art-mcp`: its commands and how they fail. Each command is a file of its own; nothing heavy is imported before one runs."""

from __future__ import annotations

import os
import sys

import typer

from art_mcp.cli import check, evaluate, rollout, train
from art_mcp.errors import ArtMcpError

app = typer.Typer(
    name="art-mcp",
    help="Train small open models to use your MCP servers: rollouts, rewards and reinforcement learning on your own machine.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command("train", help=train.HELP, epilog=train.EXAMPLE)(train.command)
app.command("rollout", help=rollout.HELP, epilog=rollout.EXAMPLE)(rollout.command)
app.command("eval", help=evaluate.HELP, epilog=evaluate.EXAMPLE)(evaluate.command)
app.command("check", help=check.HELP, epilog=check.EXAMPLE)(check.command)

FAILED = 2


def main() -> None:
    """Runs the command line: an error of ours is one line on stderr and exit code 2; Ctrl-C ends with 130, as typer has it."""
    # read when the hub's client is imported; a command's progress is its own line
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except ArtMcpError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(FAILED)
