"""A Sampler in this process: one thread owns torch, requests join and leave its batches as they come, exclusive work
(a training step, a checkpoint) runs on the same thread when nothing is being sampled."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import torch

from art_mcp.errors import EngineError, describe
from art_mcp.sampling.batch import Batch, Histories, Row, draw_uniforms
from art_mcp.sampling.decoder import Decoder, Prefix, compute_prefix, on
from art_mcp.sampling.room import room_for
from art_mcp.types import Completion, Policy, SamplingParams, Span

Result = TypeVar("Result")

LINGER_SECONDS = 0.002
"""How long an idle engine waits for company after the first request: rollouts start in crowds."""
PATIENCE = 4
"""Decoding steps after which a waiting request joins, however few wait with it."""
PREFIXES = 8
"""Shared prefixes (one for each toolbox in use) that are kept."""
HISTORY_BYTES = 2**30
"""Memory for the keys and values of finished turns, over all prefixes."""


@dataclass(slots=True)
class Request:
    prefix: tuple[int, ...]
    row: Row
    future: Future[Completion] = field(default_factory=Future[Completion])


@dataclass(slots=True)
class Job:
    """Exclusive work: it waits for the requests before it, and those after it wait for it."""

    work: Callable[[], Any]
    future: Future[Any]


Waiting: TypeAlias = Request | Job


@dataclass(slots=True)
class Lane:
    """All that is sampled on one shared prefix."""

    prefix: Prefix
    histories: Histories | None
    batch: Batch | None = None


class TransformersEngine:
    """Continuous batching on a `Decoder`.

    With `deterministic`, rows are computed one at a time and nothing is carried from turn to turn, so that a token depends
    on its prompt and its seed alone, never on what else was in flight: the last bits of a matrix product depend on its size.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        policy: Policy,
        context_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        max_batch: int = 128,
        history_tokens: int | None = None,
        deterministic: bool = False,
        threads: int | None = None,
    ) -> None:
        self._decoder, self._dtype, self._policy, self._threads = decoder, dtype, policy, threads
        self._device = device or torch.device("cpu")
        self._context, self._deterministic = context_length, deterministic
        self._max_batch = 1 if deterministic else max_batch
        token_bytes = 2 * math.prod(decoder.kv_shape) * dtype.itemsize
        self._history_tokens = HISTORY_BYTES // token_bytes if history_tokens is None else history_tokens
        self._lanes: OrderedDict[tuple[int, ...], Lane] = OrderedDict()
        self._waiting: deque[Waiting] = deque()
        self._active: dict[int, Request] = {}
        self._cancelled: list[Request] = []
        self._wake = threading.Condition()
        self._ended, self._patience = "", 0
        self._thread: threading.Thread | None = None
        self.sampled_tokens = 0

    @property
    def policy(self) -> Policy:
        return self._policy

    @property
    def context_length(self) -> int:
        return self._context

    async def sample(
        self, token_ids: Sequence[int], *, params: SamplingParams, stop: frozenset[int], shared: int = 0
    ) -> Completion:
        room = room_for(token_ids, self._context)
        if not 0 <= min(token_ids) <= max(token_ids) < self._decoder.vocabulary:
            raise EngineError(f"a prompt has a token outside the {self._decoder.vocabulary} of the model: another tokenizer?")
        limit = min(params.max_tokens, room)
        prefix = tuple(token_ids[: min(shared, len(token_ids) - 1)])
        prompt = tuple(token_ids[len(prefix) :])
        row = Row(prompt, limit, params.temperature, stop, draw_uniforms(params.seed, limit))
        request = Request(prefix, row)
        self._enqueue(request)
        try:
            return await asyncio.wrap_future(request.future)
        except asyncio.CancelledError:
            with self._wake:
                self._cancelled.append(request)
            raise

    async def exclusive(self, work: Callable[[], Result]) -> Result:
        """Runs `work` on the engine's thread when all requests before it are answered; later ones wait. Work that has begun
        goes on to its end even if the caller is cancelled."""
        future: Future[Result] = Future()
        self._enqueue(Job(work, future))
        return await asyncio.wrap_future(future)

    def publish(self, step: int) -> None:
        """Samples under `step` from now on; everything computed under the old weights is forgotten. Exclusive work only."""
        self._policy = Policy(self._policy.name, step)
        self._lanes.clear()

    def close(self) -> None:
        """Ends the thread; requests in flight fail with EngineError."""
        with self._wake:
            self._ended = self._ended or "the engine is closed"
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _enqueue(self, item: Waiting) -> None:
        with self._wake:
            if self._ended:
                raise EngineError(self._ended)
            self._waiting.append(item)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="art-mcp-engine", daemon=True)
                self._thread.start()
            self._wake.notify()

    def _work(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        try:
            while self._turn():
                pass
            self._fail(EngineError("the engine was closed while sampling"))
        except BaseException as error:  # noqa: BLE001  handed on to every caller that waits: nobody else would see it
            with self._wake:
                self._ended = f"the engine has failed: {describe(error)}"
            self._fail(error)

    def _turn(self) -> bool:
        """One round: wait for work, do exclusive work when drained, admit, decode a step. False when closing."""
        with self._wake:
            while not (self._active or self._waiting or self._ended):
                self._wake.wait()
            if not (self._active or self._ended or isinstance(self._waiting[0], Job)):
                self._wake.wait(LINGER_SECONDS)
            if self._ended:
                return False
            self._release()
            job = self._next_job()
            admitted = [] if job else self._admit()
        if job:
            run(job)
            return True
        with on(self._device), torch.inference_mode():
            self._prefill(admitted)
            for lane in self._lanes.values():
                if lane.batch is not None:
                    self._step(lane)
        return True

    def _release(self) -> None:
        """Frees the rows of cancelled requests. Only here, for nothing may finish between two looks at a batch."""
        if not self._cancelled:
            return
        for request in self._cancelled:
            request.row.cancelled = True
            self._active.pop(id(request.row), None)
        self._cancelled.clear()
        for lane in self._lanes.values():
            if lane.batch is not None and all(row.finished for row in lane.batch.rows):
                lane.batch = None

    def _next_job(self) -> Job | None:
        if self._active or not self._waiting or not isinstance(job := self._waiting[0], Job):
            return None
        self._waiting.popleft()
        return job

    def _admit(self) -> list[Request]:
        """Takes what waits before the next exclusive work. What it returns is active: a failure from here on reaches it."""
        self._patience += 1
        enough = len(self._waiting) >= max(1, len(self._active) // 4) or self._patience >= PATIENCE
        admitted: list[Request] = []
        while enough and self._waiting and len(self._active) < self._max_batch:
            request = self._waiting[0]
            if isinstance(request, Job):
                break
            self._waiting.popleft()
            self._patience = 0
            if request.future.set_running_or_notify_cancel():
                self._active[id(request.row)] = request
                admitted.append(request)
        return admitted

    def _prefill(self, requests: Sequence[Request]) -> None:
        by_prefix: dict[tuple[int, ...], list[Request]] = {}
        for request in requests:
            by_prefix.setdefault(request.prefix, []).append(request)
        for prefix, group in by_prefix.items():
            lane = self._lane(prefix)
            batch = Batch(self._decoder, lane.prefix, self._dtype)
            batch.prefill([request.row for request in group], lane.histories)
            if lane.batch is None:
                lane.batch = batch
            else:
                lane.batch.merge(batch)

    def _lane(self, prefix: tuple[int, ...]) -> Lane:
        if prefix not in self._lanes:
            histories = None if self._deterministic else Histories()
            self._lanes[prefix] = Lane(compute_prefix(self._decoder, list(prefix), self._dtype), histories)
            idle = [key for key, lane in self._lanes.items() if lane.batch is None and key != prefix]
            for key in idle[: max(0, len(self._lanes) - PREFIXES)]:
                del self._lanes[key]
        self._lanes.move_to_end(prefix)
        return self._lanes[prefix]

    def _step(self, lane: Lane) -> None:
        assert lane.batch is not None
        finished = lane.batch.step(lane.histories)
        if finished:
            self._forget()
        for row in finished:
            request = self._active.pop(id(row), None)
            if request is not None:
                self.sampled_tokens += len(row.sampled)
                span = Span(tuple(row.sampled), tuple(row.logprobs), self._policy.step)
                request.future.set_result(Completion(span, row.stopped))
        if not lane.batch.rows:
            lane.batch = None

    def _forget(self) -> None:
        """Keeps all histories together within their memory; those of the prefix used longest ago go first."""
        excess = sum(lane.histories.tokens for lane in self._lanes.values() if lane.histories) - self._history_tokens
        for lane in self._lanes.values():
            if excess > 0 and lane.histories:
                excess -= lane.histories.forget(excess)

    def _fail(self, error: BaseException) -> None:
        with self._wake:
            waiting = [item.future for item in self._waiting if item.future.set_running_or_notify_cancel()]
            for future in (*(request.future for request in self._active.values()), *waiting):
                future.set_exception(error)
            self._waiting.clear()
            self._active.clear()
            self._lanes.clear()


def run(job: Job) -> None:
    if not job.future.set_running_or_notify_cancel():
        return
    try:
        result = job.work()
    except BaseException as error:  # noqa: BLE001  handed on to the caller that waits for this work
        job.future.set_exception(error)
    else:
        job.future.set_result(result)
