"""An agent on the `openai` package, written the usual way, learns from what was recorded of it."""

import math
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.open_door import run

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 12
"""About what a quiet machine of two cores does in a minute; a slow one needs longer, and learns as much."""


async def test_an_agent_that_knows_nothing_of_this_package_solves_more_held_out_questions_afterwards(monkeypatch):
    monkeypatch.chdir(ROOT)
    result = await run(Namespace(seconds=math.inf, steps=STEPS, n=300, seed=0))
    assert result["failed_rollouts"] == 0
    assert result["trajectories"] == result["rollouts"]
    assert result["mcnemar"]["gained"] > result["mcnemar"]["lost"]
    assert result["mcnemar"]["p"] < 0.01
