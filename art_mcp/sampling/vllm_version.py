"""The weights of one step on their way through an engine; what is done with them is `vllm_engine`'s business."""

from __future__ import annotations

import asyncio
from pathlib import Path

from art_mcp.types import Policy


class Version:
    """The weights of one step, in `folder` until nobody needs them, and how many requests sample under them."""

    def __init__(self, policy: Policy, folder: Path) -> None:
        self.policy, self.folder = policy, folder
        self.requests = 0
        self.retired = False
        self.idle = asyncio.Event()
        self.idle.set()

    def hold(self) -> Version:
        """This version, for a request that is to sample under it."""
        self.requests += 1
        self.idle.clear()
        return self

    def let_go(self) -> None:
        """A request has ended."""
        self.requests -= 1
        if not self.requests:
            self.idle.set()
