"""The supervised loop: its rates, its cursor, its stops."""

import asyncio
from itertools import chain
from time import monotonic

import anyio
import pytest

from art_mcp.agent.imitation import Lessons, imitation_loop
from art_mcp.core.samples import demonstration
from art_mcp.types import TrainConfig
from tests.agent.players import Obedient, Playhouse, obedient

pytestmark = pytest.mark.anyio

SAMPLES = [demonstration([((1,), False), ((number,), True)]) for number in range(10)]


def test_the_rate_rises_then_falls_to_nothing_or_stays():
    rates = [Lessons().rate(step, 100, highest=1.0) for step in range(100)]
    assert rates[0] < rates[1] < rates[2]
    assert max(rates) > 0.99
    assert sorted(rates[3:], reverse=True) == rates[3:]
    assert 0 < rates[-1] < 0.001
    constant = [Lessons(schedule="constant").rate(step, 100, highest=2.0) for step in range(100)]
    assert constant[3:] == [2.0] * 97
    assert Lessons().rate(0, 1, highest=1.0) == 1.0


def test_the_number_of_steps_is_the_one_asked_for_or_that_of_the_epochs():
    assert Lessons(batch=4).steps_for(10) == 2
    assert Lessons(batch=4, epochs=2.0).steps_for(10) == 5
    assert Lessons(batch=32).steps_for(3) == 1
    assert Lessons(steps=7).steps_for(10) == 7


class Pupil(Playhouse):
    """Remembers what was learned at which rate, and what was recorded and saved."""

    def __init__(self, step=0):
        super().__init__(Obedient, step=step)
        self.seen, self.rates, self.saved, self.lines = [], [], [], {}

    async def imitate(self, samples, config):
        await anyio.lowlevel.checkpoint()
        self.seen.append([sample.token_ids[1] for sample in samples])
        self.rates.append((config.learning_rate, config.warmup_steps, config.micro_batch_tokens))
        self.step += 1
        return {"loss": 0.5}

    def groups(self, step, groups):
        raise AssertionError("there are no rollouts")

    def metrics(self, step, values):
        self.lines[step] = values

    async def save(self, step):
        await anyio.lowlevel.checkpoint()
        self.saved.append(step)


async def learn(lessons, pupil=None, **options):
    pupil = pupil or Pupil()
    seconds = await imitation_loop(
        await obedient(pupil),
        SAMPLES,
        imitate=pupil.imitate,
        lessons=lessons,
        config=TrainConfig(micro_batch_tokens=99),
        highest_rate=1e-3,
        recorder=pupil,
        save=pupil.save,
        **options,
    )
    return pupil, seconds


async def test_every_demonstration_is_seen_once_an_epoch():
    pupil, seconds = await learn(Lessons(batch=5, epochs=2.0), save_every=3)
    assert len(pupil.seen) == 4
    epochs = [sorted(chain(*pupil.seen[start : start + 2])) for start in (0, 2)]
    assert epochs == [list(range(10))] * 2
    assert pupil.seen[:2] != pupil.seen[2:]
    assert pupil.rates == [(Lessons().rate(step, 4, highest=1e-3), 0, 99) for step in range(4)]
    assert pupil.saved == [3, 4]
    assert [line["learning_rate"] for line in pupil.lines.values()] == [rate for rate, *_ in pupil.rates]
    assert pupil.lines[3]["phase"] == "warm start"
    assert 0 <= pupil.lines[3]["seconds_total"] <= seconds


async def test_a_loop_that_goes_on_learns_what_would_have_come_next():
    whole, _ = await learn(Lessons(batch=3, steps=6), seed=1)
    rest, _ = await learn(Lessons(batch=3, steps=6), Pupil(step=4), seed=1)
    assert rest.seen == whole.seen[4:]
    assert rest.rates == whole.rates[4:]
    assert list(rest.lines) == [4, 5]
    began = monotonic()
    done, seconds = await learn(Lessons(batch=3, steps=6), Pupil(step=6), spent=8.0)
    assert (done.seen, done.saved) == ([], [])
    assert 8 <= seconds <= 8 + monotonic() - began


async def test_seconds_end_the_loop_with_a_checkpoint():
    pupil, _ = await learn(Lessons(steps=6, seconds=5.0), spent=5.0)
    assert (pupil.seen, pupil.saved) == ([], [0])


@pytest.mark.parametrize("native", [False, True])
async def test_a_step_that_has_begun_is_finished_and_recorded_before_a_cancelled_loop_ends(native):
    """Scopes cancel in one way, Ctrl-C (which cancels the task itself) in another."""

    class Stopped(Pupil):
        async def imitate(self, samples, config):
            if self.step == 1:
                loop_task.cancel() if native else scope.cancel()
                await anyio.sleep(0.05)
            return await super().imitate(samples, config)

    pupil, scope = Stopped(), anyio.CancelScope()

    async def work():
        with scope:
            await learn(Lessons(steps=6), pupil)

    loop_task = asyncio.create_task(work())
    await asyncio.wait([loop_task])
    assert loop_task.cancelled() is native
    assert list(pupil.lines) == [0, 1]
    assert pupil.saved == [2]
