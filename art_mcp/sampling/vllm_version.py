"""The weights of one step on their way through an engine; what is done with them is `vllm_engine`'s business."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from time import monotonic

from art_mcp.types import Policy


class Version:
    """The weights of one step, in `folder` until nobody needs them, and how many requests sample under them."""

    def __init__(self, policy: Policy, folder: Path) -> None:
        self.policy, self.folder = policy, folder
        self.requests = 0
        self.retired = False
        self.idle, self.gone = asyncio.Event(), asyncio.Event()
        self.idle.set()


async def all_gone(versions: Iterable[Version]) -> float:
    """Returns when the server has none of them any more: how many seconds that took."""
    began = monotonic()
    for version in versions:
        await version.gone.wait()
    return monotonic() - began
