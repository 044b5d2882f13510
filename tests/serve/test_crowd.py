"""Many clients at once, some of which hang up: their sampling ends, the others finish, and nothing is left."""

import asyncio

import anyio
import pytest
from openai import InternalServerError

from art_mcp import LocalBackend, TrainableModel
from tests.serve.guests import USER, Slow, opened, voice_of

pytestmark = pytest.mark.anyio

CROWD = 64


async def say(client, number, *, stream=True):
    """What the policy says, as it comes."""
    options = {"model": "slow", "messages": [USER], "seed": number}
    if not stream:
        return (await client.chat.completions.create(**options)).choices[0].message.content
    chunks = await client.chat.completions.create(stream=True, **options)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])


@pytest.mark.parametrize("stream", [True, False])
async def test_clients_that_hang_up_end_their_sampling_and_the_others_finish(stream):
    slow = Slow(waits_for=CROWD, calls_off=CROWD // 2)
    before = asyncio.all_tasks()
    async with opened(voice_of(slow)) as (client, endpoint):
        asking = [asyncio.create_task(say(client, number, stream=stream)) for number in range(CROWD)]
        await slow.full.wait()
        assert endpoint.desk.in_flight == CROWD
        for task in asking[::2]:
            task.cancel()
        await slow.freed.wait()
        assert slow.waiting == CROWD // 2
        slow.go.set()
        said = await asyncio.gather(*asking, return_exceptions=True)
        assert said[1::2] == [str(number) for number in range(1, CROWD, 2)]
        assert all(isinstance(one, asyncio.CancelledError) for one in said[::2])
        assert (slow.waiting, slow.called_off, endpoint.desk.in_flight) == (0, CROWD // 2, 0)
        assert len(endpoint.desk.voice("slow").conversations) == CROWD // 2
        assert await say(client, 99) == "99"
    assert asyncio.all_tasks() == before


async def test_an_endpoint_that_closes_tells_those_who_wait():
    slow = Slow(waits_for=2, calls_off=2)
    async with opened(voice_of(slow)) as (client, endpoint):
        asking = [asyncio.create_task(say(client, number)) for number in range(2)]
        await slow.full.wait()
        await endpoint.close()
        said = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(one) for one in said] == [InternalServerError] * 2
    assert all("closing" in str(one) for one in said)
    assert slow.called_off == 2


async def test_the_engine_of_a_real_policy_is_free_again_when_half_of_its_clients_have_gone():
    model = TrainableModel(name="slow")
    async with LocalBackend(in_process=True, threads=1) as backend:
        await model.register(backend)
        async with model.openai_client().with_options(max_retries=0) as client:

            async def leave():
                await client.chat.completions.create(model="slow", messages=[USER], max_tokens=3000, n=2, stream=True)

            leaving = [asyncio.create_task(leave()) for _ in range(CROWD // 2)]

            async def stay(number):
                options = {"model": "slow", "messages": [USER], "seed": number, "max_tokens": 64}
                chunks = await client.chat.completions.create(stream=True, **options)
                reasons = [chunk.choices[0].finish_reason async for chunk in chunks]
                for task in leaving:
                    task.cancel()
                return reasons[-1]

            reasons = await asyncio.gather(*map(stay, range(CROWD // 2)))
            await asyncio.gather(*leaving, return_exceptions=True)
        assert len(reasons) == CROWD // 2
        assert set(reasons) <= {"stop", "length", "tool_calls"}
        # the engine's exclusive work waits for all that is sampled; a turn of 3,000 tokens that nobody wants would be among it
        with anyio.fail_after(30):
            await model.backend.reset_optimizer(model)
