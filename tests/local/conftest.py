"""Lets the tests of this folder import the toy models of tests/sampling."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "sampling"))
