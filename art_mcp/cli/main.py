"""`art-mcp`: its commands and how they fail. Each command is a file of its own; nothing heavy is imported before one runs."""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated

import typer

from art_mcp.cli import call, check, evaluate, export, inspector, prepare, rollout, serve, sft, tools, train
from art_mcp.cli import options as o
from art_mcp.errors import ArtMcpError, describe

app = typer.Typer(
    name="art-mcp",
    help="Train small open models to use your MCP servers: rollouts, rewards and reinforcement learning on your own machine.",
    epilog="Every command has an example: art-mcp COMMAND --help",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command("train", help=train.HELP, epilog=train.EXAMPLE)(train.command)
app.command("sft", help=sft.HELP, epilog=sft.EXAMPLE)(sft.command)
app.command("rollout", help=rollout.HELP, epilog=rollout.EXAMPLE)(rollout.command)
app.command("eval", help=evaluate.HELP, epilog=evaluate.EXAMPLE)(evaluate.command)
app.command("check", help=check.HELP, epilog=check.EXAMPLE)(check.command)
app.command("prepare", help=prepare.HELP, epilog=prepare.EXAMPLE)(prepare.command)
app.command("export", help=export.HELP, epilog=export.EXAMPLE)(export.command)
app.command("serve", help=serve.HELP, epilog=serve.EXAMPLE)(serve.command)
app.command("tools", help=tools.HELP, epilog=tools.EXAMPLE)(tools.command)
app.command("call", help=call.HELP, epilog=call.EXAMPLE)(call.command)
app.command("inspect", help=inspector.HELP, epilog=inspector.EXAMPLE)(inspector.command)


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """What `art-mcp` does without a command."""
    if version:
        from importlib.metadata import version as version_of

        o.write(f"art-mcp {version_of('art-mcp')}")
        raise typer.Exit


def main() -> None:
    """Runs the command line: an error of ours is one line on stderr and exit code 2; Ctrl-C ends with 130, as typer has it."""
    # read when the hub's client is imported; a command's progress is its own line
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app(prog_name="art-mcp")
    except ArtMcpError as error:
        o.complain(str(error))
        sys.exit(o.FAILED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # a full disk is no bug, whoever meets it
            raise
        o.complain(f"{describe(error)}: make room there, or write elsewhere")
        o.drop_stdout()
        sys.exit(o.FAILED)
