"""LocalBackend: samples and trains models on this machine. Which process does it is decided here; how, in `worker`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import anyio
import torch

from art_mcp.core.samples import make_samples
from art_mcp.errors import ModelError
from art_mcp.local.models import load_dialect
from art_mcp.local.remote import RemoteWorker
from art_mcp.local.worker import Settings, Worker
from art_mcp.ports import Dialect, Sampler, Trainable
from art_mcp.types import ModelSpec, Sample, TrainConfig, TrajectoryGroup


class AnyWorker(Sampler, Protocol):
    """A Worker, here or in a child process."""

    facts: dict[str, Any]
    step: int

    async def train(self, samples: Sequence[Sample], config: TrainConfig) -> dict[str, float]: ...

    async def save(self, folder: Path) -> None: ...

    async def close(self) -> None: ...


class LocalBackend:
    """Samples and trains on this machine: transformers and torch on a CPU.

    `in_process`: in this process (easy to debug, nothing is spawned) or in a child that is supervised and ends with this
    process, however that ends; default: here on a CPU, in a child with a GPU. Both give the same numbers.
    `deterministic`: the same seed gives the same trajectories, to the last bit; rows are computed one at a time, so it is
    several times slower. `threads`: torch's threads (default: all cores, but one for sampling a model under 10 M parameters).

    Use it as `async with LocalBackend() as backend:`, or call `close()`.
    """

    def __init__(
        self,
        *,
        in_process: bool | None = None,
        deterministic: bool = False,
        max_batch: int = 128,
        threads: int | None = None,
    ) -> None:
        self.in_process = not torch.cuda.is_available() if in_process is None else in_process
        self._settings = Settings(deterministic, max_batch, threads)
        self._workers: dict[str, AnyWorker] = {}
        self._dialects: dict[str, Dialect] = {}

    async def __aenter__(self) -> LocalBackend:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def register(self, trainable: Trainable) -> None:
        """Loads the model, its tokenizer and its template. Raises ModelError, and TemplateError for a template that cannot be
        bridged exactly."""
        if trainable.name in self._workers:
            raise ModelError(f"a model named {trainable.name!r} is registered already: give this one another name")
        self._dialects[trainable.name] = await asyncio.to_thread(load_dialect, trainable.spec)
        self._workers[trainable.name] = await asyncio.to_thread(self._start, trainable.name, trainable.spec)

    def _start(self, name: str, spec: ModelSpec) -> AnyWorker:
        return Worker(name, spec, self._settings) if self.in_process else RemoteWorker(name, spec, self._settings)

    async def train(self, trainable: Trainable, groups: Sequence[TrajectoryGroup], *, config: TrainConfig) -> dict[str, float]:
        """One optimizer step on `groups`, then the new policy is published. Raises TrainError for groups without spans."""
        worker = self._worker(trainable)
        return await worker.train(make_samples(groups, config, step=worker.step), config)

    async def get_step(self, trainable: Trainable) -> int:
        return self._worker(trainable).step

    def sampler(self, trainable: Trainable) -> Sampler:
        return self._worker(trainable)

    def dialect(self, trainable: Trainable) -> Dialect:
        self._worker(trainable)
        return self._dialects[trainable.name]

    async def save(self, trainable: Trainable, folder: str) -> None:
        """Writes a checkpoint, aside first: weights and tokenizer as a Hugging Face folder, optimizer, RNG, step."""
        await self._worker(trainable).save(Path(folder))

    def facts(self, trainable: Trainable) -> dict[str, Any]:
        """What was really loaded, for the manifest."""
        return {**self._worker(trainable).facts, "in_process": self.in_process}

    async def close(self) -> None:
        """Ends the engines and the child processes, even when the caller is being cancelled."""
        with anyio.CancelScope(shield=True):
            while self._workers:
                _, worker = self._workers.popitem()
                await worker.close()

    def _worker(self, trainable: Trainable) -> AnyWorker:
        worker = self._workers.get(trainable.name)
        if worker is None:
            raise ModelError(f"model {trainable.name!r} is not registered here: `await model.register(backend)` first")
        return worker
