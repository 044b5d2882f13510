"""What vLLM's server is asked for a turn, and what its answers say; how they travel is not here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from art_mcp.types import Completion, SamplingParams, Span


def ask_completion(
    model: str, token_ids: Sequence[int], *, params: SamplingParams, stop: frozenset[int], step: int
) -> dict[str, Any]:
    """The body for /v1/completions: tokens in, tokens and logprobs out, under `model`, whose weights are those of `step`."""
    return {
        "model": model,
        "prompt": list(token_ids),
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "seed": params.seed,
        # only what is asked for ends a turn, whatever the model's own configuration says
        "stop_token_ids": sorted(stop),
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
        # nothing is decoded for the sake of strings that nobody reads
        "return_tokens_as_token_ids": True,
        "skip_special_tokens": False,
        # what was computed under other weights is never found again, even should it still be in the prefix cache
        "cache_salt": f"step {step}",
    }


def read_completion(answer: Mapping[str, Any], step: int) -> Completion:
    """The span of the only choice; its last token is the stop token where one ended it."""
    choice = answer["choices"][0]
    ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    return Completion(Span(tuple(ids), tuple(logprobs), step), stopped=choice["finish_reason"] == "stop")


def complaint(body: bytes) -> str:
    """The message of an error answer."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:500].decode(errors="replace")
