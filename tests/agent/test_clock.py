"""A rollout's time: when it stands still, and what is left of it afterwards."""

import math

import anyio
import pytest

from art_mcp.agent.clock import Clock
from art_mcp.errors import EngineError

pytestmark = pytest.mark.anyio


async def test_it_stands_still_until_all_that_wait_have_an_engine_and_nothing_of_it_is_lost():
    doors = [anyio.Event(), anyio.Event()]
    waiting = iter(doors)
    clock = Clock(60.0, lambda: next(waiting).wait())
    end = clock.limit.deadline
    async with anyio.create_task_group() as tasks:
        for _ in doors:
            tasks.start_soon(clock.ready)
        await anyio.wait_all_tasks_blocked()
        for door in doors:
            seconds, now = clock.seconds, anyio.current_time()
            await anyio.wait_all_tasks_blocked()
            assert anyio.current_time() > now
            assert clock.seconds == seconds
            assert clock.limit.deadline == math.inf
            door.set()
            await anyio.wait_all_tasks_blocked()
    assert end < clock.limit.deadline < math.inf
    assert clock.seconds < anyio.current_time() - (end - 60.0)


async def test_it_runs_on_after_a_failure_and_after_a_wait_that_was_given_up():
    async def dead():
        raise EngineError("no engine")

    failing, waiting = Clock(60.0, dead), Clock(60.0, anyio.sleep_forever)
    with pytest.raises(EngineError, match="no engine") as raised:
        await failing.ready()
    with anyio.move_on_after(0):
        await waiting.ready()
    assert failing.limit.deadline < math.inf
    assert waiting.limit.deadline < math.inf
    assert (failing.failure, waiting.failure) == (raised.value, None)


async def test_what_is_over_is_not_begun_anew_by_an_engine_that_comes():
    clock = Clock(-1.0, anyio.lowlevel.checkpoint)
    with clock.limit:
        await clock.ready()
        await anyio.sleep_forever()
    assert clock.limit.cancelled_caught
