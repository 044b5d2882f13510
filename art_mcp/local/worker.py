"""What samples and trains one model: an engine and a trainer on the same weights, on one thread. In this process or, behind
`remote`, in a child of it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from art_mcp.errors import ConfigError, ModelError
from art_mcp.local.checkpoints import load_checkpoint, save_checkpoint, write_weights
from art_mcp.local.models import Loaded, context_of, load_model
from art_mcp.local.torch_trainer import TorchTrainer
from art_mcp.sampling.transformers_engine import TransformersEngine
from art_mcp.types import Completion, ModelSpec, Policy, Sample, SamplingParams, TrainConfig

ALL_THREADS = torch.get_num_threads()
"""torch's own choice, looked up before any worker's thread changes it for the whole process."""
SMALL_MODEL = 10_000_000
"""Parameters below which one thread samples faster than several."""
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")
"""With one of these in the environment cuBLAS sums in one order (its manual, "Results reproducibility"; torch knows both)."""


class TakeStep(Protocol):
    """A trainer's step on samples, whatever it learns from them."""

    def __call__(self, samples: Sequence[Sample], config: TrainConfig, *, step: int) -> dict[str, float]: ...


@dataclass(frozen=True, slots=True)
class Settings:
    """How a worker runs: `deterministic` fixes the batches, and on a GPU the algorithms; `threads` None: all cores for a
    training step and for sampling a large model, one for sampling a small one, whose operations are too short to share, and
    one where a GPU computes.
    `device` "": the GPU where there is one. Unsloth trains; it does not sample."""

    deterministic: bool = False
    max_batch: int = 128
    threads: int | None = None
    trainer: Literal["torch", "unsloth"] = "torch"
    device: str = ""


def open_trainer(spec: ModelSpec, settings: Settings) -> tuple[Loaded, TorchTrainer]:
    """The model of `spec`, and what trains it."""
    if settings.trainer == "unsloth":
        from art_mcp.local.unsloth_trainer import open_unsloth  # a process that uses Unsloth imports it before all else

        return open_unsloth(spec, load_in_4bit=spec.load_in_4bit, exact_model=spec.exact_model)
    if spec.load_in_4bit:
        raise ModelError('4-bit weights are loaded by Unsloth alone: trainer="unsloth", or leave load_in_4bit out')
    device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if settings.deterministic and device.type == "cuda":
        demand_determinism()
    loaded = load_model(spec, device)
    return loaded, TorchTrainer(loaded.model)


def demand_determinism() -> None:
    """From here on torch computes on GPUs in this whole process by deterministic algorithms alone, and raises RuntimeError for
    an operation that has none. (A mere warning would leave the backward pass of fused attention as it is.) Raises ConfigError
    where this process was started without what cuBLAS needs for it."""
    if os.environ.get(WORKSPACE) not in WORKSPACES:
        raise ConfigError(
            f"deterministic runs on a GPU need {WORKSPACE}={WORKSPACES[0]} in the environment before CUDA starts, where it is "
            f"{os.environ.get(WORKSPACE, 'not set')}: set it, or unset it and train in a child process, which then has it"
        )
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms would load torch's compiler, for 2 s


class Worker:
    """One model with its engine and its trainer. Everything that touches torch runs on the engine's thread."""

    def __init__(self, name: str, spec: ModelSpec, settings: Settings) -> None:
        loaded, self.trainer = open_trainer(spec, settings)
        self.facts: dict[str, Any] = loaded.facts
        # how a product is cut among threads changes its last bits
        alone = settings.deterministic or self.trainer.device.type == "cuda"
        self._threads = settings.threads or (1 if alone else ALL_THREADS)
        small = loaded.facts["parameters"] < SMALL_MODEL
        self._sampling_threads = 1 if small and settings.threads is None else self._threads
        self._tokenizer = loaded.tokenizer
        self.step = load_checkpoint(Path(spec.source), self.trainer) if spec.resume else 0
        self.engine = TransformersEngine(
            self.trainer.decoder,
            policy=Policy(name, self.step),
            context_length=context_of(loaded.model),
            dtype=self.trainer.dtype,
            device=self.trainer.device,
            max_batch=settings.max_batch,
            deterministic=settings.deterministic,
            threads=self._sampling_threads,
        )

    @property
    def policy(self) -> Policy:
        return self.engine.policy

    @property
    def context_length(self) -> int:
        return self.engine.context_length

    async def sample(
        self, token_ids: Sequence[int], *, params: SamplingParams, stop: frozenset[int], shared: int = 0
    ) -> Completion:
        return await self.engine.sample(token_ids, params=params, stop=stop, shared=shared)

    async def train(self, samples: Sequence[Sample], config: TrainConfig) -> dict[str, float]:
        """One step when nothing is being sampled; the new policy is published before it returns."""
        return await self.engine.exclusive(lambda: self._train(self.trainer.step, samples, config))

    async def imitate(self, samples: Sequence[Sample], config: TrainConfig) -> dict[str, float]:
        """One supervised step on demonstrations, as `train`."""
        return await self.engine.exclusive(lambda: self._train(self.trainer.imitate, samples, config))

    async def reset_optimizer(self) -> None:
        """The optimizer forgets what it has seen; the weights and the step stay."""
        await self.engine.exclusive(self.trainer.forget)

    async def save(self, folder: Path) -> None:
        await self.engine.exclusive(
            lambda: save_checkpoint(folder, trainer=self.trainer, tokenizer=self._tokenizer, step=self.step)
        )

    async def write_weights(self, folder: Path) -> None:
        """What an engine elsewhere loads, in a new folder: the adapter, or the whole model; without the optimizer."""
        await self.engine.exclusive(lambda: write_weights(folder, trainer=self.trainer, tokenizer=self._tokenizer))

    async def close(self) -> None:
        await asyncio.to_thread(self.engine.close)

    def _train(self, take_step: TakeStep, samples: Sequence[Sample], config: TrainConfig) -> dict[str, float]:
        torch.set_num_threads(self._threads)
        try:
            metrics = take_step(samples, config, step=self.step)
        finally:
            torch.set_num_threads(self._sampling_threads)
        self.step += 1
        self.engine.publish(self.step)
        return metrics
