"""A worker whose samples come from vLLM and whose gradients come from a trainer elsewhere: it carries the weights across."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from time import monotonic
from typing import Any, Protocol, TypeVar

import anyio
import torch

from art_mcp.errors import EngineError
from art_mcp.local.models import adapter_lora, base_of, dtype_of
from art_mcp.local.share import settings_beside
from art_mcp.local.versions import Versions
from art_mcp.sampling.vllm_args import Served, VllmSettings
from art_mcp.sampling.vllm_replicas import Engine, open_engine
from art_mcp.sampling.vllm_server import in_thread, say, started
from art_mcp.types import Completion, ModelSpec, Policy, Sample, SamplingParams, TrainConfig

PATIENCE_SECONDS = 10.0
"""Turns begin again after so long, should an engine take longer for the new weights than any takes that is well."""
ANSWER_SECONDS = 1.0
"""Answers are handed on after so long: their tools may take longer than a large model's weights, and can run meanwhile."""

APART = 0.1
"""Nats a token between the engine's log probabilities and the trainer's, in the mean of a step, from which the engine is taken
to compute something else. In half precision .002 to .02 is usual, .05 where the policy changes fast and rollouts are two steps
old; an engine with wrong graphs was .3 apart (docs/results/2026-11-28-gpu-thirteenth.md)."""
CLOSE_SECONDS = 10.0
"""How long closing waits for a step that is under way, which fails when its trainer is gone."""


class Trains(Protocol):
    """What a worker of any kind does beside sampling."""

    async def train(self, samples: Sequence[Sample], config: TrainConfig) -> dict[str, float]: ...

    async def imitate(self, samples: Sequence[Sample], config: TrainConfig) -> dict[str, float]: ...

    async def reset_optimizer(self) -> None: ...

    async def save(self, folder: Path) -> None: ...

    async def close(self) -> None: ...


Loaded = TypeVar("Loaded", bound=Trains)


class Learner(Trains, Protocol):
    """What trains: a Worker or a RemoteWorker, of which nothing is sampled."""

    facts: dict[str, Any]
    step: int

    async def write_weights(self, folder: Path) -> None: ...


