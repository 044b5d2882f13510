"""The engine through its door: tokens in, tokens and log probabilities out, whoever else is there."""

import asyncio
import random
import threading
from collections import Counter

import anyio
import pytest
import torch
from toys import (
    CONTEXT,
    FALLBACK,
    VOCABULARY,
    Watched,
    draw_tokens,
    log_probs_of,
    make_model,
    open_engine,
    shared_decoder,
    shared_model,
)

from art_mcp.errors import EngineError
from art_mcp.local.torch_trainer import TorchTrainer
from art_mcp.sampling.decoder import make_decoder
from art_mcp.sampling.transformers_engine import PREFIXES
from art_mcp.types import Sample, SamplingParams

pytestmark = pytest.mark.anyio

STOP = frozenset(range(12))
OPENINGS = [draw_tokens(count, seed=("opening", count)) for count in (3, 11, 20)]


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def engine():
    opened = open_engine()
    yield opened
    opened.close()


async def talk(engine, number, *, turns=3):
    """A conversation of a few turns, all of it decided by `number`; the turns' prompts, parameters and completions."""
    chance = random.Random(number)
    opening = OPENINGS[number % 3]
    tokens = opening + draw_tokens(chance.randrange(1, 25), seed=number // 4)
    said = []
    for turn in range(turns):
        temperature = chance.choice((0.0, 0.7, 1.0, 1.6))
        params = SamplingParams(chance.randrange(1, 25), temperature, seed=1000 * number + turn)
        completion = await engine.sample(tokens, params=params, stop=STOP, shared=len(opening))
        said.append((tokens, params, completion))
        tokens = [*tokens, *completion.span.token_ids, *draw_tokens(4, seed=(number, turn))]
    return said


async def talk_at_once(engine, numbers):
    talks = await asyncio.gather(*(talk(engine, number) for number in numbers))
    return [turn for said in talks for turn in said]


def check(turns, model=None):
    for tokens, params, completion in turns:
        span = completion.span
        wanted = log_probs_of(model or shared_model(), [*tokens, *span.token_ids], temperature=params.temperature or 1.0)
        got = torch.tensor(span.logprobs).double()
        torch.testing.assert_close(got, wanted[-len(span.token_ids) :], rtol=0, atol=1e-4)


def completions(turns):
    return [(completion.span.token_ids, completion.stopped) for _, _, completion in turns]


async def test_log_probabilities_are_the_models_own_whatever_else_is_sampled(engine):
    turns = await talk_at_once(engine, range(24))
    check(turns)
    for _, params, completion in turns:
        ids = completion.span.token_ids
        assert 1 <= len(ids) <= params.max_tokens
        assert completion.stopped == (ids[-1] in STOP)
        assert not STOP.intersection(ids[:-1])
        assert completion.stopped or len(ids) == params.max_tokens
    assert {completion.stopped for _, _, completion in turns} == {True, False}
    assert engine.sampled_tokens == sum(len(completion.span.token_ids) for _, _, completion in turns)


async def test_temperature_zero_takes_the_likeliest_token(engine):
    prompt = draw_tokens(10, seed=1)
    completion = await engine.sample(prompt, params=SamplingParams(12, 0.0, seed=5), stop=frozenset())
    tokens = list(prompt)
    for token in completion.span.token_ids:
        assert token == int(shared_model()(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
        tokens.append(token)


async def test_the_seed_alone_decides(engine):
    prompt = draw_tokens(10, seed=2)

    async def ids(seed):
        return (await engine.sample(prompt, params=SamplingParams(20, 1.0, seed), stop=frozenset())).span.token_ids

    first = await asyncio.gather(*(ids(seed) for seed in range(8)))
    assert len(set(first)) == 8
    assert await asyncio.gather(*(ids(seed) for seed in reversed(range(8)))) == first[::-1]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float64, 1e-9)])
async def test_other_precisions_go_all_the_way(dtype, tolerance):
    trainer = TorchTrainer(make_model().to(dtype))
    engine = open_engine(trainer.decoder, dtype=dtype)
    turns = await talk_at_once(engine, range(6))
    engine.close()
    for tokens, params, completion in turns:
        trainable = (False,) * len(tokens) + (True,) * len(completion.span.token_ids)
        sample = Sample((*tokens, *completion.span.token_ids), trainable, (0.0,) * len(trainable), 1.0)
        again = trainer.score([sample], prefix=0, temperature=params.temperature or 1.0).log_probs
        got = torch.tensor(completion.span.logprobs, dtype=torch.float64)
        assert float((got - again.detach().double()).abs().mean()) < tolerance


