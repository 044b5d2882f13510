"""A causal language model as a pure forward over keys and values that the caller owns; shared by engine and trainer.

`LeanDecoder` walks a Llama-shaped model's own modules (so that LoRA layers count) with one shared prefix that is never
expanded; `TransformersDecoder` serves every other architecture through transformers' own forward. Nothing here samples.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from art_mcp.errors import ModelError, boundary
from art_mcp.sampling.attention import attend, rotary_table, rotate, sight, without_cudnn
from art_mcp.sampling.head import head_logits

MASKED = -1e30
"""Added to a score that may not be seen; finite, so that a padded row stays free of NaN."""
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")
"""Where configurations say that a token sees only so many tokens before it."""


class Cache(Protocol):
    """Where a layer's new keys and values (rows, heads, new, width) go; returns all that the new tokens may look at."""

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]: ...


class NoCache:
    """For one pass over whole rows: the new keys and values are all there is."""

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values


class KeepCache:
    """Keeps every layer's keys and values, in order: how a prefix is computed once (with its graph, when training)."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.layers.append((keys, values))
        return keys, values


@dataclass(frozen=True, slots=True)
class Prefix:
    """Tokens that all rows of a batch begin with: per layer keys and values of shape (1, heads, length, width)."""

    length: int
    layers: list[tuple[Tensor, Tensor]]


NO_PREFIX = Prefix(0, [])


class Decoder(Protocol):
    """One forward pass over new tokens."""

    kv_shape: tuple[int, int, int]
    """Layers, key/value heads, head width."""
    vocabulary: int

    def hidden(self, token_ids: Tensor, positions: Tensor, *, prefix: Prefix, cache: Cache, mask: Tensor) -> Tensor:
        """Last hidden states (rows, new, size) of `token_ids` (rows, new) at absolute `positions` (rows, new).

        `mask` (rows, new, seen) is added to the attention scores over what `cache` returns; the prefix is always seen.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (…, vocabulary) in float32 or wider."""
        ...


def on(device: torch.device) -> AbstractContextManager[object]:
    """New tensors are made on `device`; nothing to do on a CPU, where looking at every call would cost more than small ones."""
    return nullcontext() if device.type == "cpu" else device


def make_decoder(model: Any) -> Decoder:
    """The fastest decoder that is exact for `model` (a transformers causal LM, or a peft model around one).

    Raises ModelError when none is: when a few tokens, decoded in parts with a prefix and a gap, do not come out as in the
    model's own forward pass, or when the model sees less far back than its context reaches.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    config = base.config.get_text_config()
    refusal = f"{config.model_type} models cannot be decoded exactly here; choose one with plain full attention, " + (
        "such as Qwen2.5, Qwen3, Llama, OLMo, Granite or Phi-2"
    )
    reason = limited_sight(config)
    if not reason:
        with boundary(ModelError, refusal, Exception), on(base.device):
            decoder = LeanDecoder(base) if LeanDecoder.serves(base.config) else TransformersDecoder(base)
            if is_exact(decoder, base):
                return decoder
        reason = "its attention is more than keys, values, positions and a mask"
    raise ModelError(f"{refusal}: {reason}")


def limited_sight(config: Any) -> str:
    """Why tokens see less far back than the context reaches, or positions change with its length; "" where neither."""
    context = int(getattr(config, "max_position_embeddings", 0) or 0)
    kinds = getattr(config, "layer_types", None)
    windowed = kinds is None or any(kind != "full_attention" for kind in kinds)
    for name in WINDOWS:
        width = getattr(config, name, None)
        used = windowed and (name != "sliding_window" or getattr(config, "use_sliding_window", True))
        if used and isinstance(width, int) and 0 < width < context:
            return f"{name} of {width} tokens in a context of {context}"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope" and rope.get("original_max_position_embeddings", context) < context:
        return "rotary positions that change with the length of the conversation"
    return ""