class Gate:
    """Open, but for the time of a publication; a client with hundreds of rollouts in flight passes it on every turn."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()

    async def passed(self) -> None:
        await self._open.wait()

    @contextmanager
    def closed(self, patience: float) -> Generator[None]:
        """Nobody passes within the block, or for so many seconds of it."""
        self._open.clear()
        opening = asyncio.get_running_loop().call_later(patience, self._open.set)
        try:
            yield
        finally:
            opening.cancel()
            self._open.set()


class ServedWorker:
    """An engine and a learner with weights of their own. What is sampled is always the learner's policy of that moment: after
    `train` it is published at once, after a supervised step when somebody samples. `open_served` makes one."""

    def __init__(self, engine: Engine, learner: Learner, versions: Versions) -> None:
        self.engine, self.learner, self._versions = engine, learner, versions
        self._stale = False
        self._changing = asyncio.Lock()
        self._turns, self._answers = Gate(), Gate()
        self._publishing: asyncio.Task[None] | None = None
        self._told_apart = False

    @property
    def facts(self) -> dict[str, Any]:
        return {**self.learner.facts, **self.engine.facts}

    @property
    def step(self) -> int:
        return self.learner.step

    @property
    def policy(self) -> Policy:
        """What the next turn is sampled under."""
        policy = self.engine.policy
        return Policy(policy.name, self.step) if self._stale else policy

    @property
    def context_length(self) -> int:
        return self.engine.context_length

    async def sample(
        self, token_ids: Sequence[int], *, params: SamplingParams, stop: frozenset[int], shared: int = 0
    ) -> Completion:
        await self._catch_up()
        completion = await self.engine.sample(token_ids, params=params, stop=stop, shared=shared)
        await self._answers.passed()
        return completion

    async def train(self, samples: Sequence[Sample], config: TrainConfig) -> dict[str, float]:
        """One step, after which the new policy is published; what is in flight ends under the old one. `seconds_publish` of
        the metrics is from the last gradient until requests are sampled under the new policy; of it, `seconds_held` was spent
        waiting for requests under older ones (an engine holds three), `seconds_write` writing the weights, the rest until the
        engine has read them (both absent where it could not). An engine that cannot have them is told, and the step stands:
        whoever samples next tries it again, and has the failure."""
        return await asyncio.shield(self._train(samples, config))

    async def imitate(self, samples: Sequence[Sample], config: TrainConfig) -> dict[str, float]:
        """One supervised step on demonstrations. Nobody samples between two of them, so the new policy is published when
        somebody does."""
        return await asyncio.shield(self._imitate(samples, config))

    async def ready(self) -> None:
        """Returns when there is a server with the current policy: a new one, where it died and no replica of it is left."""
        await self._catch_up()
        await self.engine.ready()

    async def reset_optimizer(self) -> None:
        await self.learner.reset_optimizer()

    async def save(self, folder: Path) -> None:
        await self.learner.save(folder)

    async def close(self) -> None:
        try:
            await self.engine.close()
        finally:
            await self.learner.close()
            with anyio.move_on_after(CLOSE_SECONDS):
                async with self._changing:  # what a cancelled caller left under way fails now, and then writes nothing more
                    pass
            self._versions.cleanup()

    async def _train(self, samples: Sequence[Sample], config: TrainConfig) -> dict[str, float]:
        async with self._changing:
            metrics = await self.learner.train(samples, config)
            began = monotonic()
            try:
                metrics |= await self._publish()
            except EngineError as failure:
                say(f"step {self.step} is not published yet: {failure}")
            seconds = monotonic() - began
        self._tell_if_apart(metrics.get("mismatch", 0.0))
        return {**metrics, "seconds_publish": seconds}

    def _tell_if_apart(self, mismatch: float) -> None:
        """Once: whoever trains on what this engine did not sample knows why."""
        if mismatch > APART and not self._told_apart:
            self._told_apart = True
            say(
                f"note: the sampled tokens' log probabilities are {mismatch:.2f} nats from the trainer's in the mean, where "
                "0.05 is much: if this engine has just sampled them, it computes something else than is trained; try it "
                "without engine_args, or with enforce_eager"
            )

    async def _imitate(self, samples: Sequence[Sample], config: TrainConfig) -> dict[str, float]:
        async with self._changing:
            metrics = await self.learner.imitate(samples, config)
            self._stale = True
        return metrics

    async def _catch_up(self) -> None:
        """Publishes what the learner has, unless it is published: once, however many wait for it, and to its end, should who
        asked first go away."""
        await self._turns.passed()
        while self._stale:
            if self._publishing is None or self._publishing.done():
                self._publishing = started(self._publish_later())  # where it fails, the next who asks tries again
            await asyncio.shield(self._publishing)
            await self._turns.passed()

    async def _publish_later(self) -> None:
        async with self._changing:  # a step that has begun ends first, and is published with what came before
            if self._stale:
                await self._publish()

    async def _publish(self) -> dict[str, float]:
        """Afterwards learner and engine are equal; where it fails, whoever samples next tries it again. Returns what took how
        long."""
        began, equal = monotonic(), False
        try:
            await self.engine.make_room()
            room = monotonic()
            with self._rollouts_held_back():
                folder = await write_version(self.learner, self._versions)
                written = monotonic()
                await self.engine.publish(self.step, folder)
            equal = True
        finally:
            self._stale = not equal
        return {"seconds_held": room - began, "seconds_write": written - room}

    @contextmanager
    def _rollouts_held_back(self) -> Generator[None]:
        """Nobody begins a turn, and no answer is handed on: a client with hundreds of rollouts in flight has so much to do that
        each step of a publication would wait for its turn among them, longer than it takes; and what begins a moment later is
        of the new policy."""
        with self._turns.closed(PATIENCE_SECONDS), self._answers.closed(ANSWER_SECONDS):
            yield


async def open_served(name: str, spec: ModelSpec, load: Callable[[], Learner], settings: VllmSettings) -> ServedWorker:
    """Starts vLLM with the weights of the learner that `load` makes in a thread. Adapters are served on a base that is known
    beforehand, so both start at the same time there, if a GPU is known to hold both (`share`). Raises what either raises, with
    both closed."""
    ahead = served_ahead(name, spec)
    versions = Versions(in_memory=ahead is not None)
    async with AsyncExitStack() as unfinished:
        unfinished.callback(versions.cleanup)
        beside = None if ahead is None else await asyncio.to_thread(settings_beside, ahead, settings)
        engine = None if ahead is None or beside is None else open_engine(ahead, beside)
        if engine is not None:
            unfinished.push_async_callback(engine.close)
            engine.begin()
        loaded: list[Learner] = []
        unfinished.push_async_callback(close_all, loaded)
        await in_thread(lambda: loaded.append(load()))
        learner = loaded[0]
        served = served_of(name, spec, learner)
        if engine is None or served != ahead:
            # what was loaded is not what was foreseen
            if engine is not None:
                await engine.close()
            engine = open_engine(served, settings)
        worker = ServedWorker(engine, learner, versions)
        unfinished.pop_all()
        unfinished.push_async_callback(worker.close)
        await worker.engine.start(learner.step, await write_version(learner, versions))
        unfinished.pop_all()
    return worker


async def loaded_by(load: Callable[[], Loaded]) -> Loaded:
    """What `load` makes in a thread; closed where the caller was cancelled meanwhile, for nobody else has it."""
    async with AsyncExitStack() as unfinished:
        loaded: list[Loaded] = []
        unfinished.push_async_callback(close_all, loaded)
        await in_thread(lambda: loaded.append(load()))
        unfinished.pop_all()
    return loaded[0]


async def close_all(learners: Sequence[Trains]) -> None:
    with anyio.CancelScope(shield=True):
        for learner in learners:
            await learner.close()


def served_ahead(name: str, spec: ModelSpec) -> Served | None:
    """What will be served of `spec`, as far as its adapters say before anything is loaded; None for full weights, whose first
    version is the learner's to write."""
    adapters = adapter_lora(spec.source)
    lora = spec.lora if adapters is None else adapters
    if lora is None:
        return None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = str(dtype_of(spec, device)).removeprefix("torch.")
    return Served(name, base_of(spec.source), dtype=dtype, lora_rank=lora.rank)


def served_of(name: str, spec: ModelSpec, learner: Learner) -> Served:
    lora = learner.facts["lora"]
    rank = None if lora is None else int(lora["rank"])
    return Served(name, base_of(spec.source), dtype=str(learner.facts["dtype"]), lora_rank=rank)


async def write_version(learner: Learner, versions: Versions) -> Path:
    """The learner's weights in a folder that no earlier version had: engines take a path for what was once read from it."""
    folder = versions.path / f"{learner.step}-{os.urandom(4).hex()}"
    await learner.write_weights(folder)
    return folder
