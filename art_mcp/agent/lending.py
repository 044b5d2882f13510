"""A toolbox for one rollout, in the state in which its scenario begins; where the servers come from is not here."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from art_mcp.environment import Environment
from art_mcp.errors import ConfigError
from art_mcp.ports import Toolbox, Toolboxes
from art_mcp.types import Scenario


@asynccontextmanager
async def toolbox_for(scenario: Scenario, *, environment: Environment, toolbox: Toolboxes) -> AsyncGenerator[Toolbox]:
    """What one rollout of `scenario` plays on, for as long as the block lasts, its reward included.

    Raises ToolServerError where its servers do not start, ResetError where the environment's `reset` fails, and ConfigError
    where servers that all rollouts share were opened for an environment that wants copies of them.
    """
    if environment.copies and not toolbox.separate:
        raise ConfigError(
            f"each rollout of environment {environment.name!r} has servers of its own (copies={environment.copies}), but these "
            "are shared: open them by open_servers(environment) in place of open_tools"
        )
    async with toolbox.lend() as lent:
        await environment.bring_back(scenario, lent)
        yield lent
