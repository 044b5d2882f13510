"""A Sampler on a vLLM server, and how new weights get into it: adapters under new names, full weights in place. The process
is `vllm_server`'s business."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

import anyio

from art_mcp.errors import EngineError
from art_mcp.sampling.room import room_for
from art_mcp.sampling.vllm_args import ADAPTERS, Served, VllmSettings
from art_mcp.sampling.vllm_messages import COMPLETIONS, TOKENS, complaint, serves_tokens
from art_mcp.sampling.vllm_server import VllmServer, say, started
from art_mcp.sampling.vllm_version import Version
from art_mcp.types import Completion, Policy, SamplingParams

PUBLISH_SECONDS = 300.0
"""How long loading weights into a server may take before it counts as dead."""
REMOVE_SECONDS = 10.0
"""How long a server may take to let go of an adapter; who is cancelled meanwhile waits for it."""


class VllmEngine:
    """Samples under the version that was published last; every request keeps the one under which it began.

    With adapters ADAPTERS versions are loaded at most, under the names `name@step`: an old one goes, folder and all, when its
    last request has ended. Full weights are replaced in place: requests in flight end first, later ones wait. A server that
    died fails what it was sampling, and another is started for the next request.
    """

    def __init__(self, served: Served, settings: VllmSettings) -> None:
        self._served, self._settings = served, settings
        self._adapters = served.lora_rank is not None
        self.server = VllmServer(settings)
        self._version: Version | None = None
        self._older, self._loaded, self._unanswered = set[Version](), set[Version](), set[str]()
        self._booting: asyncio.Task[None] | None = None
        self._starting: asyncio.Task[None] | None = None
        self._doubtful = self._closed = False
        self._open, self._freed = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._context = 0
        self._door = COMPLETIONS
        self.facts: dict[str, Any] = {}

    @property
    def policy(self) -> Policy:
        return self.version.policy

    @property
    def version(self) -> Version:
        if self._version is None:
            raise EngineError("nothing has been published to this engine yet")
        return self._version

    @property
    def context_length(self) -> int:
        return self._context

    @property
    def available(self) -> bool:
        """Whether a request would be sampled at once, under the current weights, and not wait for a start."""
        return not (self._is_starting or self._doubtful) and self.server.alive and self._open.is_set()

    @property
    def _is_starting(self) -> bool:
        return self._starting is not None and not self._starting.done()

    @property
    def servers(self) -> list[VllmServer]:
        return [self.server]

    def begin(self) -> asyncio.Task[None]:
        """Starts the server before there are adapters to publish; `start` waits for it and raises what it raised."""
        self._booting = started(self._boot(self._served))
        return self._booting

    async def start(self, step: int, folder: Path) -> None:
        """Starts the server, where it has not begun, with the weights of `step` from `folder` (an adapter, or a whole model),
        which is then the engine's to remove."""
        self._version = Version(Policy(self._served.name, step), folder)
        if self._booting is not None:
            await self._booting
            self._doubtful = True  # it has no adapter yet
        await self.ready()

    async def ready(self) -> None:
        """Returns when a server has the current weights, which takes a minute where one died. The start is not the caller's: it
        goes on when a rollout runs out of time, and all that wait for it share its failure."""
        while not self.available:
            if self._closed:
                raise EngineError("the engine is closed")
            if not self._open.is_set():
                await self._open.wait()
                continue
            if self._starting is None or self._starting.done():
                self._starting = started(self._start())
            starting = self._starting
            try:
                await asyncio.shield(starting)
            except asyncio.CancelledError:
                if self._closed and starting.cancelled():
                    raise EngineError("the engine was closed while it started") from None
                raise

    async def sample(
        self, token_ids: Sequence[int], *, params: SamplingParams, stop: frozenset[int], shared: int = 0
    ) -> Completion:
        room = room_for(token_ids, self._context)
        version = await self._enter()
        door = self._door
        try:
            name = str(version.policy) if self._adapters else self._served.name
            limited = replace(params, max_tokens=min(params.max_tokens, room))
            asked = door.ask(name, token_ids, params=limited, stop=stop, step=version.policy.step)
            answer = await self._post(door.path, asked)
        finally:
            await self._leave(version)
        return door.read(answer, version.policy.step)

    async def publish(self, step: int, folder: Path) -> None:
        """Samples under `step`, with the weights in `folder`, from when this returns; the folder is then the engine's. Raises
        EngineError when a living server refuses an adapter, and where a dead one cannot be replaced."""
        await self.take(step, folder)
        await self.ready()

    async def make_room(self) -> None:
        """Returns when an adapter can be loaded: when few enough of those before the current one have requests left."""
        while len(self._older) >= ADAPTERS - 1:
            self._freed.clear()
            await self._freed.wait()

    async def take(self, step: int, folder: Path) -> None:
        """`publish` to a living server; to one that has died, or is starting, for when it is ready."""
        new, old = Version(Policy(self._served.name, step), folder), self.version
        if self._adapters:
            await self.make_room()
            try:
                if not self._is_starting:  # a start ends with the version that is current then
                    await self._tell_living(self._load, new)
            except TimeoutError:
                await self.server.end()  # it counts as dead: the next one begins with the new version
            self._version = new
        else:
            await self._replace(old, new)
        await self._retire(old)

    async def close(self) -> None:
        """Ends the server; requests in flight fail with EngineError. Folders of versions are left to their owner."""
        self._closed = True
        for task in (self._booting, self._starting):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        await self.server.close()

    async def _post(self, path: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            status, body = await self.server.ask(path, values)
        except EngineError:
            self._doubtful = True
            raise
        if status == HTTPStatus.OK:
            return json.loads(body) if body.startswith(b"{") else {}
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            self._doubtful = True
            raise EngineError(f"vLLM failed: {complaint(body)}: {self.server.last_words()}")
        raise EngineError(f"vLLM refused {path}: {complaint(body)}")

    async def _load(self, version: Version) -> None:
        name = str(version.policy)
        if name in self._unanswered:  # it may have it, and refuse to have it twice
            await self.server.ask("/v1/unload_lora_adapter", {"lora_name": name})
        self._unanswered.add(name)
        await self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(version.folder)})
        self._unanswered.remove(name)
        self._loaded.add(version)

    async def _unload(self, version: Version) -> None:
        if version in self._loaded:
            self._loaded.remove(version)
            await self._post("/v1/unload_lora_adapter", {"lora_name": str(version.policy)})

    async def _overwrite(self, version: Version) -> None:
        """Full weights, read by the server from their folder over those that it has."""
        self._loaded.clear()
        order = {"method": "reload_weights", "kwargs": {"weights_path": str(version.folder)}}
        await self._post("/collective_rpc", order)
        await self._post("/reset_prefix_cache", {})
        self._loaded.add(version)

    async def _tell_living(
        self, tell: Callable[[Version], Awaitable[None]], version: Version, *, seconds: float = PUBLISH_SECONDS
    ) -> None:
        """Changes what the server holds; in vain, and no failure, where it has died: the next one begins anew."""
        try:
            with anyio.fail_after(seconds):
                await tell(version)
        except (EngineError, TimeoutError):
            self._doubtful = True
            if await self.server.healthy():
                raise

    async def _enter(self) -> Version:
        """A living server, and the version that a request which begins now samples under; it counts until `_leave`."""
        await self.ready()
        return self.version.hold()

    async def _leave(self, version: Version) -> None:
        version.let_go()
        if version.retired and not version.requests:
            await self._remove(version)

    async def _retire(self, version: Version) -> None:
        version.retired = True
        self._older.add(version.hold())
        await self._leave(version)

    async def _remove(self, version: Version) -> None:
        """Nobody samples under `version` any more, and nobody will. A server that does not let go of it keeps a little memory;
        who happened to sample under it last, or publishes the next, has what they asked for."""
        with anyio.CancelScope(shield=True):
            try:
                if self._adapters:
                    await self._tell_living(self._unload, version, seconds=REMOVE_SECONDS)
            except (EngineError, TimeoutError) as error:
                say(f"vLLM keeps an adapter that nobody needs: {error}")
            finally:
                self._older.discard(version)
                self._freed.set()
                await asyncio.to_thread(shutil.rmtree, version.folder, ignore_errors=True)

    async def _replace(self, old: Version, new: Version) -> None:
        """Full weights: nothing is sampled while they change, and from then on only under the new name."""
        self._open.clear()
        try:
            await old.idle.wait()
            if self._starting is not None:
                await asyncio.wait([self._starting])  # it reads the old ones
            self._version = new
            # on a CPU vLLM packs the head's weights for itself, and goes on with those where they are tied to the embedding's
            if self.server.gpu and self.server.alive and not self._doubtful:
                await self._overwrite_or_end(new)
            else:
                await self.server.end()
        finally:
            self._open.set()

    async def _overwrite_or_end(self, version: Version) -> None:
        """A server that cannot take new weights where it is has to go: the next one reads them as its own."""
        try:
            await self._tell_living(self._overwrite, version)
        except (EngineError, TimeoutError) as error:
            say(f"vLLM is started anew, since it does not take new weights in place: {error}")
            await self.server.end()

    async def _start(self) -> None:
        if not self.server.alive or (self._doubtful and not await self.server.healthy()):
            await self.server.end()
            self._loaded.clear()
            self._unanswered.clear()
            version = self.version
            await self._boot(self._served if self._adapters else replace(self._served, model=str(version.folder)))
            if not self._adapters:
                self._loaded.add(version)
        self._doubtful = True  # until it has the current version, which may be another by now
        while self.version not in self._loaded:
            version = self.version.hold()
            try:
                await (self._load if self._adapters else self._overwrite)(version)
            finally:
                await self._leave(version)
        self._doubtful = False

    async def _boot(self, served: Served) -> None:
        await self.server.start(served)
        await self._look()

    async def _look(self) -> None:
        """What the server says of itself."""
        _, models = await self.server.connections.get("/v1/models")
        _, version = await self.server.connections.get("/version")
        self._context = int(json.loads(models)["data"][0]["max_model_len"])
        one = TOKENS.ask(self._served.name, [0], params=SamplingParams(max_tokens=1), stop=frozenset(), step=-1)
        self._door = TOKENS if serves_tokens(*await self.server.ask(TOKENS.path, one)) else COMPLETIONS
        self.facts = {
            "engine": "vllm",
            "vllm": json.loads(version)["version"],
            "engine_args": dict(self._settings.args),
            "engine_command": self.server.command,
            "engine_door": self._door.path,
        }
