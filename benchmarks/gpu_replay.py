"""What the rollouts asked of the engine, and the same requests sent to it again without tools: the raw speed of vLLM."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import anyio
import psutil

from art_mcp.model import TrainableModel
from art_mcp.ports import Sampler
from art_mcp.sampling.vllm_messages import COMPLETIONS, TOKENS
from art_mcp.types import Completion, ModelSpec, Policy, SamplingParams


@dataclass(frozen=True, slots=True)
class Request:
    token_ids: Sequence[int]
    sampled: int
    seed: int
    began: float
    ended: float


class Recording:
    """A Sampler that tells what it is asked, once it has answered."""

    def __init__(self, sampler: Sampler, tell: Callable[[Request], None]) -> None:
        self._sampler, self._tell = sampler, tell

    @property
    def policy(self) -> Policy:
        return self._sampler.policy

    @property
    def context_length(self) -> int:
        return self._sampler.context_length

    async def sample(
        self, token_ids: Sequence[int], *, params: SamplingParams, stop: frozenset[int], shared: int = 0
    ) -> Completion:
        began = time.monotonic()
        completion = await self._sampler.sample(token_ids, params=params, stop=stop, shared=shared)
        taken = Request(tuple(token_ids), len(completion.span.token_ids), params.seed, began, time.monotonic())
        self._tell(taken)
        return completion


class Recorded(TrainableModel[None]):
    """A model whose requests are kept in `requests`, until somebody forgets them; `sampled` tokens were answered to all."""

    requests: list[Request]
    sampled = 0

    @classmethod
    def of(cls, spec: ModelSpec) -> Recorded:
        model = cls(name="policy", spec=spec)
        model.requests = []
        return model

    def sampler(self) -> Sampler:
        return Recording(super().sampler(), self.keep)

    def keep(self, request: Request) -> None:
        self.requests.append(request)
        self.sampled += request.sampled


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def tool_processes() -> list[psutil.Process]:
    """Those under this one that hold connections to tool servers, without their launchers."""
    found: list[psutil.Process] = []
    for one in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            line = one.cmdline()
            if "art_mcp.tools.holder" in line and "-S" not in line:
                found.append(one)
    return found


def cpu_seconds_of(processes: Sequence[psutil.Process]) -> float:
    """Of those that are still there."""
    used = 0.0
    for one in processes:
        with suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            used += times.user + times.system
    return used


async def replay(requests: Sequence[Request], *, worker: Any, concurrency: int) -> dict[str, float]:
    """The requests again, in the order in which they began, straight to vLLM's port, through the engine's own door; in turn
    where there are several servers."""
    await worker.ready()
    servers = [server.connections for server in worker.engine.servers]
    door = TOKENS if worker.facts["engine_door"] == TOKENS.path else COMPLETIONS
    waiting = iter(sorted(requests, key=lambda request: request.began))
    name = str(worker.policy) if worker.facts["lora"] else worker.policy.name
    salt = f"replay {time.monotonic()}"
    failed: list[str] = []

    async def send(number: int) -> None:
        connections = servers[number % len(servers)]
        for request in waiting:
            params = SamplingParams(request.sampled, 1.0, request.seed)
            values = {**door.ask(name, request.token_ids, params=params, stop=frozenset(), step=0), "cache_salt": salt}
            status, body = await connections.post(door.path, values)
            if status != 200:
                failed.append(body[:200].decode(errors="replace"))

    began, cpu = time.monotonic(), cpu_seconds()
    async with anyio.create_task_group() as tasks:
        for number in range(concurrency):
            tasks.start_soon(send, number)
    seconds = time.monotonic() - began
    if failed:
        raise SystemExit(f"{len(failed)} of {len(requests)} replayed requests failed: {failed[0]}")
    tokens = sum(request.sampled for request in requests)
    return {
        "seconds": seconds,
        "sampled_tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "client_cpu": (cpu_seconds() - cpu) / seconds,
    }


async def first_token(model: TrainableModel[Any], prompt: Sequence[int]) -> float:
    """Seconds until one token of the policy that was just published is there."""
    began = time.monotonic()
    await model.backend.sampler(model).sample(prompt, params=SamplingParams(max_tokens=1), stop=frozenset())
    return time.monotonic() - began
