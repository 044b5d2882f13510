"""Which CUDA graphs vLLM records in a fast start; its other options are not here, and vLLM itself is never imported."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

SIZES = (1, 8, 32, 64, 128, 192, 256, 384)
"""Tokens of a step that is recorded as a graph; sizes in between are padded."""
DECODING = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
"""Nothing is compiled, and a step in which no request begins is a graph."""
EVERY_STEP = {"mode": 0, "cudagraph_mode": "FULL_AND_PIECEWISE"}
"""With BREAKABLE: a step in which requests begin, as nearly each of rollouts over tools is, is graphs too, between its
attentions, and 1.5 to 2.5 times as many tokens a second are sampled. Not FULL: with adapters, vLLM 0.25.1 computes wrong logits
and NaN then (both in docs/results/2026-11-28-gpu-thirteenth.md)."""
BREAKABLE = "VLLM_USE_BREAKABLE_CUDAGRAPH"
"""In vLLM's environment, "1": graphs are cut where a model calls an attention that says so, with nothing compiled."""
CUT = "attention that cuts graphs"
"""Found in a version whose one attention of dense models does."""
OPTIONS = {
    *("enforce_eager", "compilation_config", "optimization_level", "cudagraph_capture_sizes", "max_cudagraph_capture_size"),
}
"""With one of these a user has an idea of compilation and graphs."""
DENSE = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types whose every layer is that attention and a dense one. Others may have layers, such as Mamba's, that must run
outside graphs and do not say so in vLLM 0.25."""


def has_own_idea(asked: Collection[str]) -> bool:
    """Whether options that a user gave, such as `compilation_config.mode`, say how to compile or what to record."""
    return not OPTIONS.isdisjoint(name.partition(".")[0] for name in asked)


def can_record_every_step(model: str, known: Collection[str]) -> bool:
    """Whether graphs of a model (a folder, or a hub's in the cache) can be cut at attention by the installed vLLM, of which so
    much is `known`, and the environment does not refuse."""
    return {BREAKABLE, CUT} <= {*known} and os.environ.get(BREAKABLE, "1") == "1" and type_of(model) in DENSE


def compilation(most: int, *, every_step: bool) -> dict[str, Any]:
    """vLLM's compilation_config for at most so many requests at once."""
    beginning = {most * 3 // 2, most * 2} if every_step else set[int]()  # requests that begin have several tokens each
    sizes = sorted({*(size for size in SIZES if size < most), most, *beginning})
    return {**(EVERY_STEP if every_step else DECODING), "cudagraph_capture_sizes": sizes}


def type_of(model: str) -> str:
    """The `model_type` of a folder's configuration, or of a hub id's where it is cached; else empty."""
    file = Path(model) / "config.json"
    if not file.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(model, "config.json")
        except HFValidationError:  # a path, whose folder is not there yet
            return ""
        if not isinstance(cached, str):
            return ""
        file = Path(cached)
    values: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return str(values.get("model_type", ""))
