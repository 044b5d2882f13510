"""The calculator with its server in this process, so that a run needs no other."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from art_mcp.environment import load_environment

ROOT = Path(__file__).parents[2]
KEPT = "calculator_of_the_tests"

# tests load this file again and again, and the calculator takes half a second to draw its questions
if KEPT not in sys.modules:
    sys.modules[KEPT] = ModuleType(KEPT)
    sys.modules[KEPT].environment = load_environment(str(ROOT / "environments" / "calculator.py"))

environment = replace(sys.modules[KEPT].environment, servers=[f"{ROOT}/servers/calculator/server.py:server"])
