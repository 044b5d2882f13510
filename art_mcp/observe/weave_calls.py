"""A Tracer into a W&B Weave project. weave is imported here and only when tracing is switched on."""

# pyright: reportMissingImports=false, reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from art_mcp.errors import ConfigError, boundary
from art_mcp.types import JsonObject


class WeaveTracer:
    """A Tracer whose calls become those of a weave `client`, named `art_mcp.<kind>`; they nest by context variables, as the
    tasks that make them do."""

    def __init__(self, client: Any) -> None:
        self._client = client

    @contextmanager
    def call(self, kind: str, inputs: JsonObject) -> Generator[Callable[[Any], None]]:
        call = self._client.create_call(f"art_mcp.{kind}", dict(inputs))
        told: list[Any] = []
        try:
            yield told.append
        except BaseException as error:
            self._client.finish_call(call, exception=error)
            raise
        self._client.finish_call(call, output=told[-1] if told else None)

    async def close(self) -> None:
        """Waits until all that was traced has been sent."""
        await asyncio.to_thread(self._client.flush)


async def open_weave(project: str) -> WeaveTracer:
    """Starts weave for `project`, "team/name" or a name alone, and says so on stderr. Raises ConfigError where weave is not
    installed, or will not start (nobody is logged in, the server does not answer)."""
    if importlib.util.find_spec("weave") is None:
        raise ConfigError("weave is not installed: pip install 'art-mcp[weave]'")
    sys.stderr.write(
        f"tracing into the weave project {project!r}: weave.init patches other libraries in this process globally "
        "(the clients of mcp and openai among them), so their own calls are traced too\n"
    )
    return WeaveTracer(await asyncio.to_thread(start, project))


def start(project: str) -> Any:
    import weave

    with boundary(ConfigError, f"weave does not start for project {project!r}", Exception):
        return weave.init(project, settings={"print_call_link": False})  # a line for every step
