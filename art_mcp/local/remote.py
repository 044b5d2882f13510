"""A Worker in a child process, spoken to in JSON lines over its stdin and stdout; both ends are here.

Numbers cross exactly (floats in their shortest form, those of samples as bytes), so both modes give the same ones. The child's
log goes to our stderr.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import traceback
from array import array
from base64 import b64decode, b64encode
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeAlias, cast

import anyio

from art_mcp.child import ending, launch_command, module_command
from art_mcp.errors import EngineError, describe, rebuilt
from art_mcp.local.worker import WORKSPACE, WORKSPACES, Settings, Worker
from art_mcp.types import Completion, LoraSpec, ModelSpec, Policy, Sample, SamplingParams, Span, TrainConfig

CLOSE_SECONDS = 10.0
Learn: TypeAlias = Callable[[Sequence[Sample], TrainConfig], Awaitable[dict[str, float]]]


class RemoteWorker:
    """The parent's end: a Worker whose every operation is a message to the child and a future here.

    Raises what the child raised, by name; EngineError for every operation when the child has ended.
    """

    def __init__(self, name: str, spec: ModelSpec, settings: Settings) -> None:
        argv, needed = module_command("art_mcp.local.remote")
        command = launch_command(argv[0], argv[1:])
        fixed = {WORKSPACE: WORKSPACES[0]} if settings.deterministic else {}
        environment = {**fixed, **os.environ, **needed}
        # in a session of its own: Ctrl-C reaches us alone, and the child lives until its checkpoint is written
        self._process = subprocess.Popen(
            [command[0], *command[1]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        self._futures: dict[int, Future[dict[str, Any]]] = {}
        self._numbers = count()
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._ended = ""
        for work in (self._write, self._read):
            threading.Thread(target=work, name="art-mcp-worker-pipe", daemon=True).start()
        with ExitStack() as unfinished:
            unfinished.callback(self._outbox.put, None)
            started = self._send("start", name=name, spec=asdict(spec), settings=asdict(settings))[1].result()
            unfinished.pop_all()
        self.facts: dict[str, Any] = started["facts"]
        self.context_length: int = started["context_length"]
        self.step: int = started["step"]
        self._name = name

    @property
    def policy(self) -> Policy:
        return Policy(self._name, self.step)

    async def sample(
        self, token_ids: Sequence[int], *, params: SamplingParams, stop: frozenset[int], shared: int = 0
    ) -> Completion:
        values = {"tokens": list(token_ids), "params": asdict(params), "stop": sorted(stop), "shared": shared}
        reply = await self._ask("sample", **values)
        return Completion(Span(tuple(reply["tokens"]), tuple(reply["logprobs"]), reply["step"]), reply["stopped"])

    async def train(self, samples: Sequence[Sample], config: TrainConfig) -> dict[str, float]:
        return await asyncio.shield(self._train("train", samples, config))

    async def imitate(self, samples: Sequence[Sample], config: TrainConfig) -> dict[str, float]:
        return await asyncio.shield(self._train("imitate", samples, config))

    async def _train(self, operation: str, samples: Sequence[Sample], config: TrainConfig) -> dict[str, float]:
        reply = await self._ask(operation, samples=[packed(sample) for sample in samples], config=asdict(config))
        self.step = reply["step"]
        return reply["metrics"]

    async def reset_optimizer(self) -> None:
        await self._ask("reset_optimizer")

    async def save(self, folder: Path) -> None:
        await self._ask("save", folder=str(folder))

    async def write_weights(self, folder: Path) -> None:
        await self._ask("write_weights", folder=str(folder))

    async def close(self) -> None:
        """Asks the child to end, then ends it."""
        self._outbox.put(None)
        with anyio.CancelScope(shield=True):
            try:
                await asyncio.to_thread(self._process.wait, CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                await asyncio.to_thread(self._process.wait)

    async def _ask(self, operation: str, **values: Any) -> dict[str, Any]:
        number, future = self._send(operation, **values)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            self._futures.pop(number, None)
            self._post(number, "cancel")
            raise

    def _send(self, operation: str, **values: Any) -> tuple[int, Future[dict[str, Any]]]:
        future: Future[dict[str, Any]] = Future()
        with self._lock:
            if self._ended:
                raise EngineError(self._ended)
            number = next(self._numbers)
            self._futures[number] = future
        self._post(number, operation, **values)
        return number, future

    def _post(self, number: int, operation: str, **values: Any) -> None:
        self._outbox.put(json.dumps({"id": number, "do": operation, **values}).encode() + b"\n")

    def _write(self) -> None:
        assert self._process.stdin is not None
        # a broken pipe: the reading side tells every caller that the child has ended
        with suppress(BrokenPipeError), self._process.stdin as pipe:
            while (line := self._outbox.get()) is not None:
                pipe.write(line)
                pipe.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as pipe:
            for line in pipe:
                if not line.endswith(b"\n"):
                    break  # the child died as it wrote this
                reply = reply_of(line)
                future = self._futures.pop(reply["id"], None)
                if future is None or not future.set_running_or_notify_cancel():
                    continue  # it was cancelled meanwhile
                if "error" in reply:
                    future.set_exception(rebuilt(reply["error"], reply["message"], trace=reply["trace"]))
                else:
                    future.set_result(reply)
        code = self._process.wait()
        with self._lock:
            self._ended = f"the worker process {self._process.pid} has ended ({ending(code)})"
            waiting = list(self._futures.values())
            self._futures.clear()
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineError(self._ended))


def reply_of(line: bytes) -> dict[str, Any]:
    """A reply of the child; what some import printed, before replies had the pipe for themselves, goes to stderr."""
    with suppress(ValueError):
        reply: object = json.loads(line)
        if isinstance(reply, dict) and "id" in reply:
            return cast("dict[str, Any]", reply)
    sys.stderr.write(line.decode(errors="replace"))
    return {"id": None}


def packed(sample: Sample) -> list[str | float | None]:
    """A sample as three strings of bytes and its advantage. As numbers in JSON, the 1,024 samples of a step kept the loop,
    and with it every rollout, for 0.4 s; so they keep it for 0.1 s."""
    logprobs = None if sample.logprobs is None else text_of(array("d", sample.logprobs))
    return [text_of(array("i", sample.token_ids)), text_of(bytes(sample.trainable)), logprobs, sample.advantage]


def unpacked(parts: list[Any]) -> Sample:
    token_ids, trainable, logprobs, advantage = parts
    values = None if logprobs is None else tuple(array("d", b64decode(logprobs)))
    return Sample(tuple(array("i", b64decode(token_ids))), tuple(map(bool, b64decode(trainable))), values, advantage)


def text_of(values: array[Any] | bytes) -> str:
    return b64encode(values).decode("ascii")


class Child:
    """The child's end: reads operations, runs each as a task, writes replies as they come."""

    def __init__(self, output: Any) -> None:
        self._output = output
        self._worker: Worker | None = None
        self._running: dict[int, asyncio.Task[None]] = {}

    async def serve(self) -> None:
        reader = asyncio.StreamReader(limit=2**30)
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        async with asyncio.TaskGroup() as tasks:
            while line := await reader.readline():
                message = json.loads(line)
                if message["do"] == "cancel":
                    self._cancel(message["id"])
                else:
                    self._running[message["id"]] = task = tasks.create_task(self._answer(message))
                    task.add_done_callback(lambda _, number=message["id"]: self._running.pop(number))
            if self._worker is not None:
                await self._worker.close()

    def _cancel(self, number: int) -> None:
        if number in self._running:
            self._running[number].cancel()

    async def _answer(self, message: dict[str, Any]) -> None:
        try:
            reply = await getattr(self, message["do"])(message)
        except Exception as error:  # noqa: BLE001  handed on to the parent, which raises it there
            reply = {"error": type(error).__name__, "message": describe(error), "trace": traceback.format_exc()}
        try:
            self._output.write(json.dumps({"id": message["id"], **reply}).encode() + b"\n")
            self._output.flush()
        except BrokenPipeError:
            os._exit(1)  # the parent is dead: nobody is left to tell, and a traceback would be its user's last sight

    @property
    def worker(self) -> Worker:
        if self._worker is None:
            raise EngineError("the worker has no model yet")
        return self._worker

    async def start(self, message: dict[str, Any]) -> dict[str, Any]:
        spec = message["spec"]
        lora = spec.pop("lora")
        model = ModelSpec(**spec, lora=LoraSpec(**lora) if lora else None)
        self._worker = worker = await asyncio.to_thread(Worker, message["name"], model, Settings(**message["settings"]))
        return {"facts": worker.facts, "context_length": worker.context_length, "step": worker.step}

    async def sample(self, message: dict[str, Any]) -> dict[str, Any]:
        params = SamplingParams(**message["params"])
        stop = frozenset(message["stop"])
        done = await self.worker.sample(message["tokens"], params=params, stop=stop, shared=message["shared"])
        span = done.span
        return {"tokens": span.token_ids, "logprobs": span.logprobs, "step": span.policy_version, "stopped": done.stopped}

    async def train(self, message: dict[str, Any]) -> dict[str, Any]:
        return await self._learn(self.worker.train, message)

    async def imitate(self, message: dict[str, Any]) -> dict[str, Any]:
        return await self._learn(self.worker.imitate, message)

    async def _learn(self, work: Learn, message: dict[str, Any]) -> dict[str, Any]:
        config = message["config"]
        config["sequence_ratio_bounds"] = tuple(config["sequence_ratio_bounds"] or ()) or None
        metrics = await work([unpacked(parts) for parts in message["samples"]], TrainConfig(**config))
        return {"metrics": metrics, "step": self.worker.step}

    async def reset_optimizer(self, message: dict[str, Any]) -> dict[str, Any]:
        await self.worker.reset_optimizer()
        return {}

    async def save(self, message: dict[str, Any]) -> dict[str, Any]:
        await self.worker.save(Path(message["folder"]))
        return {}

    async def write_weights(self, message: dict[str, Any]) -> dict[str, Any]:
        await self.worker.write_weights(Path(message["folder"]))
        return {}


def main() -> None:
    # whatever prints to stdout must not end up among the replies
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    asyncio.run(Child(output).serve())


if __name__ == "__main__":
    main()