@pytest.mark.parametrize("temperature", [0.5, 1.0])
async def test_tokens_come_as_often_as_the_model_says(temperature):
    engine, count = open_engine(max_batch=1000), 4000
    prompt = draw_tokens(10, seed=3)
    params = [SamplingParams(1, temperature, seed) for seed in range(count)]
    drawn = await asyncio.gather(*(engine.sample(prompt, params=each, stop=frozenset()) for each in params))
    engine.close()
    seen = Counter(completion.span.token_ids[0] for completion in drawn)
    with torch.no_grad():
        logits = shared_model()(input_ids=torch.tensor([prompt])).logits[0, -1]
    expected = (torch.softmax(logits / temperature, dim=-1) * count).tolist()
    bins = [(seen[token], mean) for token, mean in enumerate(expected) if mean >= 5]
    rest = (count - sum(got for got, _ in bins), count - sum(mean for _, mean in bins))
    bins += [rest] if rest[1] >= 5 else []
    assert len(bins) > 10
    statistic = sum((got - mean) ** 2 / mean for got, mean in bins)
    freedom = len(bins) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5  # chi-square: mean and deviations


async def test_a_later_turn_computes_only_what_is_new():
    watched = Watched(shared_decoder())
    engine = open_engine(watched)
    (said,) = [await talk(engine, 4, turns=1)]
    tokens, _, completion = said[0]
    following = [*tokens, *completion.span.token_ids, 50, 51, 52]
    watched.tokens = 0
    params = SamplingParams(1, 1.0, seed=1)
    again = await engine.sample(following, params=params, stop=STOP, shared=len(OPENINGS[4 % 3]))
    engine.close()
    assert completion.stopped
    assert watched.tokens == 4  # the stop token, whose keys nobody needed before, and the three new ones
    check([(following, params, again)])


async def test_the_shared_beginning_is_computed_once():
    watched = Watched(shared_decoder())
    engine = open_engine(watched)
    prompt = draw_tokens(30, seed=4)
    await engine.sample([*prompt, 1], params=SamplingParams(1), stop=STOP, shared=30)
    before = watched.tokens
    await engine.sample([*prompt, 2], params=SamplingParams(1), stop=STOP, shared=30)
    engine.close()
    assert (before, watched.tokens - before) == (31, 1)


async def test_a_published_policy_forgets_what_the_old_weights_computed():
    model = make_model(seed=4)
    engine = open_engine(make_decoder(model))
    (said,) = [await talk(engine, 7, turns=2)]
    check(said, model)

    def train():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        engine.publish(1)

    await engine.exclusive(train)
    assert engine.policy.step == 1
    tokens, _, completion = said[-1]
    following = [*tokens, *completion.span.token_ids, 50]
    params = SamplingParams(8, 1.0, seed=1)
    again = await engine.sample(following, params=params, stop=STOP, shared=len(OPENINGS[4 % 3]))
    engine.close()
    check([(following, params, again)], model)
    assert (completion.span.policy_version, again.span.policy_version) == (0, 1)


@pytest.mark.parametrize("max_batch", [2, 128])
async def test_exclusive_work_waits_for_those_before_it_and_those_after_it_wait(max_batch):
    engine = open_engine(max_batch=max_batch)

    async def sample(seed):
        done = await engine.sample([1, 2, 3], params=SamplingParams(30, 1.0, seed), stop=frozenset())
        return done.span.policy_version

    async with asyncio.TaskGroup() as tasks:
        before = [tasks.create_task(sample(seed)) for seed in range(5)]
        tasks.create_task(engine.exclusive(lambda: engine.publish(1)))
        between = [tasks.create_task(sample(seed)) for seed in range(5)]
        tasks.create_task(engine.exclusive(lambda: engine.publish(2)))
        after = [tasks.create_task(sample(seed)) for seed in range(5)]
    engine.close()
    assert [task.result() for task in before + between + after] == [0] * 5 + [1] * 5 + [2] * 5


async def test_work_that_fails_tells_its_caller_and_the_engine_goes_on(engine):
    with pytest.raises(ZeroDivisionError):
        await engine.exclusive(lambda: 1 / 0)
    check(await talk(engine, 1))