def is_exact(decoder: Decoder, model: Any) -> bool:
    """Whether a row with two tokens out of sight, after a prefix, gets the logits of the model's own forward pass, and its
    keys and values have the shape that the decoder says.

    The median over tokens decides: in half precision a mixture of experts may choose another one for a token.
    """
    shared, dead, new = 5, 2, 8
    dtype = next(model.parameters()).dtype
    tokens = [(7 * number + 1) % decoder.vocabulary for number in range(shared + new)]
    positions = torch.tensor([[0] * dead + list(range(shared, shared + new))])
    mask = causal_mask(torch.tensor([dead + new]), dead + new, dtype)
    mask[:, :, :dead] = MASKED
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, shared:].double()
        prefix = compute_prefix(decoder, tokens[:shared], dtype)
        padded = torch.tensor([[0] * dead + tokens[shared:]])
        hidden = decoder.hidden(padded, positions, prefix=prefix, cache=NoCache(), mask=mask)
        layers, heads, width = decoder.kv_shape
        if [tensor.shape for layer in prefix.layers for tensor in layer] != [(1, heads, shared, width)] * 2 * layers:
            return False
        got = decoder.logits(hidden[0, dead:]).double()
    errors = (got - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return bool(errors.median() <= (0.1 if dtype.itemsize < 4 else 1e-3))


def causal_mask(lengths: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """(rows, width, width): row-wise causal over right-padded rows of `lengths` tokens."""
    columns = torch.arange(width)
    seen = (columns[None, :, None] >= columns[None, None, :]) & (columns[None, None, :] < lengths[:, None, None])
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, MASKED)


def compute_prefix(decoder: Decoder, token_ids: list[int], dtype: torch.dtype) -> Prefix:
    """The keys and values of `token_ids`, computed once; inside a graph when gradients are on."""
    if not token_ids:
        return NO_PREFIX
    size = len(token_ids)
    keep = KeepCache()
    mask = causal_mask(torch.tensor([size]), size, dtype)
    decoder.hidden(torch.tensor([token_ids]), torch.arange(size)[None], prefix=NO_PREFIX, cache=keep, mask=mask)
    return Prefix(size, keep.layers)


class LeanDecoder:
    """Qwen2, Qwen3 and Llama: grouped attention, rotary positions, RMS norm, gated MLP, as in transformers' own code."""

    ARCHITECTURES = frozenset({"qwen2", "qwen3", "llama", "mistral"})

    @classmethod
    def serves(cls, config: Any) -> bool:
        """Whether this arithmetic is exact for the model: known architecture, fixed rotary frequencies, full attention."""
        rope = getattr(config, "rope_parameters", None) or {}
        plain_rope = rope.get("rope_type", "default") in {"default", "linear", "llama3"}
        window = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
        return config.model_type in cls.ARCHITECTURES and plain_rope and not window and config.hidden_act == "silu"

    def __init__(self, model: Any) -> None:
        self._model, self._config = model, model.config
        self._layers = list(model.model.layers)
        width = getattr(self._config, "head_dim", None) or self._config.hidden_size // self._config.num_attention_heads
        self.kv_shape = (len(self._layers), self._config.num_key_value_heads, width)
        self.vocabulary = int(self._config.vocab_size)
        self._cos, self._sin = rotary_table(model.model.rotary_emb.inv_freq, 1)
        self.checkpoints = False
        """Whether layers are computed again in the backward pass (arXiv:1604.06174): slower, in a fraction of the memory."""

    def hidden(self, token_ids: Tensor, positions: Tensor, *, prefix: Prefix, cache: Cache, mask: Tensor) -> Tensor:
        states = self._model.model.embed_tokens(token_ids)
        rotation = self._rotation(positions, states.dtype)
        scores_mask = sight(mask, prefix.length)
        again = self.checkpoints and torch.is_grad_enabled() and isinstance(cache, NoCache)  # others keep what they are given
        for index in range(len(self._layers)):
            compute = partial(self._layer, index, prefix=prefix, cache=cache, mask=scores_mask)
            states = checkpoint(compute, states, rotation, use_reentrant=False) if again else compute(states, rotation)
        return self._norm(self._model.model.norm, states)

    def _layer(
        self, index: int, states: Tensor, rotation: tuple[Tensor, Tensor], *, prefix: Prefix, cache: Cache, mask: Tensor
    ) -> Tensor:
        layer = self._layers[index]
        normed = self._norm(layer.input_layernorm, states)
        shared = prefix.layers[index] if prefix.length else None
        states = states + self._attention(index, normed, rotation, shared=shared, cache=cache, mask=mask)
        normed = self._norm(layer.post_attention_layernorm, states)
        return states + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed))

    def logits(self, hidden: Tensor) -> Tensor:
        return head_logits(self._model.lm_head, hidden)

    def _norm(self, norm: Any, states: Tensor) -> Tensor:
        return F.rms_norm(states, (states.shape[-1],), norm.weight, norm.variance_epsilon)

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        top = int(positions.max()) + 1
        if top > self._cos.shape[0]:
            self._cos, self._sin = rotary_table(self._model.model.rotary_emb.inv_freq, 2 * top)
        return self._cos[positions][:, None].to(dtype), self._sin[positions][:, None].to(dtype)

    def _attention(
        self,
        index: int,
        states: Tensor,
        rotation: tuple[Tensor, Tensor],
        *,
        shared: tuple[Tensor, Tensor] | None,
        cache: Cache,
        mask: Tensor,
    ) -> Tensor:
        attention = self._layers[index].self_attn
        rows, new, _ = states.shape
        heads, width = self.kv_shape[1:]
        query, key = attention.q_proj(states).view(rows, new, -1, width), attention.k_proj(states).view(rows, new, -1, width)
        if self._config.model_type == "qwen3":
            query, key = self._norm(attention.q_norm, query), self._norm(attention.k_norm, key)
        query, key = rotate(query.transpose(1, 2), rotation), rotate(key.transpose(1, 2), rotation)
        value = attention.v_proj(states).view(rows, new, heads, width).transpose(1, 2)
        keys, values = cache.extend(index, key, value)
        mixed = attend(query, keys, values, shared=shared, mask=mask)
        return attention.o_proj(mixed.transpose(1, 2).reshape(rows, new, -1))


