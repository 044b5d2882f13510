"""Several vLLM servers of the same model as one engine: a server is bound by its Python, not by its GPU. What each of them
does is `vllm_engine`'s business."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections import OrderedDict
from collections.abc import Awaitable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from art_mcp.errors import ConfigError, EngineError
from art_mcp.sampling.vllm_args import Served, VllmSettings, weights_of
from art_mcp.sampling.vllm_engine import VllmEngine
from art_mcp.sampling.vllm_server import VllmServer, say, started
from art_mcp.types import Completion, Policy, SamplingParams

REMEMBERED = 65_536
"""Conversations whose replica is known; the one that was continued longest ago is forgotten first."""


class Engine(Protocol):
    """One server or several."""

    @property
    def policy(self) -> Policy: ...

    @property
    def context_length(self) -> int: ...

    @property
    def facts(self) -> dict[str, Any]: ...

    @property
    def servers(self) -> list[VllmServer]: ...

    def begin(self) -> object: ...

    async def start(self, step: int, folder: Path) -> None: ...

    async def ready(self) -> None: ...

    async def sample(
        self, token_ids: Sequence[int], *, params: SamplingParams, stop: frozenset[int], shared: int = 0
    ) -> Completion: ...

    async def publish(self, step: int, folder: Path) -> None: ...

    async def make_room(self) -> None: ...

    async def close(self) -> None: ...


def open_engine(served: Served, settings: VllmSettings) -> VllmEngine | VllmReplicas:
    """Raises ConfigError for fewer than one replica."""
    if settings.replicas < 1:
        raise ConfigError(f"an engine has one replica or more, not {settings.replicas}")
    return VllmEngine(served, settings) if settings.replicas == 1 else VllmReplicas(served, settings)


class VllmReplicas:
    """`settings.replicas` engines behind the interface of one, each with its part of the memory share.

    A conversation stays where its keys and values are; a new one goes where the fewest requests are in flight. A replica that
    died fails its own requests alone and is started anew, while the others take its conversations. One that does not start is
    tried again after the next publication, and at once where no other is left.
    """

    def __init__(self, served: Served, settings: VllmSettings) -> None:
        self._served = served
        self.engines = [VllmEngine(served, settings) for _ in range(settings.replicas)]
        self._flying = [0] * len(self.engines)
        self._known: OrderedDict[int, int] = OrderedDict()
        self._policy: Policy | None = None
        self._mending: dict[int, asyncio.Task[None]] = {}
        self._given_up: set[int] = set()
        self._closed = False
        self._booting: asyncio.Task[None] | None = None

    @property
    def policy(self) -> Policy:
        """The version that all replicas have."""
        if self._policy is None:
            raise EngineError("nothing has been published to this engine yet")
        return self._policy

    @property
    def context_length(self) -> int:
        return self.engines[0].context_length

    @property
    def facts(self) -> dict[str, Any]:
        return {**self.engines[0].facts, "engine_replicas": len(self.engines)}

    @property
    def servers(self) -> list[VllmServer]:
        return [engine.server for engine in self.engines]

    def begin(self) -> None:
        """As an engine's: all together where the size of the weights is known, else one after the other, because each
        measures the memory then."""
        self._booting = started(self._boot())

    async def _boot(self) -> None:
        together = weights_of(self._served.model) is not None
        for engine in self.engines:
            task = engine.begin()
            if not together:
                await asyncio.wait([task])

    async def start(self, step: int, folder: Path) -> None:
        """Starts all servers with the weights of `step`. Raises what any of them raises."""
        if self._booting is not None:
            await self._booting
        folders = await asyncio.to_thread(copies, folder, len(self.engines))
        starts = [partial(engine.start, step, own) for engine, own in zip(self.engines, folders, strict=True)]
        whole = self._served.lora_rank is None
        if self._booting is not None or weights_of(str(folder) if whole else self._served.model) is not None:
            raise_first(await all_of(start() for start in starts))
        else:
            for start in starts:
                await start()
        self._policy = Policy(self._served.name, step)

    async def ready(self) -> None:
        """Returns when one replica has the current weights; nobody waits for the others, which are started anew meanwhile.
        Raises EngineError where none can be."""
        while not any(engine.available for engine in self.engines):
            await one_of([self._mend(place) for place in range(len(self.engines))])
        for place, engine in enumerate(self.engines):
            if not engine.available and place not in self._given_up:
                self._mend(place)

    async def sample(
        self, token_ids: Sequence[int], *, params: SamplingParams, stop: frozenset[int], shared: int = 0
    ) -> Completion:
        await self.ready()
        place = self._place_of(token_ids, shared)
        self._flying[place] += 1
        try:
            completion = await self.engines[place].sample(token_ids, params=params, stop=stop, shared=shared)
        finally:
            self._flying[place] -= 1
        self._remember((*token_ids, *completion.span.token_ids), shared, place)
        return completion

    async def publish(self, step: int, folder: Path) -> None:
        """Samples under `step` everywhere from when this returns; meanwhile a request gets the version of its replica, which
        its span says. Nobody waits for a replica that has died: it begins with these weights. Raises EngineError when a living
        one refuses an adapter, and where none is left."""
        # one that has it already took it when another refused it
        behind = [engine for engine in self.engines if engine.policy.step != step]
        folders = await asyncio.to_thread(copies, folder, len(behind))
        raise_first(await all_of(engine.take(step, own) for engine, own in zip(behind, folders, strict=True)))
        self._policy = Policy(self._served.name, step)
        self._given_up.clear()
        await self.ready()

    async def make_room(self) -> None:
        """Returns when every replica can load an adapter: when few of those before the current one have requests left."""
        for engine in self.engines:
            await engine.make_room()

    async def close(self) -> None:
        """Ends all servers, and with them what waits for one."""
        self._closed = True
        if self._booting is not None:
            self._booting.cancel()
            await asyncio.wait([self._booting])
        failures = await all_of(engine.close() for engine in self.engines)
        if self._mending:
            await asyncio.wait(self._mending.values())
        raise_first(failures)

    def _place_of(self, token_ids: Sequence[int], shared: int) -> int:
        """The replica that sampled the conversation's last turn, or the idlest that is available."""
        known = self._known_of(token_ids, shared)
        if known is not None and self.engines[known].available:
            return known
        places = [place for place, engine in enumerate(self.engines) if engine.available]
        return min(places or range(len(self.engines)), key=lambda place: self._flying[place])

    def _known_of(self, token_ids: Sequence[int], shared: int) -> int | None:
        """Where the longest beginning of `token_ids` was sampled whose end was the end of a turn."""
        found = None
        for key in beginnings(token_ids, shared):
            found = self._known.get(key, found)
        return found

    def _remember(self, token_ids: Sequence[int], shared: int, place: int) -> None:
        *_, key = beginnings(token_ids, shared)
        self._known[key] = place
        self._known.move_to_end(key)
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    def _mend(self, place: int) -> asyncio.Task[None]:
        """The start of a replica that cannot be sampled from."""
        task = self._mending.get(place)
        if task is None or task.done():
            task = self._mending[place] = asyncio.create_task(self.engines[place].ready())
            task.add_done_callback(partial(self._mended, place))
        return task

    def _mended(self, place: int, task: asyncio.Task[None]) -> None:
        failure = None if task.cancelled() else task.exception()
        if failure is None:
            self._given_up.discard(place)
        elif not self._closed:
            self._given_up.add(place)
            say(f"one of {len(self.engines)} engine replicas does not start: {failure}")


