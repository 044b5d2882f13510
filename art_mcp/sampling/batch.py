"""Rows being decoded together on one shared prefix: prefill, step, drop, merge. Tensors only; queues live in the engine."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from random import Random

import torch
from torch import Tensor

from art_mcp.sampling.decoder import MASKED, Decoder, Prefix
from art_mcp.sampling.slots import BufferCache, Slots

PREFILL_CELLS = 2**23
"""Cells (rows · new tokens · columns) of one attention head computed at once when a batch starts."""
SHORT = 64
"""New tokens up to which padding a prompt costs less than computing it apart."""


@dataclass(slots=True)
class Row:
    """One turn being sampled. `prompt` is what follows the shared prefix; `uniforms` decides every draw."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    stop: frozenset[int]
    uniforms: Sequence[float]
    sampled: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    cancelled: bool = False

    @property
    def stopped(self) -> bool:
        return bool(self.sampled) and self.sampled[-1] in self.stop

    @property
    def finished(self) -> bool:
        return self.cancelled or self.stopped or len(self.sampled) >= self.max_tokens


def draw_uniforms(seed: int, count: int) -> Sequence[float]:
    """`count` numbers in (0, 1] that depend on `seed` alone."""
    draw = Random(seed).random
    return [1.0 - draw() for _ in range(count)]


class Histories:
    """Keys and values of finished turns by their tokens, so that the next turn computes only what is new. Nothing is
    forgotten unasked; `tokens` says how many are kept."""

    def __init__(self) -> None:
        self.tokens = 0
        self._kept: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()
        self._lengths: Counter[int] = Counter()

    def keep(self, tokens: tuple[int, ...], states: Tensor) -> None:
        if tokens and tokens not in self:
            self._kept[tokens] = states
            self.tokens += len(tokens)
            self._lengths[len(tokens)] += 1

    def __contains__(self, tokens: tuple[int, ...]) -> bool:
        return tokens in self._kept

    def forget(self, tokens: int) -> int:
        """Lets go of at least `tokens` tokens, or of all: those used longest ago first. Returns how many it were."""
        before = self.tokens
        while self._kept and before - self.tokens < tokens:
            oldest, _ = self._kept.popitem(last=False)
            self.tokens -= len(oldest)
            self._lengths[len(oldest)] -= 1
            if not self._lengths[len(oldest)]:
                del self._lengths[len(oldest)]
        return before - self.tokens

    def longest(self, tokens: tuple[int, ...]) -> Tensor | None:
        """States (layers, 2, heads, n, width) of the longest kept beginning of `tokens` that leaves one token to compute."""
        for length in sorted((length for length in self._lengths if length < len(tokens)), reverse=True):
            found = self._kept.get(tokens[:length])
            if found is not None:
                self._kept.move_to_end(tokens[:length])
                return found
        return None


@dataclass(frozen=True, slots=True)
class Opening:
    """What a batch starts with: a prompt, and the kept states (layers, 2, heads, known, width) of its first tokens."""

    prompt: tuple[int, ...]
    states: Tensor | None

    @property
    def known(self) -> int:
        return 0 if self.states is None else self.states.shape[3]

    @property
    def fresh(self) -> int:
        """Tokens to compute."""
        return len(self.prompt) - self.known


def alike(openings: Iterable[Opening]) -> Iterator[list[Opening]]:
    """Openings that are computed together, padded to the longest of them: those with like many new tokens."""
    part: list[Opening] = []
    for opening in sorted(openings, key=lambda opening: -opening.fresh):
        longest = (part or [opening])[0].fresh
        columns = longest + max(one.known for one in [*part, opening])
        few = opening.fresh < longest // 2 and longest > SHORT
        if part and (few or (len(part) + 1) * longest * columns > PREFILL_CELLS):
            yield part
            part = []
        part.append(opening)
    if part:
        yield part


