"""A Sampler in this process: one thread owns torch, requests join and leave its batches as they come, exclusive work
(a training step, a checkpoint) runs on the same thread when nothing is being sampled."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from art_mcp.errors import EngineError
from art_mcp.sampling.batch import Batch, Histories, Row, draw_uniforms
from art_mcp.sampling.decoder import Decoder, Prefix, compute_prefix
from art_mcp.types import Completion, Policy, SamplingParams, Span

Result = TypeVar("Result")

LINGER_SECONDS = 0.002
"""How long an idle engine waits for company after the first request: rollouts start in crowds."""
PATIENCE = 4
"""Decoding steps after which a waiting request joins, however few wait with it."""
PREFIXES = 8
"""Shared prefixes (one for each toolbox in use) that are kept."""


@dataclass(slots=True)
class Request:
    prefix: tuple[int, ...]
    row: Row
    future: Future[Completion] = field(default_factory=Future)


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
        max_batch: int = 128,
        history_tokens: int = 65536,
        deterministic: bool = False,
    ) -> None:
        self._decoder, self._dtype, self._policy = decoder, dtype, policy
        self._context, self._history_tokens, self._deterministic = context_length, history_tokens, deterministic
        self._max_batch = 1 if deterministic else max_batch
        self._lanes: OrderedDict[tuple[int, ...], Lane] = OrderedDict()
        self._waiting: deque[Request] = deque()
        self._active: dict[int, Request] = {}
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._closing, self._patience = False, 0
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
        room = self._context - len(token_ids)
        if room <= 0 or not token_ids:
            raise EngineError(f"a prompt of {len(token_ids)} tokens does not fit a context of {self._context} tokens")
        limit = min(params.max_tokens, room)
        prefix = tuple(token_ids[: min(shared, len(token_ids) - 1)])
        prompt = tuple(token_ids[len(prefix) :])
        row = Row(prompt, limit, params.temperature, stop, draw_uniforms(params.seed, limit))
        request = Request(prefix, row)
        self._enqueue(lambda: self._waiting.append(request))
        try:
            return await asyncio.wrap_future(request.future)
        except asyncio.CancelledError:
            row.cancelled = True
            raise

    async def exclusive(self, work: Callable[[], Result]) -> Result:
        """Runs `work` on the engine's thread when all requests before it are answered; later ones wait."""
        future: Future[Result] = Future()
        self._enqueue(lambda: self._jobs.append((work, future)))
        return await asyncio.wrap_future(future)

    def publish(self, step: int) -> None:
        """Samples under `step` from now on; everything computed under the old weights is forgotten. Exclusive work only."""
        self._policy = Policy(self._policy.name, step)
        self._lanes.clear()

    def close(self) -> None:
        """Ends the thread; requests in flight fail with EngineError."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _enqueue(self, add: Callable[[], None]) -> None:
        with self._wake:
            if self._closing:
                raise EngineError("the engine is closed")
            add()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="art-mcp-engine", daemon=True)
                self._thread.start()
            self._wake.notify()

    def _work(self) -> None:
        try:
            while self._turn():
                pass
            self._fail(EngineError("the engine was closed while sampling"))
        except BaseException as error:  # noqa: BLE001  handed on to every caller that waits: nobody else would see it
            self._closing = True
            self._fail(error)

    def _turn(self) -> bool:
        """One round: wait for work, do exclusive work when drained, admit, decode a step. False when closing."""
        with self._wake:
            idle = not self._active
            while idle and not (self._waiting or self._jobs or self._closing):
                self._wake.wait()
            if self._closing:
                return False
            if idle and self._waiting and not self._jobs:
                self._wake.wait(LINGER_SECONDS)
            job = self._jobs.popleft() if idle and self._jobs else None
            admitted = [] if job or self._jobs else self._admit()
        if job:
            run(*job)
            return True
        with torch.inference_mode():
            self._prefill(admitted)
            for lane in list(self._lanes.values()):
                if lane.batch is not None:
                    self._step(lane)
        return True

    def _admit(self) -> list[Request]:
        self._patience += 1
        room = self._max_batch - len(self._active)
        enough = len(self._waiting) >= max(1, len(self._active) // 4) or self._patience >= PATIENCE
        if not (room > 0 and self._waiting and enough):
            return []
        self._patience = 0
        taken = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        return [request for request in taken if request.future.set_running_or_notify_cancel()]

    def _prefill(self, requests: Sequence[Request]) -> None:
        by_prefix: dict[tuple[int, ...], list[Request]] = {}
        for request in requests:
            by_prefix.setdefault(request.prefix, []).append(request)
        for prefix, group in by_prefix.items():
            lane = self._lane(prefix)
            batch = Batch(self._decoder, lane.prefix, self._dtype)
            batch.prefill([request.row for request in group], lane.histories)
            self._active.update((id(request.row), request) for request in group)
            if lane.batch is None:
                lane.batch = batch
            else:
                lane.batch.drop_finished()
                lane.batch.merge(batch)

    def _lane(self, prefix: tuple[int, ...]) -> Lane:
        if prefix not in self._lanes:
            histories = None if self._deterministic else Histories(self._history_tokens)
            self._lanes[prefix] = Lane(compute_prefix(self._decoder, list(prefix), self._dtype), histories)
            idle = [key for key, lane in self._lanes.items() if lane.batch is None and key != prefix]
            for key in idle[: max(0, len(self._lanes) - PREFIXES)]:
                del self._lanes[key]
        self._lanes.move_to_end(prefix)
        return self._lanes[prefix]

    def _step(self, lane: Lane) -> None:
        assert lane.batch is not None
        lane.batch.step()
        self._answer(lane.batch, lane.histories)
        finished = sum(row.finished for row in lane.batch.rows)
        if finished == len(lane.batch.rows):
            lane.batch = None
        elif finished * 4 >= len(lane.batch.rows):
            lane.batch.drop_finished()

    def _answer(self, batch: Batch, histories: Histories | None) -> None:
        for number, row in enumerate(batch.rows):
            if row.finished and (request := self._active.pop(id(row), None)):
                if histories is not None and row.stopped:
                    batch.keep(number, histories)
                self.sampled_tokens += len(row.sampled)
                span = Span(tuple(row.sampled), tuple(row.logprobs), self._policy.step)
                request.future.set_result(Completion(span, row.stopped))

    def _fail(self, error: BaseException) -> None:
        for request in (*self._active.values(), *self._waiting):
            if not request.future.done():
                request.future.set_exception(error)
        for _, future in self._jobs:
            future.set_exception(error)


def run(work: Callable[[], Any], future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:  # noqa: BLE001  handed on to the caller that waits for this work
        future.set_exception(error)
    else:
        future.set_result(result)