def held_at(call):
    """An event of this loop, a listener that sets it when the decoder is called for the `call`-th time and stays in this call,
    and what lets it go on: whatever is done until then happens at this very moment, however quick the engine is."""
    loop, reached, go = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def heard(number):
        if number == call:
            loop.call_soon_threadsafe(reached.set)
            go.wait()

    return reached, heard, go


@pytest.mark.parametrize("call", [1, 2, 3, 7])
async def test_a_cancelled_request_frees_its_row_and_the_others_finish(call):
    started, heard, go = held_at(call)
    watched = Watched(shared_decoder(), heard)
    engine = open_engine(watched)
    params = SamplingParams(240, 1.0, seed=1)
    doomed = asyncio.create_task(engine.sample([1, 2, 3], params=params, stop=frozenset()))
    others = asyncio.create_task(talk_at_once(engine, range(6)))
    await started.wait()
    doomed.cancel()
    await asyncio.wait([doomed])
    go.set()
    check(await others)
    await engine.exclusive(lambda: None)  # never comes where a row is left behind
    engine.close()
    assert doomed.cancelled()
    assert watched.calls < 200


async def test_cancelling_at_any_moment_leaves_the_engine_whole():
    chance = random.Random(1)
    tasks = []

    async def call_off(task):
        task.cancel()

    def heard(number):
        if number % 2 == 0:
            asyncio.run_coroutine_threadsafe(call_off(chance.choice(tasks)), loop).result()

    loop = asyncio.get_running_loop()
    engine = open_engine(Watched(shared_decoder(), heard), max_batch=16)
    tasks += [asyncio.create_task(talk(engine, number)) for number in range(60)]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    await engine.exclusive(lambda: None)
    engine.close()
    cancelled = [result for result in results if isinstance(result, BaseException)]
    assert 5 < len(cancelled) < 55
    assert all(isinstance(error, asyncio.CancelledError) for error in cancelled)
    check([turn for result in results if not isinstance(result, BaseException) for turn in result])


async def test_closing_fails_the_requests_in_flight_and_those_that_wait():
    started, heard, go = held_at(3)
    engine = open_engine(Watched(shared_decoder(), heard), max_batch=1)
    params = SamplingParams(240)
    tasks = [asyncio.create_task(engine.sample([1, 2], params=params, stop=frozenset())) for _ in range(3)]
    tasks.append(asyncio.create_task(engine.exclusive(lambda: None)))
    await started.wait()
    closing = asyncio.create_task(asyncio.to_thread(engine.close))
    while True:
        if engine._ended:
            break
        await asyncio.sleep(0)
    go.set()
    await closing
    for task in tasks:
        with pytest.raises(EngineError, match="closed"):
            await task
    with pytest.raises(EngineError, match="closed"):
        await engine.sample([1, 2], params=params, stop=frozenset())
    engine.close()


async def test_an_engine_that_never_sampled_can_be_closed():
    engine = open_engine()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        await engine.exclusive(lambda: None)


@pytest.mark.parametrize("prompt", [[], [1] * CONTEXT, [1] * (CONTEXT + 50)], ids=len)
async def test_a_prompt_must_fit_the_context(engine, prompt):
    with pytest.raises(EngineError, match=f"{len(prompt)} tokens does not fit a context of {CONTEXT}"):
        await engine.sample(prompt, params=SamplingParams(), stop=STOP)


@pytest.mark.parametrize("token", [-1, VOCABULARY])
async def test_a_token_that_the_model_does_not_have_harms_nobody_else(engine, token):
    with pytest.raises(EngineError, match="another tokenizer"):
        await engine.sample([1, token, 2], params=SamplingParams(), stop=STOP)
    check(await talk(engine, 1))


async def test_a_turn_ends_where_the_context_does(engine):
    tokens = draw_tokens(CONTEXT - 5, seed=5)
    params = SamplingParams(100)
    completion = await engine.sample(tokens, params=params, stop=frozenset())
    assert len(completion.span.token_ids) == 5
    assert not completion.stopped
    check([(tokens, params, completion)])


async def test_a_turn_that_reached_the_end_of_the_context_leaves_the_others_alone():
    model = make_model(FALLBACK["gpt2, learned positions"])
    engine = open_engine(make_decoder(model))
    asked = [(draw_tokens(CONTEXT - 3, seed=0), SamplingParams(50))]
    asked += [(draw_tokens(2, seed=number), SamplingParams(60, 1.0, number)) for number in range(1, 9)]
    done = await asyncio.gather(*(engine.sample(tokens, params=params, stop=frozenset()) for tokens, params in asked))
    engine.close()
    check([(tokens, params, completion) for (tokens, params), completion in zip(asked, done, strict=True)], model)


