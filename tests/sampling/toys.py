"""Random models, small enough to build for each test, whose every parameter matters; and what transformers says of them."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from art_mcp.sampling.decoder import Decoder, make_decoder
from art_mcp.sampling.transformers_engine import TransformersEngine
from art_mcp.types import Policy

torch.set_num_threads(1)  # the models are too small for more

VOCABULARY = 97
CONTEXT = 256
TOKENIZER = Path(__file__).parents[2] / "art_mcp" / "tiny_policy"

WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": CONTEXT}
GROUPED = WIDE | {"num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": 0}
EXPERTS = GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
PHI3 = {"sliding_window": None, "rope_parameters": LONG, "original_max_position_embeddings": 64}
LOCAL = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": CONTEXT}

LEAN: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen2, tied": ("Qwen2Config", GROUPED | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", GROUPED | {"head_dim": 16}),
    "llama": ("LlamaConfig", GROUPED),
    "llama, one key head": ("LlamaConfig", GROUPED | {"num_key_value_heads": 1}),
    "llama, biases": ("LlamaConfig", GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "llama, long": ("LlamaConfig", GROUPED | {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}}),
    "mistral": ("MistralConfig", GROUPED | {"sliding_window": None}),
}
"""Served by LeanDecoder."""

FALLBACK: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox": ("GPTNeoXConfig", WIDE | {"intermediate_size": 48}),
    "gpt2, learned positions": ("GPT2Config", WIDE),
    "phi": ("PhiConfig", GROUPED),
    "olmo2": ("Olmo2Config", GROUPED),
    "gemma2, capped logits": ("Gemma2Config", GROUPED | {"head_dim": 16, "final_logit_softcapping": 3.0}),
    "granite, scaled logits": ("GraniteConfig", GROUPED | {"logits_scaling": 3.0, "residual_multiplier": 0.5}),
    "cohere, scaled logits": ("CohereConfig", GROUPED | {"logit_scale": 0.25}),
    "llama, yarn": ("LlamaConfig", GROUPED | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS),
}
"""Served by TransformersDecoder."""

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "a sliding window": ("MistralConfig", GROUPED | {"sliding_window": 32}),
    "a sliding window in some layers": ("Gemma3TextConfig", GROUPED | {"head_dim": 16, "sliding_window": 32}),
    "local attention": ("GPTNeoConfig", LOCAL | {"attention_types": [[["global", "local"], 1]], "window_size": 32}),
    "linear biases for positions": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": CONTEXT}),
    "biases made of a plain mask": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "keys of a latent": (
        "DeepseekV3Config",
        GROUPED | LATENT | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1},
    ),
    "keys for fewer heads than it says": ("FalconConfig", WIDE | {"alibi": False, "new_decoder_architecture": False}),
    "a state instead of keys": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2}),
    "positions that depend on the length": ("Phi3Config", GROUPED | PHI3),
}
"""Not served: each breaks what a decoder here relies on."""


def make_model(named: tuple[str, dict[str, Any]] = LEAN["qwen2"], *, seed: int = 0, **changes: Any) -> Any:
    """A model with peaked distributions, whose biases and norms are not at their idle starting values."""
    name, settings = named
    config = getattr(transformers, name)(**({"vocab_size": VOCABULARY} | settings | changes))
    with torch.random.fork_rng(devices=[]), torch.inference_mode(mode=False), torch.no_grad():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            spread = torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else 0.3)
            parameter.copy_(parameter + spread if parameter.dim() == 1 else spread)
    return model


@cache
def shared_model() -> Any:
    """One model for all tests that only look at it."""
    return make_model()


@cache
def shared_decoder() -> Decoder:
    return make_decoder(shared_model())


def open_engine(decoder: Decoder | None = None, **options: Any) -> TransformersEngine:
    return TransformersEngine(decoder or shared_decoder(), policy=Policy("toy", 0), context_length=CONTEXT, **options)


def draw_tokens(count: int, *, seed: object) -> list[int]:
    """Tokens that depend on `seed` alone."""
    return random.Random(str(seed)).choices(range(VOCABULARY), k=count)


def log_probs_of(model: Any, token_ids: list[int], *, temperature: float = 1.0) -> torch.Tensor:
    """What the model's own forward pass gives each token (from the second on), in nats."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0].double()
    log_probs = torch.log_softmax(logits / temperature, dim=-1)
    return log_probs[:-1].gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]


def save_toy(folder: Path, **changes: Any) -> Path:
    """A model folder: random weights with the vocabulary of the shipped policy, and its tokenizer."""
    make_model(vocab_size=768, **changes).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(TOKENIZER / file, folder / file)
    return folder


class Watched:
    """A decoder that tells `heard` the number of each call, before it makes it, and counts the tokens computed."""

    def __init__(self, decoder: Decoder, heard: Callable[[int], None] = lambda number: None) -> None:
        self._decoder, self._heard = decoder, heard
        self.kv_shape, self.vocabulary = decoder.kv_shape, decoder.vocabulary
        self.calls = self.tokens = 0

    def hidden(self, token_ids: torch.Tensor, positions: torch.Tensor, **options: Any) -> torch.Tensor:
        self.calls += 1
        self.tokens += token_ids.numel()
        self._heard(self.calls)
        return self._decoder.hidden(token_ids, positions, **options)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._decoder.logits(hidden)
