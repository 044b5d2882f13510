"""A Sampler that plays given turns: for checks, demonstrations and tests. It knows nothing of models."""

from __future__ import annotations

from collections.abc import Sequence

from art_mcp.types import Completion, Policy, SamplingParams, Span


class ScriptedSampler:
    """Plays `turns` (token ids, the stop token included) one after the other for a single rollout, then empty turns.

    `prompts` are the token ids that each turn was asked to follow. Every logprob is 0.
    """

    def __init__(self, turns: Sequence[Sequence[int]], *, context_length: int = 1_000_000) -> None:
        self.policy = Policy("scripted", 0)
        self.context_length = context_length
        self.prompts: list[tuple[int, ...]] = []
        self._turns = [tuple(turn) for turn in turns]

    async def sample(
        self, token_ids: Sequence[int], *, params: SamplingParams, stop: frozenset[int], shared: int = 0
    ) -> Completion:
        number = len(self.prompts)
        self.prompts.append(tuple(token_ids))
        turn = self._turns[number] if number < len(self._turns) else (min(stop),)
        played = turn[: params.max_tokens]
        stopped = bool(played) and played[-1] in stop
        return Completion(Span(played, (0.0,) * len(played), 0), stopped)
