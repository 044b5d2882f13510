"""How samples become rows: trees that hold every token that samples have in common once, and lose none."""

import random

import pytest
import torch

from art_mcp.local import packing
from art_mcp.local.packing import micro_batches, pack, plan_rows
from art_mcp.types import Sample

PROMPTS = [(1, 2, 3), (1, 2, 4), (5,)]


def make_samples(seed, count=40):
    """Rollouts of a few prompts with two tokens to choose from, so that many begin alike and some are the same."""
    chance = random.Random(seed)
    samples = []
    for _ in range(count):
        prompt = chance.choice(PROMPTS)
        said = [chance.choice((7, 8)) for _ in range(chance.randrange(0, 7))]
        token_ids = (9, 9, *prompt, *said)
        trainable = [False] * (2 + len(prompt)) + [chance.random() < 0.7 for _ in said]
        samples.append(Sample(token_ids, tuple(trainable), (0.0,) * len(token_ids), 1.0))
    return samples


@pytest.mark.parametrize("share", [True, False])
def test_every_sample_reads_its_own_tokens_along_its_path(share):
    samples = make_samples(1)
    rows = plan_rows(samples, 2, share=share)
    assert sorted(id(sample) for row in rows for sample in row.samples) == sorted(map(id, samples))
    for row in rows:
        for sample, path in zip(row.samples, row.paths, strict=True):
            assert tuple(row.token_ids[node] for node in path) == sample.token_ids[2:]
            assert [row.parents[node] for node in path] == [-1, *path][: len(path)]


def test_what_rollouts_of_one_prompt_begin_with_stands_once():
    samples = make_samples(2)
    rows = plan_rows(samples, 2)
    spoken = [sample for sample in samples if any(sample.trainable)]
    for row in rows:
        beginnings = {sample.token_ids[2:end] for sample in row.samples for end in range(3, len(sample.token_ids) + 1)}
        assert len(row.token_ids) == len(beginnings)
    prompts = {sample.token_ids[2 : sample.trainable.index(True)] for sample in spoken}
    assert sum(any(any(sample.trainable) for sample in row.samples) for row in rows) <= len(prompts)


def test_different_prompts_do_not_share_a_row():
    left, right = (Sample((9, 9, *p, 7, 8), (False,) * 5 + (True,) * 2, None, 1.0) for p in PROMPTS[:2])
    assert [row.samples for row in plan_rows([right, left], 2)] == [(left,), (right,)]


def test_without_sharing_only_equal_tokens_share_a_row():
    samples = make_samples(3)
    rows = plan_rows(samples, 2, share=False)
    assert len(rows) == len({sample.token_ids for sample in samples})
    assert all(len({sample.token_ids for sample in row.samples}) == 1 for row in rows)


def test_a_row_is_closed_when_it_is_full(monkeypatch):
    monkeypatch.setattr(packing, "ROW_NODES", 12)
    rows = plan_rows(make_samples(4), 2)
    assert len(rows) > len(PROMPTS)
    assert max(len(row.token_ids) for row in rows) <= 12


def test_a_node_sees_itself_and_its_ancestors_alone():
    rows = plan_rows(make_samples(5), 2)
    packed = pack(rows, 2)
    assert packed.seen.shape == (len(rows), *packed.token_ids.shape[1:] * 2)
    for place, row in enumerate(rows):
        for path in row.paths:
            for depth, node in enumerate(path):
                assert packed.seen[place, node].nonzero()[:, 0].tolist() == sorted(path[: depth + 1])
                assert packed.positions[place, node] == 2 + depth
        for padding in range(len(row.token_ids), packed.seen.shape[1]):
            assert packed.seen[place, padding].nonzero()[:, 0].tolist() == [padding]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("prefix", [0, 2])
def test_no_node_sees_nothing_not_even_padding(share, prefix):
    samples = [*make_samples(4), Sample((9, 9, 5, *range(10, 60)), (False,) * 3 + (True,) * 50, None, 1.0)]
    for batch in ([row] for row in plan_rows(samples, prefix, share=share)), [plan_rows(samples, prefix, share=share)]:
        for rows in batch:
            seen = pack(rows, prefix).seen
            assert bool(seen.diagonal(dim1=1, dim2=2).all())
            sizes = torch.tensor([len(row.token_ids) for row in rows])
            padded = torch.arange(seen.shape[1])[None] >= sizes[:, None]
            assert bool((seen[padded].sum(-1) == 1).all())  # padding looks at nothing else
            assert not bool((seen & padded[:, None, :] & ~padded[:, :, None]).any())  # and nothing looks at it


def test_trained_tokens_keep_their_samples_and_their_order():
    rows = plan_rows(make_samples(6), 2)
    packed = pack(rows, 2)
    samples = [sample for row in rows for sample in row.samples]
    wanted = [(n, token) for n, s in enumerate(samples) for token, on in zip(s.token_ids, s.trainable, strict=True) if on]
    places = packed.targets[packed.index]
    assert list(zip(packed.owners.tolist(), packed.token_ids.flatten()[places].tolist(), strict=True)) == wanted
    assert len(packed.targets) == len(set(packed.targets.tolist())) < len(wanted)
    positions, sources = packed.positions.flatten(), packed.sources
    assert torch.equal(positions[sources] + 1, positions[packed.targets])


def test_micro_batches_keep_to_their_budget_and_lose_nothing():
    rows = plan_rows(make_samples(7), 2)
    for budget in (1, 40, 100, 10**6):
        batches = list(micro_batches(rows, budget))
        assert sorted(id(row) for batch in batches for row in batch) == sorted(map(id, rows))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(len(row.token_ids) for row in batch) <= budget
    assert len(batches) == 1
