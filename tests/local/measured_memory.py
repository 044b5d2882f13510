"""Measures what `local.doctor_memory` reckons: a real worker loads a model, samples and trains, in a process of its own.

Started as a program; prints one JSON object: MiB above what the libraries take, for each phase. The libraries' own share is
the process's after the same work with a model of a few thousand parameters.
"""

import asyncio
import dataclasses
import json
import random
import sys
import tempfile
from pathlib import Path

from toys import save_toy

from art_mcp.local.worker import Settings, Worker
from art_mcp.types import LoraSpec, ModelSpec, Sample, SamplingParams, TrainConfig

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory(name):
    """A figure of this process in MiB."""
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name)) / 1024


def forget_peak():
    CLEAR.write_text("5")


async def peak(work):
    """The highest memory while `work` is done, and what it gives."""
    forget_peak()
    result = await work
    return memory("VmHWM"), result


async def load(spec):
    return Worker("measured", spec, Settings())


async def play(worker, load, *, vocabulary, seed=0):
    """The conversations of a step, all at once: random prompts, and as many tokens as asked for."""
    rng = random.Random(seed)
    shared = rng.choices(range(vocabulary), k=load["shared"])
    questions = [rng.choices(range(vocabulary), k=load["question"]) for _ in range(load["groups"])]

    async def rollout(number):
        tokens = [*shared, *questions[number // load["rollouts"]]]
        trainable, logprobs = [False] * len(tokens), [0.0] * len(tokens)
        for turn in range(load["turns"]):
            if turn:
                added = rng.choices(range(vocabulary), k=load["added"])
                tokens, trainable = tokens + added, trainable + [False] * len(added)
                logprobs = logprobs + [0.0] * len(added)
            params = SamplingParams(max_tokens=load["sampled"], seed=number * 100 + turn)
            span = (await worker.sample(tokens, params=params, stop=frozenset(), shared=load["shared"])).span
            tokens, trainable = tokens + list(span.token_ids), trainable + [True] * len(span.token_ids)
            logprobs = logprobs + list(span.logprobs)
        return Sample(tuple(tokens), tuple(trainable), tuple(logprobs), 1.0 if number % 2 else -1.0)

    return await asyncio.gather(*(rollout(number) for number in range(load["groups"] * load["rollouts"])))


async def work(spec, conversations, *, vocabulary):
    """The peaks of loading, and of sampling and training twice."""
    first, worker = await peak(load(spec))
    peaks = {"loading": first}
    for step in range(2):
        sampling, samples = await peak(play(worker, conversations, vocabulary=vocabulary, seed=step))
        training, _ = await peak(worker.train(samples, TrainConfig()))
        peaks["sampling"] = max(sampling, peaks.get("sampling", 0))
        peaks["training"] = max(training, peaks.get("training", 0))
    await worker.close()
    return peaks


def main():
    asked = json.loads(sys.argv[1])
    lora = None if asked["lora"] is None else LoraSpec(rank=asked["lora"])
    small = {"shared": 8, "question": 4, "turns": 1, "sampled": 4, "added": 0, "groups": 2, "rollouts": 2}
    with tempfile.TemporaryDirectory() as folder:
        toy = ModelSpec(source=str(save_toy(Path(folder) / "toy")), lora=lora)
        asyncio.run(work(toy, small, vocabulary=90))
    before = memory("VmRSS")
    spec = dataclasses.replace(toy, source=asked["model"])
    peaks = asyncio.run(work(spec, asked["load"], vocabulary=700))
    sys.stdout.write(json.dumps({"libraries": before, **{name: value - before for name, value in peaks.items()}}) + "\n")


main()