async def test_deterministic_results_do_not_depend_on_order_or_company():
    results = []
    for order, at_once in ((range(12), True), (reversed(range(12)), True), (range(12), False)):
        engine = open_engine(deterministic=True)
        numbers = list(order)
        if at_once:
            talks = await asyncio.gather(*(talk(engine, number) for number in numbers))
        else:
            talks = [await talk(engine, number) for number in numbers]
        engine.close()
        spans = {number: [turn[2].span for turn in said] for number, said in zip(numbers, talks, strict=True)}
        results.append(sorted(spans.items()))
    assert results[0] == results[1] == results[2]
    check([turn for said in talks for turn in said])


async def test_a_deterministic_turn_does_not_depend_on_the_turns_before_it():
    engine = open_engine(deterministic=True)
    turns = await talk_at_once(engine, range(8))
    engine.close()
    watched = Watched(shared_decoder())
    engine = open_engine(watched, deterministic=True)
    for number in range(8):
        opening = len(OPENINGS[number % 3])
        for tokens, params, completion in turns[3 * number : 3 * number + 3][::-1]:
            before = watched.tokens
            again = await engine.sample(tokens, params=params, stop=STOP, shared=opening)
            assert again == completion
            assert watched.tokens - before >= len(tokens) - opening
    engine.close()


async def test_deterministic_results_survive_the_cancelling_of_others():
    alone = open_engine(deterministic=True)
    wanted = [turn[2].span for turn in await talk(alone, 2)]
    alone.close()
    started, heard, go = held_at(30)
    engine = open_engine(Watched(shared_decoder(), heard), deterministic=True)
    doomed = asyncio.create_task(engine.sample(OPENINGS[2] + [5] * 60, params=SamplingParams(170), stop=frozenset(), shared=20))
    said = asyncio.create_task(talk(engine, 2))
    await started.wait()
    doomed.cancel()
    await asyncio.wait([doomed])
    go.set()
    assert [turn[2].span for turn in await said] == wanted
    engine.close()
    assert doomed.cancelled()


@pytest.mark.parametrize("call", [1, 2, 3, 6])
async def test_a_failure_of_the_engine_reaches_everybody_who_waits(call):
    everybody = threading.Event()

    def heard(number):
        everybody.wait()
        if number == call:
            raise MemoryError("no room for the batch")

    engine = open_engine(Watched(shared_decoder(), heard), max_batch=3)
    tasks = [
        asyncio.create_task(engine.sample([9, 8, number], params=SamplingParams(50), stop=frozenset(), shared=2))
        for number in range(8)
    ]
    tasks.append(asyncio.create_task(engine.exclusive(lambda: None)))
    asyncio.get_running_loop().call_soon(everybody.set)
    with anyio.fail_after(60):
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, MemoryError) for result in results)
    with pytest.raises(EngineError, match="no room for the batch"):
        await engine.sample([1], params=SamplingParams(), stop=STOP)
    engine.close()


async def test_prefixes_and_histories_stay_within_their_memory():
    engine = open_engine(history_tokens=60)
    turns = []
    for number in range(3 * PREFIXES):
        opening = draw_tokens(5, seed=("many", number))
        for turn in range(3):
            tokens = opening + draw_tokens(6, seed=(number, turn))
            params = SamplingParams(20, 1.0, seed=turn)
            turns.append((tokens, params, await engine.sample(tokens, params=params, stop=STOP, shared=5)))
        assert len(engine._lanes) <= PREFIXES
        assert sum(lane.histories.tokens for lane in engine._lanes.values()) <= 60
    engine.close()
    check(turns)


async def test_prefixes_in_use_are_never_dropped():
    engine = open_engine()
    numbers = range(2 * PREFIXES)

    async def sample(number):
        tokens = draw_tokens(9, seed=("many", number))
        params = SamplingParams(20, 1.0, seed=number)
        return tokens, params, await engine.sample(tokens, params=params, stop=frozenset(), shared=5)

    check(await asyncio.gather(*map(sample, numbers)))
    engine.close()


def test_threads_with_loops_of_their_own_share_one_engine():
    engine, turns = open_engine(), []

    def work(number):
        turns.extend(asyncio.run(talk(engine, number)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    assert sum(thread.name == "art-mcp-engine" for thread in threading.enumerate()) <= 1
    for thread in threads:
        thread.join()
    engine.close()
    assert len(turns) == 18
    check(turns)
