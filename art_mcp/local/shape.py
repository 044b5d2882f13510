"""The sizes of a decoder, from its config.json: what its memory can be reckoned from. No library is needed for that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from art_mcp.errors import ModelError

FLOAT = 4
"""Bytes of a number: everything is in float32 on a CPU."""
LEAN = frozenset({"qwen2", "qwen3", "llama", "mistral"})
"""The architectures whose forward pass is ours, and is known here tensor by tensor; others are reckoned as if they were."""
ADAPTED = 7
"""Linear layers of a block that LoRA adapts: query, key, value, output, gate, up, down."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder's sizes, as its config.json has them; `parameters` as its weight files have them."""

    architecture: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    width: int
    inner: int
    vocabulary: int
    context: int
    tied: bool
    parameters: int

    @property
    def exact(self) -> bool:
        return self.architecture in LEAN

    @property
    def matrix(self) -> int:
        """Numbers of the embedding, the largest matrix."""
        return self.vocabulary * self.hidden

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.width * FLOAT

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA adapters on all linear layers (arXiv:2106.09685): rank · (in + out) each."""
        query, key = self.heads * self.width, self.kv_heads * self.width
        ends = 2 * (self.hidden + query) + 2 * (self.hidden + key) + 3 * (self.hidden + self.inner)
        return self.layers * rank * ends

    def kept_on_gpu(self, rank: int | None) -> int:
        """Bytes that training keeps on a GPU from step to step: all weights in bfloat16 (2 each), and for each trained one a
        float32 master or adapter, its gradient and AdamW's two moments (16). `rank`: of adapters, None for all weights."""
        return 2 * self.parameters + 16 * (self.parameters if rank is None else self.adapters(rank))


def context_of(config: Mapping[str, Any]) -> int:
    """The most tokens that the model of a config.json was made for; 32768 where it does not say."""
    text = config.get("text_config") or config
    return int(text.get("max_position_embeddings") or 32768)


def shape_of(config: dict[str, Any], parameters: int) -> Shape:
    """Raises ModelError for a configuration that does not have a decoder's sizes."""
    text = config.get("text_config") or config
    try:
        heads = int(text["num_attention_heads"])
        shape = Shape(
            architecture=str(text.get("model_type", config.get("model_type", "unknown"))),
            hidden=int(text["hidden_size"]),
            layers=int(text["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(text.get("num_key_value_heads") or heads),
            width=int(text.get("head_dim") or int(text["hidden_size"]) // heads),
            inner=int(text["intermediate_size"]),
            vocabulary=int(text["vocab_size"]),
            context=context_of(config),
            tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", True))),
            parameters=parameters,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"its config.json lacks {error} as a decoder has it, so its memory cannot be reckoned") from error
    return shape if parameters else replace(shape, parameters=reckon_parameters(shape))


def reckon_parameters(shape: Shape) -> int:
    """Of a decoder whose weight files are not here: embedding, and for each block attention, gated MLP and two norms."""
    query, key = shape.heads * shape.width, shape.kv_heads * shape.width
    block = 2 * shape.hidden * (query + key) + 3 * shape.hidden * shape.inner + 2 * shape.hidden
    return shape.matrix * (1 if shape.tied else 2) + shape.layers * block + shape.hidden
