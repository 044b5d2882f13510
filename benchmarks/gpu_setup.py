"""The options, the backend and the model of the GPU measurements."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from art_mcp.types import LoraSpec, ModelSpec


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The options that all GPU measurements of the calculator have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a folder with the mended weights, a hub id, or tiny")
    parser.add_argument("--resume", type=Path, help="a folder that --save wrote, to go on from")
    parser.add_argument("--trainer", choices=("unsloth", "torch"), default="torch")
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm")
    parser.add_argument("--engine-args", type=json.loads, default={}, metavar="JSON", help="options of vLLM's own")
    parser.add_argument("--engine-python", help="the interpreter of an environment that has vLLM")
    parser.add_argument("--memory-share", type=float, default=0.45, help="of the free GPU memory, for vLLM")
    parser.add_argument("--tool-processes", type=int, default=0, help="that hold each condition's server; 0: the client")
    parser.add_argument("--engine-replicas", type=int, default=1, help="vLLM servers that share the memory")
    parser.add_argument("--in-process", action="store_true")
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--lora", type=int, default=16, help="rank; 0 trains all weights")
    parser.add_argument("--lenient", action="store_true", help="read calls outside the template's own form too")
    parser.add_argument("--levels", default="1-5")
    parser.add_argument("--groups", type=int, default=64, help="questions a step, half with `evaluate` offered")
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--concurrency", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deadline", type=float, default=560.0, help="seconds after which nothing new is begun")
    parser.add_argument("--out", type=Path, required=True)
    return parser


def make_backend(arguments: argparse.Namespace) -> Any:
    from art_mcp.local.backend import LocalBackend

    if arguments.engine == "transformers":
        return LocalBackend(in_process=arguments.in_process)
    args = {"max_model_len": 4096, **arguments.engine_args}
    return LocalBackend(
        engine="vllm",
        engine_python=arguments.engine_python,
        engine_args=args,
        memory_share=arguments.memory_share,
        engine_replicas=arguments.engine_replicas,
        trainer=arguments.trainer,
        in_process=arguments.in_process,
    )


def make_spec(arguments: argparse.Namespace) -> ModelSpec:
    lora = LoraSpec(rank=arguments.lora, alpha=2 * arguments.lora) if arguments.lora else None
    return ModelSpec(
        source=str(arguments.resume or arguments.model),
        lora=lora,
        dtype=arguments.dtype,
        seed=arguments.seed,
        resume=arguments.resume is not None,
        lenient=arguments.lenient,
        load_in_4bit=arguments.load_in_4bit,
    )
