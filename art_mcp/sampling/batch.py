"""Rows being decoded together on one shared prefix: prefill, step, drop, merge. Tensors only; queues live in the engine."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

from art_mcp.sampling.decoder import MASKED, Decoder, Prefix

ROOM = 32
"""Columns by which a buffer of keys and values grows."""
PREFILL_CELLS = 2**23
"""Cells (rows · new tokens · columns) of one attention head computed at once when a batch starts."""


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


class BufferCache:
    """Writes new keys and values into a buffer (layers, 2, rows, heads, columns, width) from `column` on."""

    def __init__(self, buffer: Tensor, column: int) -> None:
        self._buffer, self._column = buffer, column

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        end = self._column + keys.shape[2]
        self._buffer[layer, 0, :, :, self._column : end] = keys
        self._buffer[layer, 1, :, :, self._column : end] = values
        return self._buffer[layer, 0, :, :, :end], self._buffer[layer, 1, :, :, :end]


class Batch:
    """Rows that share a prefix.

    Rows with the same tokens so far share a state (keys, values, mask, position, logits) and are computed once: rollouts of
    one scenario go together until a draw parts them. Column c of the buffer holds any token of a state: `mask` says which
    ones are the state's own.
    """

    def __init__(self, decoder: Decoder, prefix: Prefix, dtype: torch.dtype) -> None:
        self._decoder, self._prefix, self._dtype = decoder, prefix, dtype
        self.rows: list[Row] = []
        self._state_of: list[int] = []
        layers, heads, width = decoder.kv_shape
        self._buffer = torch.zeros(layers, 2, 0, heads, 0, width, dtype=dtype)
        self._mask = torch.zeros(0, 0, dtype=dtype)
        self._column = 0
        self._positions = torch.zeros(0, dtype=torch.long)
        self._logits = torch.zeros(0, 0)

    def prefill(self, rows: list[Row], histories: Histories | None) -> None:
        """Starts an empty batch: every distinct prompt is computed once, from its longest kept history on."""
        index = {prompt: number for number, prompt in enumerate(dict.fromkeys(row.prompt for row in rows))}
        prompts = list(index)
        kept = [histories.longest(prompt) if histories else None for prompt in prompts]
        known = [0 if states is None else states.shape[3] for states in kept]
        past = max(known)
        new = max(len(prompt) - n for prompt, n in zip(prompts, known, strict=True))
        layers, heads, width = self._decoder.kv_shape
        self._buffer = torch.zeros(layers, 2, len(prompts), heads, past + new + ROOM, width, dtype=self._dtype)
        visible = torch.zeros(len(prompts), past + new, dtype=torch.bool)
        token_ids = torch.zeros(len(prompts), new, dtype=torch.long)
        positions = torch.zeros(len(prompts), new, dtype=torch.long)
        for number, (prompt, states, n) in enumerate(zip(prompts, kept, known, strict=True)):
            fresh = len(prompt) - n
            if states is not None:
                self._buffer[:, :, number, :, past - n : past] = states
            visible[number, past - n : past] = True
            visible[number, past + new - fresh :] = True
            token_ids[number, new - fresh :] = torch.tensor(prompt[n:])
            positions[number, new - fresh :] = torch.arange(n, len(prompt)) + self._prefix.length
        mask = torch.zeros(visible.shape, dtype=self._dtype).masked_fill_(~visible, MASKED)
        self._column = past + new
        self._logits = self._last_logits(token_ids, positions, mask)
        self._mask = torch.nn.functional.pad(mask, (0, ROOM))
        self._positions = positions[:, -1] + 1
        self.rows, self._state_of = list(rows), [index[row.prompt] for row in rows]

    def _last_logits(self, token_ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Computes right-aligned prompts, a few rows at a time where they are long; their keys go into the buffer."""
        new = token_ids.shape[1]
        past = self._column - new
        future = torch.ones(new, new, dtype=torch.bool).triu_(1)
        logits: list[Tensor] = []
        for some in torch.arange(len(token_ids)).split(max(1, PREFILL_CELLS // (new * self._column))):
            part = slice(int(some[0]), int(some[-1]) + 1)
            seen = mask[part, None].repeat(1, new, 1)
            seen[:, :, past:].masked_fill_(future, MASKED)
            cache = BufferCache(self._buffer[:, :, part], past)
            hidden = self._decoder.hidden(token_ids[part], positions[part], prefix=self._prefix, cache=cache, mask=seen)
            logits.append(self._decoder.logits(hidden[:, -1]))
        return torch.cat(logits)

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
                columns = (self._mask[state, : self._column] == 0).nonzero()[:, 0]
                histories.keep(tokens, self._buffer[:, :, state][:, :, :, columns])

    def _branch(self) -> Tensor:
        """A state for every distinct (state, token just sampled) of the rows; returns the tokens, one a state.

        States are moved only where one parts in two, or where a quarter of them serves no row any more."""
        children: dict[tuple[int, int], int] = {}
        places = [
            children.setdefault((state, row.sampled[-1]), len(children))
            for row, state in zip(self.rows, self._state_of, strict=True)
        ]
        tokens = torch.tensor([token for _, token in children])
        parents = torch.tensor([state for state, _ in children])
        states = len(self._positions)
        if len(set(self._state_of)) == len(children) and len(children) * 4 > states * 3:
            # a state that serves no row stays at position 0: learned positions end where the context does
            self._positions = torch.zeros_like(self._positions).index_copy_(0, parents, self._positions[parents])
            return torch.zeros(states, dtype=torch.long).index_copy_(0, parents, tokens)
        self._state_of = places
        self._buffer, self._mask, self._positions = self._buffer[:, :, parents], self._mask[parents], self._positions[parents]
        return tokens

    def _advance(self, tokens: Tensor) -> None:
        """Computes what follows `tokens` (states,)."""
        if self._column == self._mask.shape[1]:
            self._buffer = torch.nn.functional.pad(self._buffer, (0, 0, 0, ROOM))
            self._mask = torch.nn.functional.pad(self._mask, (0, ROOM))
        end = self._column + 1
        cache = BufferCache(self._buffer, self._column)
        seen = self._mask[:, None, :end]
        hidden = self._decoder.hidden(tokens[:, None], self._positions[:, None], prefix=self._prefix, cache=cache, mask=seen)
        self._logits = self._decoder.logits(hidden[:, 0])
        self._column, self._positions = end, self._positions + 1

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
        """Takes in the rows of `other`; both keep their last column, and columns that no row needs any more are cut."""
        column = max(self._column, other._column)
        parts = [batch._aligned(column) for batch in (self, other)]
        buffer, mask = torch.cat([part[0] for part in parts], dim=2), torch.cat([part[1] for part in parts])
        unused = int((mask[:, :column] == 0).any(dim=0).int().argmax())
        self._buffer, self._mask, self._column = buffer[:, :, :, :, unused:], mask[:, unused:], column - unused
        self._positions = torch.cat((self._positions, other._positions))
        self._logits = torch.cat((self._logits, other._logits))
        states = len(parts[0][1])
        self.rows = self.rows + other.rows
        self._state_of = self._state_of + [states + state for state in other._state_of]

    def _aligned(self, column: int) -> tuple[Tensor, Tensor]:
        """The buffer and the mask, moved right so that the next free column is `column`."""
        shift = column - self._column
        pad = torch.nn.functional.pad
        mask = pad(pad(self._mask[:, : self._column], (shift, 0), value=MASKED), (0, ROOM))
        return pad(self._buffer[:, :, :, :, : self._column], (0, 0, shift, ROOM)), mask