class Batch:
    """Rows that share a prefix.

    Rows with the same tokens so far share a state (keys, values, mask, position, logits) and are computed once: rollouts of
    one scenario go together until a draw parts them. A state that serves no row any more is computed on until another takes
    its place.
    """

    def __init__(self, decoder: Decoder, prefix: Prefix, dtype: torch.dtype) -> None:
        self._decoder, self._prefix = decoder, prefix
        self.rows: list[Row] = []
        self._state_of: list[int] = []
        self._slots = Slots(decoder.kv_shape, dtype)
        self._positions = torch.zeros(0, dtype=torch.long)
        self._logits = torch.zeros(0, 0)

    def prefill(self, rows: list[Row], histories: Histories | None) -> None:
        """Starts an empty batch: every distinct prompt is computed once, from its longest kept history on."""
        openings = [
            Opening(prompt, histories.longest(prompt) if histories else None) for prompt in {row.prompt for row in rows}
        ]
        parts = list(alike(openings))
        width = max(part[0].fresh + max(one.known for one in part) for part in parts)
        self._slots.reserve(len(openings), column=width)
        index: dict[tuple[int, ...], int] = {}
        logits: list[Tensor] = []
        for part in parts:
            logits.append(self._last_logits(part, len(index)))
            index |= {opening.prompt: len(index) + number for number, opening in enumerate(part)}
        self._logits = torch.cat(logits)
        self._positions = torch.tensor([len(prompt) + self._prefix.length for prompt in index])
        self.rows, self._state_of = list(rows), [index[row.prompt] for row in rows]

    def _last_logits(self, part: Sequence[Opening], first: int) -> Tensor:
        """Computes right-aligned prompts as the states from `first` on."""
        slots, last = self._slots, first + len(part)
        new, past = part[0].fresh, max(opening.known for opening in part)
        begin = slots.column - new
        token_ids, positions = torch.zeros(2, len(part), new, dtype=torch.long)
        for number, opening in enumerate(part):
            known, fresh, place = opening.known, opening.fresh, first + number
            if opening.states is not None:
                slots.states[:, :, place, :, begin - known : begin] = opening.states
            slots.mask[place, begin - known : begin] = 0
            slots.mask[place, slots.column - fresh : slots.column] = 0
            token_ids[number, new - fresh :] = torch.tensor(opening.prompt[known:])
            positions[number, new - fresh :] = torch.arange(known, len(opening.prompt)) + self._prefix.length
        own = slice(begin - past, slots.column)
        seen = slots.mask[first:last, None, own].repeat(1, new, 1)
        seen[:, :, past:].masked_fill_(torch.ones(new, new, dtype=torch.bool).triu_(1), MASKED)
        cache = BufferCache(slots.states[:, :, first:last, :, own], past)
        hidden = self._decoder.hidden(token_ids, positions, prefix=self._prefix, cache=cache, mask=seen)
        return self._decoder.logits(hidden[:, -1])

    def step(self, histories: Histories | None) -> list[Row]:
        """Samples one token for every row, then computes what follows it. Removes the rows that have finished and returns
        them; `histories` keeps their keys and values for a next turn."""
        log_probs, drawn = self._draw()
        chosen_log_probs = log_probs.gather(1, drawn[:, None])[:, 0].tolist()
        for row, token, log_prob in zip(self.rows, drawn.tolist(), chosen_log_probs, strict=True):
            if not row.finished:
                row.sampled.append(token)
                row.logprobs.append(log_prob)
        finished = [row for row in self.rows if row.finished]
        if histories is not None:
            self._keep(histories)
        alive = [(row, state) for row, state in zip(self.rows, self._state_of, strict=True) if not row.finished]
        self.rows, self._state_of = [row for row, _ in alive], [state for _, state in alive]
        if alive:
            self._advance(self._branch())
        return finished

    def _keep(self, histories: Histories) -> None:
        for row, state in zip(self.rows, self._state_of, strict=True):
            tokens = row.prompt + tuple(row.sampled[:-1])
            if row.finished and not row.cancelled and tokens not in histories:
                histories.keep(tokens, self._slots.own(state))

    def _branch(self) -> Tensor:
        """A state for every distinct (state, token just sampled) of the rows; returns the tokens, one a state. The first of
        a state's children is the state itself; the others begin as copies of it."""
        children: dict[tuple[int, int], int] = {}
        parted: list[tuple[int, int]] = []
        places = self._idle()
        heirs: set[int] = set()
        for row, state in zip(self.rows, self._state_of, strict=True):
            child = (state, row.sampled[-1])
            if child not in children:
                children[child] = next(places) if state in heirs else state
                if state in heirs:
                    parted.append((state, children[child]))
                heirs.add(state)
        self._state_of = [children[state, row.sampled[-1]] for row, state in zip(self.rows, self._state_of, strict=True)]
        self._copy(parted)
        tokens = torch.zeros(self._slots.count, dtype=torch.long)
        tokens[torch.tensor(list(children.values()))] = torch.tensor([token for _, token in children])
        return self._close_up(tokens)

    def _idle(self) -> Iterator[int]:
        """The places that serve no row, then those behind the last."""
        used = set(self._state_of)
        return chain((place for place in range(self._slots.count) if place not in used), count(self._slots.count))

    def _copy(self, moves: Sequence[tuple[int, int]]) -> None:
        """States from the first places of `moves` to the second ones."""
        if moves:
            sources, places = [source for source, _ in moves], [place for _, place in moves]
            self._slots.reserve(max(places) + 1)
            self._slots.copy(sources, places)
            self._positions = fitting(self._positions, self._slots.count)
            self._positions[torch.tensor(places)] = self._positions[torch.tensor(sources)]

    def _close_up(self, tokens: Tensor) -> Tensor:
        """`tokens` of the states; where more than a quarter of these serves no row, the others close up."""
        used = sorted(set(self._state_of))
        idle = sorted(set(range(self._slots.count)) - set(used))
        self._slots.free(idle)
        # learned positions end where the context does
        self._positions[idle] = 0
        if len(used) * 4 > self._slots.count * 3:
            return tokens
        moves = [(place, gap) for place, gap in zip(reversed(used), idle, strict=False) if gap < len(used)]
        self._copy(moves)
        moved = dict(moves)
        for place, gap in moves:
            tokens[gap] = tokens[place]
        self._state_of = [moved.get(state, state) for state in self._state_of]
        self._slots.count = len(used)
        self._positions = self._positions[: len(used)]
        return tokens[: len(used)]

    def _advance(self, tokens: Tensor) -> None:
        """Computes what follows `tokens` (states,)."""
        slots = self._slots
        slots.reserve(slots.count)
        hidden = self._decoder.hidden(
            tokens[:, None], self._positions[:, None], prefix=self._prefix, cache=slots.cache(), mask=slots.seen()
        )
        self._logits = self._decoder.logits(hidden[:, 0])
        slots.column += 1
        self._positions = self._positions + 1

    def _draw(self) -> tuple[Tensor, Tensor]:
        """Log probabilities (rows, vocabulary) and the drawn tokens (rows,), by inverting the cumulative distribution."""
        logits = self._logits[torch.tensor(self._state_of)]
        temperature = torch.tensor([row.temperature or 1.0 for row in self.rows], dtype=logits.dtype)[:, None]
        log_probs = torch.log_softmax(logits / temperature, dim=-1)
        # what a cancelled row draws is ignored
        numbers = [0.5 if row.finished else row.uniforms[len(row.sampled)] for row in self.rows]
        cumulative = log_probs.exp().cumsum(dim=-1)
        points = torch.tensor(numbers, dtype=cumulative.dtype)[:, None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, points)[:, 0].clamp_(max=cumulative.shape[-1] - 1)
        greedy = torch.tensor([row.temperature == 0 for row in self.rows])
        if bool(greedy.any()):
            drawn = torch.where(greedy, logits.argmax(dim=-1), drawn)
        return log_probs, drawn

    def merge(self, other: Batch) -> None:
        """Takes in the rows of `other`."""
        idle = self._idle()
        places = [next(idle) for _ in range(other._slots.count)]
        self._slots.take(other._slots, places)
        self._positions = fitting(self._positions, self._slots.count)
        self._logits = fitting(self._logits, self._slots.count) if self._logits.numel() else other._logits
        there = torch.tensor(places)
        self._positions[there], self._logits[there] = other._positions, other._logits
        self.rows = self.rows + other.rows
        self._state_of = self._state_of + [places[state] for state in other._state_of]


def fitting(values: Tensor, size: int) -> Tensor:
    """`values` (n, …) with zeros behind them, `size` in all."""
    return torch.cat((values, values.new_zeros(size - len(values), *values.shape[1:]))) if size > len(values) else values
