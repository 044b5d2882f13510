"""The supervised start: how long demonstrations are learned, in which order, at which rate. Where they come from is in
`demonstrate`."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, Literal, TypeAlias

import anyio

from art_mcp.agent.loop import Save, pick, saved_steps, to_its_end
from art_mcp.model import TrainableModel
from art_mcp.ports import Recorder
from art_mcp.types import Sample, TrainConfig
from art_mcp.values import AboveZero, CountFromOne, FromZero, check_values

Imitate: TypeAlias = Callable[[Sequence[Sample], TrainConfig], Awaitable[Mapping[str, float]]]
"""One supervised step."""

WARM_START = "warm start"
"""The `phase` of a supervised step among a run's metrics; a step by reward has none."""
WARM_UP = 0.03
"""The share of the steps in which the learning rate rises."""


@dataclass(frozen=True, slots=True)
class Lessons:
    """What is demonstrated, and how long it is learned.

    `demonstrations`: at most so many, from `source`: "solutions" (the environment's), "successes" (the policy's own, its calls
    read leniently), or a JSONL file. `epochs` says how often each is seen, unless `steps` says how many batches there are;
    `seconds` ends it earlier. `learning_rate` None: 2e-4 for LoRA, 1e-3 for models under 10 M parameters, 2e-5 otherwise.
    """

    demonstrations: CountFromOne = 1000
    source: str = "solutions"
    epochs: AboveZero = 1.0
    steps: CountFromOne | None = None
    seconds: FromZero | None = None
    batch: CountFromOne = 32
    learning_rate: FromZero | None = None
    schedule: Literal["cosine", "constant"] = "cosine"

    def __post_init__(self) -> None:
        check_values(self)

    def steps_for(self, count: int) -> int:
        """How many steps so many demonstrations are learned."""
        return max(1, round(self.epochs * count / self.batch)) if self.steps is None else self.steps

    def rate(self, step: int, steps: int, *, highest: float) -> float:
        """The learning rate of `step` (from 0) of `steps`: a short rise, then half a cosine down to 0 (arXiv:1608.03983), or
        the same to the end."""
        rise = min(1.0, (step + 1) / max(1.0, WARM_UP * steps))
        fall = 0.5 * (1 + math.cos(math.pi * step / steps)) if self.schedule == "cosine" else 1.0
        return highest * rise * fall


async def imitation_loop(
    model: TrainableModel[Any],
    samples: Sequence[Sample],
    *,
    imitate: Imitate,
    lessons: Lessons,
    config: TrainConfig,
    highest_rate: float,
    recorder: Recorder,
    save: Save,
    save_every: int = 0,
    seed: int = 0,
    spent: float = 0.0,
) -> float:
    """Learns `samples` from the model's current step on; returns the seconds spent, `spent` before a resume included.

    The step alone decides which samples come next. Checkpoints are saved as in `train_loop`: every `save_every` steps, and at
    the end, however that comes.
    """
    began = monotonic() - spent
    steps = lessons.steps_for(len(samples))
    step = await model.get_step()

    async def learn(step: int) -> None:
        started = monotonic()
        rate = lessons.rate(step, steps, highest=highest_rate)
        batch = pick(samples, step=step, count=lessons.batch, seed=seed)
        metrics = await imitate(batch, config.with_(learning_rate=rate, warmup_steps=0))
        seconds = {"seconds_train": monotonic() - started, "seconds_total": monotonic() - began}
        recorder.metrics(step, {"phase": WARM_START, **metrics, "learning_rate": rate, **seconds})

    async with saved_steps(model, save, every=save_every) as taken:
        while step < steps and (lessons.seconds is None or monotonic() - began < lessons.seconds):
            await anyio.lowlevel.checkpoint()
            await to_its_end(learn(step))
            step += 1
            await taken(step)
    return monotonic() - began
