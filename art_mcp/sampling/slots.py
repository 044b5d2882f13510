"""Where keys and values of what is decoded together stand: a table in which a state joins or parts by a copy of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from art_mcp.sampling.decoder import MASKED

ROOM = 32
"""Columns by which the table grows at the least."""
SHARE = 8
"""It grows by this part of itself, if that is more: what is copied then is a small part of what decoding reads."""


class BufferCache:
    """Writes new keys and values into a buffer (layers, 2, rows, heads, columns, width) from `column` on."""

    def __init__(self, buffer: Tensor, column: int) -> None:
        self._buffer, self._column = buffer, column

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        end = self._column + keys.shape[2]
        self._buffer[layer, 0, :, :, self._column : end] = keys
        self._buffer[layer, 1, :, :, self._column : end] = values
        return self._buffer[layer, 0, :, :, :end], self._buffer[layer, 1, :, :, :end]


class Slots:
    """The first `count` places of the table hold a state each, all right-aligned: its keys and values end before `column`,
    where those of the next token go.

    `states` (layers, 2, places, heads, columns, width); `mask` (places, columns): 0 where a column is the state's own, MASKED
    elsewhere. Columns from `column` on are anything in `states`, and own to every state in `mask`.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        layers, heads, width = shape
        self.count = self.column = 0
        self.states = torch.zeros(layers, 2, 0, heads, 0, width, dtype=dtype)
        self.mask = torch.zeros(0, 0, dtype=dtype)

    def reserve(self, count: int, *, column: int = 0) -> None:
        """Makes room for `count` states and for a token after them, with the next free column at `column` or after it. When
        all is moved, leading columns that no state owns are cut."""
        count = max(count, self.count)
        places, columns = self.mask.shape
        if count <= places and column <= self.column < columns:
            self._join(count)
            return
        own = (self.mask[: self.count, : self.column] == 0).any(dim=0)
        length = self.column - int(own.int().argmax()) if bool(own.any()) else 0
        end = max(length, column)
        layers, _, _, heads, _, width = self.states.shape
        shape = (count + (count // SHARE if count > places else 0), end + max(ROOM, end // SHARE))
        states = self.states.new_zeros(layers, 2, shape[0], heads, shape[1], width)
        states[:, :, : self.count, :, end - length : end] = self.states[
            :, :, : self.count, :, self.column - length : self.column
        ]
        mask = self.mask.new_zeros(shape)
        mask[: self.count, : end - length] = MASKED
        mask[: self.count, end - length : end] = self.mask[: self.count, self.column - length : self.column]
        self.states, self.mask, self.column = states, mask, end
        self._join(count)

    def cache(self) -> BufferCache:
        """For the next token of every state."""
        return BufferCache(self.states[:, :, : self.count], self.column)

    def seen(self) -> Tensor:
        """The mask of the next token, (count, 1, columns)."""
        return self.mask[: self.count, None, : self.column + 1]

    def copy(self, sources: Sequence[int], places: Sequence[int]) -> None:
        """What stands at `sources` stands at `places` too."""
        if sources:
            here, there = torch.tensor(sources), torch.tensor(places)
            self.states[:, :, there, :, : self.column] = self.states[:, :, here, :, : self.column]
            self.mask[there] = self.mask[here]

    def take(self, other: Slots, places: Sequence[int]) -> None:
        """Puts the states of `other` at `places`."""
        self.reserve(max(places) + 1, column=other.column)
        there, begin = torch.tensor(places), self.column - other.column
        self.states[:, :, there, :, begin : self.column] = other.states[:, :, : other.count, :, : other.column]
        self.mask[there, :begin] = MASKED
        self.mask[there, begin : self.column] = other.mask[: other.count, : other.column]
        self.mask[there, self.column :] = 0

    def free(self, places: Sequence[int]) -> None:
        """The states there own nothing any more, until others take their places."""
        if places:
            self.mask[torch.tensor(places), : self.column] = MASKED

    def own(self, place: int) -> Tensor:
        """Keys and values (layers, 2, heads, n, width) of a state's own tokens."""
        columns = (self.mask[place, : self.column] == 0).nonzero()[:, 0]
        return self.states[:, :, place][:, :, :, columns]

    def _join(self, count: int) -> None:
        """New states own nothing yet."""
        self.mask[self.count : count, : self.column] = MASKED
        self.mask[self.count : count, self.column :] = 0
        self.count = count
