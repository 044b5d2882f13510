"""LocalBackend: samples and trains models on this machine. Which engine, trainer and process do it is decided here; how, in
`worker` and `served`."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Literal, Protocol, TypeAlias

import anyio
import torch

from art_mcp.agent.trace import traced
from art_mcp.core.samples import make_samples
from art_mcp.errors import ConfigError, ModelError
from art_mcp.local.models import adapter_base, load_dialect
from art_mcp.local.remote import RemoteWorker
from art_mcp.local.served import ServedWorker, Trains, loaded_by, open_served
from art_mcp.local.unsloth_trainer import refuse_unsloth
from art_mcp.local.worker import Settings, Worker
from art_mcp.observe.weave_calls import WeaveTracer, open_weave
from art_mcp.ports import Dialect, Sampler, Trainable
from art_mcp.sampling.vllm_args import VllmSettings
from art_mcp.serve.listen import Endpoint
from art_mcp.serve.turn import Voice
from art_mcp.store.run import stored_model
from art_mcp.types import ModelSpec, Sample, TrainConfig, TrajectoryGroup

EngineName: TypeAlias = Literal["transformers", "vllm"]
TrainerName: TypeAlias = Literal["torch", "unsloth"]


class AnyWorker(Sampler, Trains, Protocol):
    """A Worker, here or in a child process, or one whose samples come from vLLM."""

    @property
    def facts(self) -> dict[str, Any]: ...

    @property
    def step(self) -> int: ...


class LocalBackend:
    """Samples and trains on this machine: with transformers and torch on a CPU, with vLLM where there is a GPU for it.

    `in_process`: the trainer (and transformers' engine) in this process (easy to debug, nothing is spawned) or in a child that
    is supervised and ends with this process, however that ends; default: here on a CPU, in a child with a GPU. Both give the
    same numbers. `threads`: torch's threads (default: all cores, but one for sampling a model under 10 M parameters).

    `deterministic`: with one machine and one set of versions the same seed gives the same trajectories, to the last bit; rows
    are computed one at a time, on one thread, so it is several times slower. vLLM and Unsloth cannot promise it: they are not
    used, and refused where they are asked for. On a GPU torch is held to deterministic algorithms, in the whole process, and an
    operation that has none ends the run; that two runs on a GPU then agree to the last bit has not been measured.

    `engine`: "vllm", a server process that ends as the child does, or "transformers"; default: vLLM where it is installed, or
    `engine_python` names the interpreter of an environment that has it, and there is a GPU (the tiny policy is faster without).
    `engine_args`: options of vLLM's own (`{"max_num_seqs": 256}`). `start`: "fast" is ready sooner, "full" compiles and samples
    faster later. `memory_share`: of the GPU's free memory, for vLLM; the rest is the trainer's. `together`: vLLM and a trainer
    of LoRA adapters start at the same time, not one after the other; default: where the GPU is known to hold both.
    `engine_replicas`: vLLM servers that share its memory. One server is bound by one core's Python: for models under 1.5 B on a
    machine with 8 cores or more, two or three sample more tokens a second; each costs memory for the weights and a start of
    its own, so that the default is one.

    `trainer`: "torch", or "unsloth", the default where it is installed, for LoRA beside vLLM.

    `weave`: a W&B Weave project ("team/project"; True: "art_mcp") into which all rollouts and training steps of its models are
    traced. `weave.init` patches other libraries in this process globally.

    Use it as `async with LocalBackend() as backend:`, or call `close()`.
    """

    def __init__(
        self,
        *,
        in_process: bool | None = None,
        deterministic: bool = False,
        max_batch: int = 128,
        threads: int | None = None,
        engine: EngineName | None = None,
        engine_python: str | None = None,
        engine_args: Mapping[str, Any] | None = None,
        start: Literal["fast", "full"] = "fast",
        memory_share: float = 0.45,
        engine_replicas: int = 1,
        trainer: TrainerName | None = None,
        weave: str | bool = False,
        together: bool | None = None,
    ) -> None:
        self.in_process = not torch.cuda.is_available() if in_process is None else in_process
        self._settings = Settings(deterministic, max_batch, threads)
        self._engine: EngineName | None = engine or ("vllm" if engine_python else None)
        self._vllm = VllmSettings(
            engine_python, engine_args or {}, start, memory_share, together=together, replicas=engine_replicas
        )
        self._trainer: TrainerName | None = trainer
        self._check_engine()
        self._workers: dict[str, AnyWorker] = {}
        self._dialects: dict[str, Dialect] = {}
        self._weave = "art_mcp" if weave is True else weave or ""
        self.tracer: WeaveTracer | None = None
        self._voices: dict[str, Voice] = {}
        self._endpoints: list[Endpoint] = []
        self._opening = Lock()

    async def __aenter__(self) -> LocalBackend:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def register(self, trainable: Trainable) -> None:
        """Loads the model, its tokenizer and its template. Raises ModelError; TemplateError for a template that cannot be
        bridged exactly; RunError for a run without the checkpoint that is named; ConfigError for options of vLLM's where the
        engine is transformers."""
        if trainable.name in self._workers:
            raise ModelError(f"a model named {trainable.name!r} is registered already: give this one another name")
        spec = replace(trainable.spec, source=stored_model(trainable.spec.source))
        self._refuse_what_is_vllms(spec)
        if self._weave and self.tracer is None:
            self.tracer = await open_weave(self._weave)
        self._dialects[trainable.name] = await asyncio.to_thread(load_dialect, spec)
        load = partial(self._start, trainable.name, spec)
        if self._engine_of(spec) == "vllm":
            self._workers[trainable.name] = await open_served(trainable.name, spec, load, self._vllm)
        else:
            self._workers[trainable.name] = await loaded_by(load)

    def _start(self, name: str, spec: ModelSpec) -> Worker | RemoteWorker:
        settings = self._settings
        if self._trainer_of(spec) == "unsloth":
            refuse_unsloth(spec, in_process=self.in_process)
            settings = replace(settings, trainer="unsloth")
        return Worker(name, spec, settings) if self.in_process else RemoteWorker(name, spec, settings)

    def _check_engine(self) -> None:
        if self._engine == "vllm" and self._settings.deterministic:
            raise ConfigError(
                "vLLM's last bits depend on what else is in flight: deterministic runs need engine='transformers'"
            )
        if self._trainer == "unsloth" and self._settings.deterministic:
            raise ConfigError("nobody promises the last bits of Unsloth's kernels: deterministic runs need trainer='torch'")
        if self._engine == "vllm" and not self._vllm.python and not is_installed("vllm"):
            raise ConfigError(
                "vLLM is not installed: pip install 'art-mcp[vllm]', or name the interpreter that has it as engine_python"
            )
        if self._vllm.replicas < 1:
            raise ConfigError(f"engine_replicas={self._vllm.replicas}: vLLM has one or more")
        if self._engine == "transformers":
            self._refuse_what_is_vllms(None)

    def _refuse_what_is_vllms(self, spec: ModelSpec | None) -> None:
        """What was given for vLLM must not be passed over where the engine is transformers, whoever chose that."""
        given = {"engine_args": bool(self._vllm.args), "engine_replicas": self._vllm.replicas > 1}
        names = " and ".join(name for name, there in given.items() if there)
        if not names or (spec is not None and self._engine_of(spec) == "vllm"):
            return
        if self._engine == "transformers":
            why = "you chose the transformers engine"
        elif spec is not None and spec.source == "tiny":
            why = "the tiny policy is sampled by transformers, which is faster there"
        elif self._settings.deterministic:
            why = "a deterministic run is sampled by transformers"
        else:
            why = "without a GPU, or without vLLM, transformers samples"
        raise ConfigError(
            f"{names}: these are vLLM's options, and {why}: leave them out, or ask for vLLM (engine='vllm', --engine vllm)"
        )

    def _engine_of(self, spec: ModelSpec) -> EngineName:
        if self._engine is not None:
            return self._engine
        possible = torch.cuda.is_available() and not self._settings.deterministic and is_installed("vllm")
        return "vllm" if possible and spec.source != "tiny" else "transformers"

    def _trainer_of(self, spec: ModelSpec) -> TrainerName:
        """Unsloth has no engine of its own, so without vLLM there is nobody to sample from what it trains."""
        if self._trainer is not None:
            return self._trainer
        adapters = spec.lora is not None or adapter_base(spec.source) is not None
        possible = torch.cuda.is_available() and not self.in_process and is_installed("unsloth")
        return "unsloth" if possible and adapters and self._engine_of(spec) == "vllm" else "torch"

    async def train(self, trainable: Trainable, groups: Sequence[TrajectoryGroup], *, config: TrainConfig) -> dict[str, float]:
        """One optimizer step on `groups`, then the new policy is published. Raises TrainError for groups without spans, or
        without a rollout that did not fail."""
        worker = self._worker(trainable)
        with traced(self.tracer, "train_step", model=trainable.name, step=worker.step, groups=len(groups)) as tell:
            metrics = await worker.train(make_samples(groups, config, step=worker.step), config)
            tell(metrics)
        return metrics

    async def imitate(self, trainable: Trainable, samples: Sequence[Sample], *, config: TrainConfig) -> dict[str, float]:
        """One supervised step on demonstrations (`core.samples.demonstration`), then the new policy is published. The
        first step by reward after nothing but such steps begins with a new optimizer."""
        return await self._worker(trainable).imitate(samples, config)

    async def reset_optimizer(self, trainable: Trainable) -> None:
        """The optimizer begins anew, as between two objectives; weights and step stay."""
        await self._worker(trainable).reset_optimizer()

    async def get_step(self, trainable: Trainable) -> int:
        return self._worker(trainable).step

    async def ready(self, trainable: Trainable) -> None:
        """Returns when the model can be sampled from: an engine that died is started anew, which no rollout's time should pay
        for. Raises EngineError where it cannot be."""
        worker = self._worker(trainable)
        if isinstance(worker, ServedWorker):
            await worker.ready()

    def sampler(self, trainable: Trainable) -> Sampler:
        return self._worker(trainable)

    def dialect(self, trainable: Trainable) -> Dialect:
        self._worker(trainable)
        return self._dialects[trainable.name]

    def endpoint(self, trainable: Trainable) -> tuple[str, str]:
        """The base URL and the key of an OpenAI-compatible endpoint for all models registered here: on loopback, any free port,
        started when it is first asked for. Called inside the event loop in which the models were registered, where the endpoint
        then runs: a client that blocks belongs in a thread."""
        name = trainable.name
        with self._opening:  # event loops of other threads ask, too
            if name not in self._voices:
                self._voices[name] = Voice(self.sampler(trainable), self.dialect(trainable))
            self._endpoints = [one for one in self._endpoints if not one.over]
            endpoint = next((one for one in self._endpoints if one.alive), None)
            if endpoint is None:  # those of other event loops serve on
                endpoint = Endpoint(self._voices)
                self._endpoints.append(endpoint)
        return endpoint.base_url, endpoint.token

    async def save(self, trainable: Trainable, folder: str) -> None:
        """Writes a checkpoint, aside first: weights and tokenizer as a Hugging Face folder, optimizer, RNG, step."""
        await self._worker(trainable).save(Path(folder))

    def facts(self, trainable: Trainable) -> dict[str, Any]:
        """What was really loaded, for the manifest."""
        return {"engine": "transformers", **self._worker(trainable).facts, "in_process": self.in_process}

    async def close(self) -> None:
        """Ends the endpoint, the engines and the child processes, even when the caller is being cancelled; where one does not
        end, the others do before that is raised."""
        with anyio.CancelScope(shield=True):
            async with AsyncExitStack() as last_first:
                if self.tracer is not None:
                    last_first.push_async_callback(self.tracer.close)
                with self._opening:
                    for worker in (*self._workers.values(), *self._endpoints):
                        last_first.push_async_callback(worker.close)
                    self._workers.clear()
                    self._voices.clear()
                    self._endpoints.clear()
                self.tracer = None

    def _worker(self, trainable: Trainable) -> AnyWorker:
        worker = self._workers.get(trainable.name)
        if worker is None and trainable.name in self._dialects:
            raise ModelError(f"the backend of model {trainable.name!r} is closed: use the model before, or register it anew")
        if worker is None:
            raise ModelError(f"model {trainable.name!r} is not registered here: `await model.register(backend)` first")
        return worker


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
