"""Plays the part of the interpreter that has vLLM: lists the options of its server, and runs it as `fake_server`.

What only asks for the options is answered at once: the web server's libraries are loaded by what serves.
"""

import argparse
import json
import os
import sys

OPTIONS = ["--max-num-seqs", "--max-model-len", "--enforce-eager", "--no-enforce-eager"]
DOOR = os.environ.get("FAKE_VLLM_DOOR", "asked")
"""/inference/v1/generate: "asked" for with --enable-scale-out (0.32), "always" there (0.25), or "never"."""
if DOOR == "asked":
    OPTIONS.append("--enable-scale-out")
FOUND = [*OPTIONS, "VLLM_USE_BREAKABLE_CUDAGRAPH", "attention that cuts graphs"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="api_server.py")
    for name in ("model", "served-model-name", "host", "dtype", "logprobs-mode", "generation-config", "compilation-config"):
        parser.add_argument(f"--{name}")
    for name in ("port", "max-loras", "max-lora-rank", "max-num-seqs", "kv-cache-memory-bytes"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--gpu-memory-utilization", type=float)
    for name in ("enable-lora", "enforce-eager", "enable-prefix-caching", "disable-uvicorn-access-log", "disable-log-stats"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--enable-chunked-prefill", action=argparse.BooleanOptionalAction)
    if "--enable-scale-out" in OPTIONS:
        parser.add_argument("--enable-scale-out", action="store_true")
    return parser.parse_args()


def main() -> None:
    if sys.argv[1] == "-c":
        sys.stdout.write(json.dumps(FOUND))
        return
    sys.argv[1:3] = []  # -m vllm.entrypoints.openai.api_server
    args = parse()
    from fake_server import serve

    serve(args, door=DOOR)


if __name__ == "__main__":
    main()
