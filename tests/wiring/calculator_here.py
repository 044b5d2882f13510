"""The calculator with its server in this process, so that a run needs no other."""

from dataclasses import replace
from pathlib import Path

from art_mcp.environment import load_environment

ROOT = Path(__file__).parents[2]

environment = replace(
    load_environment(str(ROOT / "environments" / "calculator.py")), servers=[f"{ROOT}/servers/calculator/server.py:server"]
)