class TransformersDecoder:
    """Any other architecture with plain key/value caches, through transformers' own forward; the prefix is expanded."""

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        self._model = model
        self._cap = getattr(config, "final_logit_softcapping", None)
        self._scale = getattr(config, "logit_scale", None) or 1.0 / getattr(config, "logits_scaling", 1.0)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.kv_shape = (config.num_hidden_layers, heads, width)
        self.vocabulary = int(config.vocab_size)

    def hidden(self, token_ids: Tensor, positions: Tensor, *, prefix: Prefix, cache: Cache, mask: Tensor) -> Tensor:
        rows, new = token_ids.shape
        seen = torch.cat((mask.new_zeros(rows, new, prefix.length), mask), dim=-1)[:, None]
        with without_cudnn:
            output = self._model.base_model(
                input_ids=token_ids,
                attention_mask=seen,
                position_ids=positions,
                past_key_values=PrefixedCache(prefix, cache, rows),
                use_cache=True,
            )
        return output.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        logits = head_logits(self._model.get_output_embeddings(), hidden) * self._scale
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap


class PrefixedCache:
    """What transformers takes for its Cache: hands new keys and values to ours, and shows the prefix before them."""

    is_compileable = False

    def __init__(self, prefix: Prefix, cache: Cache, rows: int) -> None:
        self._prefix, self._cache, self._rows = prefix, cache, rows

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._cache.extend(layer_idx, key_states, value_states)
        if not self._prefix.length:
            return keys, values
        far = self._prefix.layers[layer_idx]
        shape = (self._rows, -1, -1, -1)
        return torch.cat((far[0].expand(shape), keys), dim=2), torch.cat((far[1].expand(shape), values), dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._prefix.length
