"""What vLLM's server is asked for a turn, and what its answers say; how they travel is not here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from art_mcp.types import Completion, SamplingParams, Span

FINAL_ONLY = 2
"""Of vLLM's RequestOutputKind."""


@dataclass(frozen=True, slots=True)
class Door:
    """Where turns are asked for: `ask` makes a body from what `ask_completion` takes, `read` a Completion from the answer."""

    path: str
    ask: Callable[..., dict[str, Any]]
    read: Callable[[Mapping[str, Any], int], Completion]


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


def ask_tokens(
    model: str, token_ids: Sequence[int], *, params: SamplingParams, stop: frozenset[int], step: int
) -> dict[str, Any]:
    """The same for /inference/v1/generate, which makes no strings at all."""
    return {
        "model": model,
        "token_ids": list(token_ids),
        "sampling_params": {
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "seed": params.seed,
            "stop_token_ids": sorted(stop),
            "ignore_eos": True,
            "logprobs": 0,
            "detokenize": False,
            # all tokens once, at the end; else the server copies what there is so far at each of them
            "output_kind": FINAL_ONLY,
        },
        "cache_salt": f"step {step}",
    }


def read_tokens(answer: Mapping[str, Any], step: int) -> Completion:
    """As `read_completion`. Raises KeyError, IndexError or TypeError for what is no such answer."""
    choice = answer["choices"][0]
    logprobs = tuple(float(token["logprob"]) for token in choice["logprobs"]["content"])
    return Completion(Span(tuple(choice["token_ids"]), logprobs, step), stopped=choice["finish_reason"] == "stop")


COMPLETIONS = Door("/v1/completions", ask_completion, read_completion)
"""Every server has it; it writes each token as a string too."""
TOKENS = Door("/inference/v1/generate", ask_tokens, read_tokens)
"""A quarter more tokens a second, where it is offered."""


def serves_tokens(status: int, body: bytes) -> bool:
    """Whether this is how a server answers that offers TOKENS and was asked there for one token."""
    if status != 200:
        return False
    try:
        span = read_tokens(json.loads(body), 0).span
    except (ValueError, KeyError, IndexError, TypeError):
        return False
    return len(span.token_ids) == len(span.logprobs or ()) == 1


def complaint(body: bytes) -> str:
    """The message of an error answer."""
    try:
        said = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:500].decode(errors="replace")
    no_numbers = "Out of range float values are not JSON compliant" in said
    return said + " (it computed logprobs that are no numbers: look at engine_args, and at the model's weights)" * no_numbers