def beginnings(token_ids: Sequence[int], shared: int) -> Iterable[int]:
    """A number for each beginning of `token_ids` from the `shared` first ones on."""
    key = hash(tuple(token_ids[:shared]))
    yield key
    for token in token_ids[shared:]:
        key = hash((key, token))
        yield key


def copies(folder: Path, count: int) -> list[Path]:
    """`folder` and others beside it with the same files, one for each replica to remove when it is done with it."""
    if not count:
        shutil.rmtree(folder)
        return []
    others = [folder.with_name(f"{folder.name}-{number}") for number in range(1, count)]
    for other in others:
        shutil.copytree(folder, other, copy_function=link)
    return [folder, *others]


def link(source: str, target: str) -> None:
    """The same file under another name; a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


async def one_of(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Returns when one of them has done its work, the others go on; raises what the first of them raised, where all failed."""
    left = set(tasks)
    while left:
        done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
        if any(task.exception() is None for task in done):
            return
    raise_first(task.exception() for task in tasks)


async def all_of(work: Iterable[Awaitable[None]]) -> list[BaseException | None]:
    """Does all of it side by side, each to its end; what each of them raised, if anything."""
    return await asyncio.gather(*work, return_exceptions=True)


def raise_first(outcomes: Iterable[BaseException | None]) -> None:
    for failure in outcomes:
        if failure is not None:
            raise failure
