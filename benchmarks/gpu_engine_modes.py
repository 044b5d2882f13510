"""How fast one vLLM server answers many short turns, as rollouts ask them, under each way to start it and through each of its
two doors for token ids; no tools, no training.

    python -m benchmarks.gpu_engine_modes --model MENDED --adapter FOLDER --out DIR

Each of `--conversations` is `--turns` turns of `--sampled` tokens, one after the other, each after `--result` more tokens of a
tool's result; all begin with the same `--shared` tokens. The servers start side by side and are measured in turn, twice.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import psutil

from art_mcp.sampling.vllm_args import Served, VllmSettings
from art_mcp.sampling.vllm_server import VllmServer
from benchmarks.gpu_report import Clock, Report, describe_run

SIZES = [1, 8, 32, 64, 128, 192, 256, 384, 512]


def uncompiled(graphs: str, sizes: Sequence[int]) -> dict[str, Any]:
    return {"compilation_config": {"mode": 0, "cudagraph_mode": graphs, "cudagraph_capture_sizes": sizes}}


MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "decode-graphs": uncompiled("FULL_DECODE_ONLY", SIZES),
    "as-started": {},
    "compiled": {},
}


def completion_body(name: str, tokens: Sequence[int], arguments: argparse.Namespace, *, seed: int, salt: str) -> dict[str, Any]:
    return {
        "model": name,
        "prompt": list(tokens),
        "max_tokens": arguments.sampled,
        "temperature": 1.0,
        "seed": seed,
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "skip_special_tokens": False,
        "cache_salt": salt,
    }


def generate_body(name: str, tokens: Sequence[int], arguments: argparse.Namespace, *, seed: int, salt: str) -> dict[str, Any]:
    params = {"max_tokens": arguments.sampled, "temperature": 1.0, "seed": seed, "ignore_eos": True, "logprobs": 0}
    return {"model": name, "token_ids": list(tokens), "sampling_params": {**params, "detokenize": False}, "cache_salt": salt}


DOORS = {"/v1/completions": completion_body, "/inference/v1/generate": generate_body}


async def load(server: VllmServer, name: str, door: str, arguments: argparse.Namespace, *, round_: int) -> dict[str, Any]:
    """All conversations at the same time; tokens a second and the share of a core that each process took."""
    shared = random.Random("shared").choices(range(5, arguments.vocabulary), k=arguments.shared)
    salt, waits, first = f"{len(door)} {round_}", [], {}
    processes = family()
    before = {process.pid: cpu_of(process) for process in processes}

    async def converse(number: int) -> None:
        rng = random.Random(f"{number}")
        tokens = [*shared, *rng.choices(range(5, arguments.vocabulary), k=150)]
        for turn in range(arguments.turns):
            body = DOORS[door](name, tokens, arguments, seed=number * 100 + turn, salt=salt)
            asked = time.monotonic()
            status, answer = await server.connections.post(door, body)
            waits.append(time.monotonic() - asked)
            if status != 200:
                raise SystemExit(f"{door}: {status} {answer[:400]!r}")
            choice = json.loads(answer)["choices"][0]
            first.setdefault("answer", answer[:600].decode(errors="replace"))
            assert len(choice["token_ids"]) == arguments.sampled
            tokens += [*choice["token_ids"], *rng.choices(range(5, arguments.vocabulary), k=arguments.result)]

    began = time.monotonic()
    async with anyio.create_task_group() as tasks:
        for number in range(arguments.conversations):
            tasks.start_soon(converse, number)
    seconds = time.monotonic() - began
    waits.sort()
    sampled = arguments.conversations * arguments.turns * arguments.sampled
    used = {label(process): round((cpu_of(process) - before[process.pid]) / seconds, 2) for process in processes}
    return {
        "tokens_per_second": round(sampled / seconds),
        "seconds": round(seconds, 3),
        "requests_per_second": round(len(waits) / seconds),
        "median_wait": round(waits[len(waits) // 2], 3),
        "milliseconds_a_token": round(1000 * waits[len(waits) // 2] / arguments.sampled, 2),
        "cores": {name: share for name, share in used.items() if share >= 0.05},
        "example": first["answer"],
    }


def family() -> list[psutil.Process]:
    this = psutil.Process()
    return [this, *this.children(recursive=True)]


def cpu_of(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def label(process: psutil.Process) -> str:
    return f"{process.name()}-{process.pid}"


async def start(mode: str, args: Mapping[str, Any], arguments: argparse.Namespace, clock: Clock) -> VllmServer:
    how = "fast" if mode == "as-started" else "full"
    settings = VllmSettings(arguments.engine_python, args, how, arguments.memory_share)
    server = VllmServer(settings)
    began = time.monotonic()
    rank = arguments.rank if arguments.adapter else None
    await server.start(Served("base", str(arguments.model), arguments.dtype, lora_rank=rank))
    clock.say(f"{mode} answers after {time.monotonic() - began:.0f} s")
    if arguments.adapter:
        asked = {"lora_name": "policy@1", "lora_path": str(arguments.adapter.resolve())}
        status, body = await server.ask("/v1/load_lora_adapter", asked)
        if status != 200:
            raise SystemExit(f"{mode}: {body[:400]!r}")
    return server


async def main(arguments: argparse.Namespace) -> None:
    clock = Clock(arguments.deadline)
    report = Report(arguments.out / "engine_modes.json", **describe_run(vars(arguments)))
    name = "policy@1" if arguments.adapter else "base"
    servers: dict[str, VllmServer] = {}
    common = {"max_model_len": 4096, "max_num_seqs": arguments.conversations, **arguments.engine_args}

    async def open_one(mode: str) -> None:
        began = clock.spent()
        servers[mode] = await start(mode, {**common, **MODES[mode]}, arguments, clock)
        report.add(**{f"start/{mode}": round(clock.spent() - began, 1)})

    try:
        async with anyio.create_task_group() as tasks:
            for mode in arguments.modes.split(","):
                tasks.start_soon(open_one, mode)
                await anyio.sleep(arguments.stagger)
        for round_ in range(2):
            for mode, server in servers.items():
                for door in DOORS:
                    found = await load(server, name, door, arguments, round_=round_)
                    report.add(**{f"{mode}{door}/{round_}": found})
                    clock.say(f"{mode} {door}: {found['tokens_per_second']} tokens/s {found['cores']}")
    finally:
        for mode, server in servers.items():
            report.add(**{f"log/{mode}": server.last_words()[-1500:]})
            await server.close()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--engine-python")
    parser.add_argument("--engine-args", type=json.loads, default={})
    parser.add_argument("--modes", default="decode-graphs,as-started,compiled")
    parser.add_argument("--memory-share", type=float, default=0.2)
    parser.add_argument("--stagger", type=float, default=4.0, help="seconds between two starts, for each to see what is free")
    parser.add_argument("--conversations", type=int, default=512)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--sampled", type=int, default=35)
    parser.add_argument("--result", type=int, default=40)
    parser.add_argument("--vocabulary", type=int, default=50_000)
    parser.add_argument("--shared", type=int, default=1100)
    parser.add_argument("--deadline", type=float, default=400.0)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    anyio.run(main, parse())
