"""A Hugging Face tokenizer behind the Tokenizer door, through its Rust backend; chat templates are not its business."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class BackendTokenizer:
    """`tokenizer` is a fast transformers tokenizer; nothing is added when encoding, nothing cleaned when decoding."""

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        self.specials: tuple[str, ...] = tuple(str(token.content) for token in tokenizer.added_tokens_decoder.values())

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(token_ids), skip_special_tokens=False))
