"""Samples packed into rows for one forward pass: rollouts of one prompt become a tree, in which a token that several of them
begin with stands once. Plain lists and masks; the arithmetic is the trainer's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from art_mcp.types import Sample

ROW_NODES = 1024
"""Nodes up to which samples of one prompt share a row: attention grows with the square of a row, what is saved does not."""

PADDING = 256
"""Padded nodes that cost no more than another micro-batch would."""


@dataclass(frozen=True, slots=True)
class Row:
    """A tree of tokens: `token_ids` and `parents` (-1: the shared prefix) of its nodes, parents before children; `paths` are
    the nodes of each sample in order, of which the first `known` are also those of the sample before it, the rest new."""

    samples: tuple[Sample, ...]
    token_ids: tuple[int, ...]
    parents: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]
    known: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows as tensors, right-padded to (rows, width): `seen` (rows, width, width) says which nodes a node may look at, itself
    included, padding too: a node that sees nothing is NaN in some kernels. `positions` count from the conversation's begin.

    Flat over the trainable tokens of all samples: the flat place (row · width + node) of each distinct trained node in
    `targets`, of its parent in `sources`; `index` leads from the samples' tokens to these, `owners` to the sample.
    """

    token_ids: Tensor
    positions: Tensor
    seen: Tensor
    sources: Tensor
    targets: Tensor
    index: Tensor
    owners: Tensor


def plan_rows(samples: Sequence[Sample], prefix: int, *, share: bool = True) -> list[Row]:
    """The samples in rows, from token `prefix` on, which all of them share the tokens before. Samples with the same tokens
    always share a row; those of the same prompt do with `share`, as far as a row reaches (`ROW_NODES`)."""
    rows: list[Row] = []
    members: list[Sample] = []
    for sample in sorted(samples, key=lambda sample: sample.token_ids[prefix:]):
        if members and not belongs(sample, members, prefix, share=share):
            rows.append(make_row(members, prefix))
            members = []
        members.append(sample)
    if members:
        rows.append(make_row(members, prefix))
    return rows


def belongs(sample: Sample, members: Sequence[Sample], prefix: int, *, share: bool) -> bool:
    """Whether the next sample, in the order of tokens, goes into the row of those before it."""
    last = members[-1]
    if sample.token_ids == last.token_ids:
        return True
    size = sum(len(tokens) for tokens in {member.token_ids[prefix:] for member in members})  # at most so many nodes
    prompt = next((place for place, on in enumerate(sample.trainable) if on), len(sample.token_ids))
    alike = prompt > prefix and sample.token_ids[prefix:prompt] == last.token_ids[prefix:prompt]
    return share and alike and size + len(sample.token_ids) - prefix <= ROW_NODES


def make_row(samples: Sequence[Sample], prefix: int) -> Row:
    """One tree of samples in the order of their tokens: each adds what it does not have in common with the one before."""
    token_ids: list[int] = []
    parents: list[int] = []
    paths: list[tuple[int, ...]] = []
    shared: list[int] = []
    before, path = (), ()
    for sample in samples:
        own = sample.token_ids[prefix:]
        known = shared_length(before, own)
        path = (*path[:known], *range(len(token_ids), len(token_ids) + len(own) - known))
        parents.extend((-1, *path)[known : len(path)])
        token_ids.extend(own[known:])
        paths.append(path)
        shared.append(known)
        before = own
    return Row(tuple(samples), tuple(token_ids), tuple(parents), tuple(paths), tuple(shared))


def shared_length(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading tokens both have."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(left), len(right)))


def micro_batches(rows: Sequence[Row], budget: int) -> Iterator[list[Row]]:
    """Rows of like size together: each batch has at most `budget` padded nodes (one row at the least), and little padding."""
    batch: list[Row] = []
    nodes = 0
    for row in sorted(rows, key=lambda row: -len(row.token_ids)):
        padded = (len(batch) + 1) * len((batch or [row])[0].token_ids)
        padding = padded - nodes - len(row.token_ids)
        if batch and (padded > budget or padding > max(PADDING, nodes // 4)):
            yield batch
            batch, nodes = [], 0
        batch.append(row)
        nodes += len(row.token_ids)
    if batch:
        yield batch


def pack(rows: Sequence[Row], prefix: int) -> Packed:
    """The rows as tensors on the CPU."""
    width = max(len(row.token_ids) for row in rows)
    token_ids, positions = torch.zeros(2, len(rows), width, dtype=torch.long)
    parents = torch.zeros(len(rows), width, dtype=torch.long)
    seen = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)
    targets: list[Tensor] = []
    for place, row in enumerate(rows):
        size = len(row.token_ids)
        token_ids[place, :size] = torch.tensor(row.token_ids)
        parents[place, :size] = torch.tensor(row.parents) + place * width
        end = 0
        for sample, path, known in zip(row.samples, row.paths, row.known, strict=True):
            nodes = torch.tensor(path, dtype=torch.long)
            start, end = end, end + len(path) - known
            seen[place, start:end, nodes[:known]] = True
            seen[place, start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril_()
            positions[place, start:end] = torch.arange(known, len(path)) + prefix
            targets.append(nodes[torch.tensor(sample.trainable[prefix:], dtype=torch.bool)] + place * width)
    owners = torch.arange(len(targets)).repeat_interleave(torch.tensor([len(nodes) for nodes in targets]))
    trained, index = torch.unique(torch.cat(targets), return_inverse=True)
    return Packed(token_ids, positions, seen, parents.flatten()[trained], trained, index, owners)
