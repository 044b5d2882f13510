"""How much of a model's context a prompt leaves; the same question for every engine."""

from __future__ import annotations

from collections.abc import Sequence

from art_mcp.errors import EngineError


def room_for(token_ids: Sequence[int], context: int) -> int:
    """How many tokens a turn after `token_ids` may have, at least 1. Raises EngineError where there is none, or no prompt."""
    room = context - len(token_ids)
    if room <= 0 or not token_ids:
        raise EngineError(f"a prompt of {len(token_ids)} tokens does not fit a context of {context} tokens")
    return room
