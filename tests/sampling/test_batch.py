"""Rows that join and leave, histories, draws: what a batch does without an engine around it."""

import random

import torch
from toys import draw_tokens, log_probs_of, shared_decoder, shared_model

from art_mcp.sampling import batch as batches
from art_mcp.sampling.batch import Batch, Histories, Row, draw_uniforms
from art_mcp.sampling.decoder import compute_prefix
from art_mcp.sampling.slots import ROOM

OPENING = draw_tokens(9, seed="opening")
STOP = frozenset(range(12))


def make_row(number, *, max_tokens=None, prompt=None):
    chance = random.Random(number)
    prompt = tuple(prompt or draw_tokens(chance.randrange(1, 40), seed=number))
    tokens = chance.randrange(1, 30) if max_tokens is None else max_tokens
    return Row(prompt, tokens, chance.choice((0.0, 0.7, 1.0, 1.6)), STOP, draw_uniforms(number, tokens))


def start(rows, histories=None):
    with torch.inference_mode():
        started = Batch(shared_decoder(), compute_prefix(shared_decoder(), OPENING, torch.float32), torch.float32)
        started.prefill(rows, histories)
        return started


def run_to_end(batch, histories=None):
    """Steps until no row is left; every finished row's keys and values are kept."""
    while batch.rows:
        advance(batch, histories)


def advance(batch, histories=None):
    with torch.inference_mode():
        batch.step(histories)


def check(rows):
    for row in rows:
        wanted = log_probs_of(shared_model(), [*OPENING, *row.prompt, *row.sampled], temperature=row.temperature or 1.0)
        torch.testing.assert_close(torch.tensor(row.logprobs).double(), wanted[-len(row.sampled) :], rtol=0, atol=1e-4)


def test_rows_that_join_and_leave_at_any_time_get_the_models_own_log_probabilities():
    rows = [make_row(number) for number in range(40)]
    chance = random.Random(0)
    waiting = list(rows)
    batch = start([waiting.pop()])
    while waiting:
        for _ in range(chance.randrange(4)):
            if batch.rows:
                advance(batch)
        crowd = [waiting.pop() for _ in range(min(len(waiting), chance.randrange(1, 5)))]
        with torch.inference_mode():
            batch.merge(start(crowd))
    run_to_end(batch)
    assert all(row.finished for row in rows)
    check(rows)


def test_a_batch_that_never_ends_does_not_grow():
    batch, widest = start([make_row(0, max_tokens=8)]), 0
    for number in range(1, 150):
        advance(batch)
        with torch.inference_mode():
            batch.merge(start([make_row(number, max_tokens=8)]))
        widest = max(widest, batch._slots.mask.shape[1])
        assert len(batch.rows) <= 9
    assert widest <= 40 + 8 + 1 + ROOM


def test_a_later_turn_goes_on_from_its_history_with_the_same_numbers():
    histories = Histories()
    first = [make_row(number) for number in range(12)]
    run_to_end(start(first, histories), histories)
    prompts = [(*row.prompt, *row.sampled, *draw_tokens(5, seed=number)) for number, row in enumerate(first)]
    rows = [make_row(100 + number, prompt=prompt) for number, prompt in enumerate(prompts)]
    fresh = [make_row(100 + number, prompt=prompt) for number, prompt in enumerate(prompts)]
    assert all(histories.longest(row.prompt) is not None for row in rows)
    run_to_end(start(rows, histories))
    run_to_end(start(fresh))
    assert [row.sampled for row in rows] == [row.sampled for row in fresh]
    check(rows)


def test_keys_can_be_kept_before_those_of_the_last_token_are_computed():
    histories = Histories()
    rows = [make_row(number, max_tokens=3) for number in range(4)]
    run_to_end(start(rows), histories)
    for row in rows:
        states = histories.longest((*row.prompt, *row.sampled))
        assert states.shape[3] == len(row.prompt) + len(row.sampled) - 1


def test_only_finished_turns_are_kept():
    histories = Histories()
    rows = [make_row(number, max_tokens=4) for number in range(3)]
    rows[0].cancelled = True
    batch = start(rows)
    advance(batch, histories)
    assert rows[0] not in batch.rows
    assert histories.tokens == 0 or any(row.stopped for row in rows)
    run_to_end(batch, histories)
    assert histories.tokens == sum(len(row.prompt) + len(row.sampled) - 1 for row in rows[1:])


def test_long_prompts_are_computed_a_few_at_a_time_with_the_same_numbers(monkeypatch):
    monkeypatch.setattr(batches, "PREFILL_CELLS", 3000)
    rows = [make_row(number) for number in range(12)]
    run_to_end(start(rows))
    check(rows)


def test_an_equal_prompt_is_computed_once():
    rows = [make_row(number, prompt=(5, 6, 7), max_tokens=6) for number in range(8)]
    assert len({number for row in rows for number in row.uniforms}) == 48
    batch = start(rows)
    assert len(batch.rows) == 8
    run_to_end(batch)
    check(rows)


def test_histories_forget_what_was_used_longest_ago_first():
    histories = Histories()
    for number in range(4):
        histories.keep((number, 1, 2), torch.zeros(1))
    assert histories.tokens == 12
    assert histories.longest((0, 1, 2, 3)) is not None
    assert histories.forget(4) == 6
    assert histories.tokens == 6
    kept = [number for number in range(4) if histories.longest((number, 1, 2, 3)) is not None]
    assert kept == [0, 3]
    assert histories.forget(100) == 6
    assert histories.longest((0, 1, 2, 3)) is None


def test_the_longest_history_leaves_a_token_to_compute():
    histories = Histories()
    for length in (1, 3, 5):
        histories.keep(tuple(range(length)), torch.full((1,), length))
    assert int(histories.longest(tuple(range(9)))) == 5
    assert int(histories.longest(tuple(range(5)))) == 3
    assert histories.longest((0,)) is None
    assert histories.longest((1, 2)) is None


def test_draws_depend_on_the_seed_alone_and_are_never_zero():
    assert draw_uniforms(7, 20) == draw_uniforms(7, 40)[:20]
    assert draw_uniforms(7, 20) != draw_uniforms(8, 20)
    numbers = draw_uniforms(2**63 - 1, 20000)
    assert 0 < min(numbers) <= max(numbers) <= 1
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.01


def test_rows_with_the_same_tokens_are_computed_once_and_apart_from_where_a_draw_parts_them():
    prompt = draw_tokens(20, seed=5)
    rows = [Row(tuple(prompt), 12, 1.0, STOP, draw_uniforms(number // 2, 12)) for number in range(8)]
    batch = start(rows)
    assert len(batch._positions) == 1
    widest = 0
    while batch.rows:
        advance(batch)
        widest = max(widest, len(batch._positions))
    assert 1 < widest <= 4
    assert all(rows[number].sampled == rows[number + 1].sampled for number in range(0, 8, 2))
    check(rows)
