"""What the shell offers after Tab: names that lie in this folder. Quick, and silent where there is nothing to read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import typer

from art_mcp.errors import ConfigError

ENVIRONMENTS, RUNS, CONFIG = Path("environments"), Path("runs"), "config.json"


def environments(incomplete: str) -> list[str]:
    """The files of environments/."""
    return starting(incomplete, [path.stem for path in ENVIRONMENTS.glob("[!_]*.py")])


def runs(incomplete: str) -> list[str]:
    """The runs of runs/, latest included."""
    return starting(incomplete, [path.parent.name for path in RUNS.glob("*/manifest.json")])


def models(incomplete: str) -> list[str]:
    """The packaged model and the runs; folders and hub ids are left to the shell."""
    return [*starting(incomplete, ["tiny"]), *runs(incomplete)]


def servers(context: typer.Context, incomplete: str) -> list[str]:
    """The names in the config file."""
    from art_mcp.tools.config import load_config

    try:
        known = load_config(context.params.get("config") or CONFIG)
    except ConfigError:  # the command will say so; here it would garble the line that is being typed
        return []
    return starting(incomplete, known)


def starting(incomplete: str, names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.startswith(incomplete))
