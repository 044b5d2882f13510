"""vLLM's command line and environment, as we want them; starting it is not here, and vLLM itself is never imported."""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from art_mcp.child import launch_command
from art_mcp.errors import ConfigError
from art_mcp.sampling import vllm_graphs

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for --max-lora-rank."""
ADAPTERS = 3
"""Versions of a policy that a server holds: the one that is sampled and two before it, whose last requests may still be
running. A turn may well take longer than a step whose rollouts were played ahead."""
OURS = {
    *("model", "host", "port", "uds", "root_path", "api_key", "ssl_keyfile", "ssl_certfile", "api_server_count", "headless"),
    *("served_model_name", "enable_lora", "max_loras", "logprobs_mode", "generation_config", "return_tokens_as_token_ids"),
}
"""Options on which the client, or what a logprob means, depends."""
CPU_CACHE_BYTES = 4 * 2**30
"""The most that keys and values take where there is no GPU."""
WORKING_MEMORY = 2048
"""MiB of a GPU that a server takes beside weights, keys and values: its context, activations, graphs."""
LIST_OPTIONS = """
import json, sys
try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser  # 0.32
except ImportError:
    from vllm.entrypoints.openai.cli_args import make_arg_parser  # 0.25
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
names = {name for action in parser._actions for name in action.option_strings if name.startswith("--")}
sys.stdout.write("\\n" + json.dumps(sorted(names)))
"""
TOKENS_OPTION = "--enable-scale-out"
"""Opens the door for tokens alone, in versions that keep it shut otherwise."""
FIND = """
import importlib.util, json, pathlib, sys
spec = importlib.util.find_spec("vllm")
folders = [pathlib.Path(place) for place in (spec.submodule_search_locations if spec else ())]
looked = {
    "--enable-scale-out": (b"enable_scale_out:", ["entrypoints/launchers/cli_args.py", "entrypoints/openai/cli_args.py"]),
    "VLLM_USE_BREAKABLE_CUDAGRAPH": (b"VLLM_USE_BREAKABLE_CUDAGRAPH:", ["envs.py"]),
    "attention that cuts graphs": (b"@eager_break_during_capture", ["model_executor/layers/attention/attention.py"]),
}
files = {name: [folder / part for folder in folders for part in parts] for name, (_, parts) in looked.items()}
found = [name for name in looked if any(looked[name][0] in file.read_bytes() for file in files[name] if file.is_file())]
sys.stdout.write("\\n" + json.dumps(found))
"""
"""Read, not imported: that would take half a minute."""


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """How vLLM is run. `python`: the interpreter that has it (None: ours). `args`: options of vLLM's own, such as
    `{"max_num_seqs": 512}`; they win over our choices.

    `start`: "fast" compiles nothing and records CUDA graphs of few sizes, "full" is vLLM's own choice: slower to start, perhaps
    faster later. `memory_share`: of the GPU memory that is free when it starts; `replicas` servers divide it among them.
    `cache_bytes`: what keys and values of each take of it (None: what vLLM measures to be left of its share, which is wrong
    where somebody else takes memory while it measures). `together`: whether it starts while a trainer of adapters loads (None:
    where a GPU is known to hold both, and without a GPU).
    """

    python: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict[str, Any])
    start: Literal["fast", "full"] = "fast"
    memory_share: float = 0.45
    cache_bytes: int | None = None
    together: bool | None = None
    replicas: int = 1

    @property
    def asked(self) -> dict[str, Any]:
        """`args` by the names that vLLM's own parser uses."""
        return {name.removeprefix("--").replace("-", "_"): value for name, value in self.args.items()}


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one GPU, in MiB."""

    free: int
    total: int


@dataclass(frozen=True, slots=True)
class Served:
    """What vLLM serves: a model folder or hub id under `name`, with adapters of at most `lora_rank` (None: full weights)."""

    name: str
    model: str
    dtype: str
    lora_rank: int | None = None


def vllm_command(
    served: Served, settings: VllmSettings, *, port: int, memory: Memory | None, known: Collection[str] = ()
) -> list[str]:
    """The server's command line. `memory` None: there is no GPU. `known`: what FIND finds in the installed version. Raises
    ConfigError for an option that is not for users."""
    asked = settings.asked
    forbidden = sorted(OURS & asked.keys())
    if forbidden:
        raise ConfigError(f"engine argument {forbidden[0]!r} is not for users: sampling and publishing depend on its value")
    gpu = memory is not None
    options = {
        **our_options(served, port=port),
        **speed_options(settings, gpu=gpu, every_step=records_every_step(served, settings, gpu=gpu, known=known)),
    }
    if TOKENS_OPTION in known:
        options[TOKENS_OPTION.removeprefix("--").replace("-", "_")] = True
    options |= memory_options(settings, memory, weights=weights_of(served.model)) | asked
    python = settings.python or sys.executable
    return [python, "-m", "vllm.entrypoints.openai.api_server", *(word for item in options.items() for word in words_of(*item))]


def our_options(served: Served, *, port: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        "model": served.model,
        "served_model_name": served.name,
        "host": "127.0.0.1",
        "port": port,
        "dtype": served.dtype,
        # the distribution that was sampled from is what the importance ratio divides by
        "logprobs_mode": "processed_logprobs",
        # a model's generation_config.json may cut the distribution (top_p, top_k) or bend it (repetition_penalty)
        "generation_config": "vllm",
        "enable_prefix_caching": True,
        "disable_uvicorn_access_log": True,
        "disable_log_stats": True,
    }
    if served.lora_rank is not None:
        options |= {"enable_lora": True, "max_loras": ADAPTERS, "max_lora_rank": allowed_rank(served.lora_rank)}
    return options


def allowed_rank(rank: int) -> int:
    """The smallest rank that vLLM can be told to hold and that holds `rank`."""
    for allowed in LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise ConfigError(f"vLLM serves adapters up to rank {LORA_RANKS[-1]}, not {rank}")


def records_every_step(served: Served, settings: VllmSettings, *, gpu: bool, known: Collection[str]) -> bool:
    """Whether a fast start records graphs of every step: with adapters, as was measured, unless the user has another idea."""
    ours = gpu and settings.start == "fast" and not vllm_graphs.has_own_idea(settings.asked)
    return ours and served.lora_rank is not None and vllm_graphs.can_record_every_step(served.model, known)


def speed_options(settings: VllmSettings, *, gpu: bool, every_step: bool) -> dict[str, Any]:
    """For a fast start, unless the user's options have their own idea."""
    # vLLM 0.32 on a CPU dies of a seeded request whose prompt it takes in pieces ("CPU Generator does not use offset")
    options: dict[str, Any] = {"max_num_seqs": 512} if gpu else {"max_num_seqs": 128, "enable_chunked_prefill": False}
    if settings.start == "full" or vllm_graphs.has_own_idea(settings.asked):
        return options
    if not gpu:
        return options | {"enforce_eager": True}
    most = int(settings.asked.get("max_num_seqs", options["max_num_seqs"]))
    return options | {"compilation_config": vllm_graphs.compilation(most, every_step=every_step)}


def memory_options(settings: VllmSettings, memory: Memory | None, *, weights: int | None) -> dict[str, Any]:
    """vLLM reckons its part of all memory; we give each replica its part of a share of what is free. `weights`: the model's,
    in MiB, where they are known.

    Replicas that start together would measure each other's memory as their own, so what keys and values may take is reckoned
    here for them, which vLLM believes.
    """
    share = settings.memory_share / settings.replicas
    if memory is None:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else CPU_CACHE_BYTES
        return {"kv_cache_memory_bytes": min(CPU_CACHE_BYTES, int(free * share / 2))}
    options: dict[str, Any] = {"gpu_memory_utilization": round(share * memory.free / memory.total, 3)}
    if settings.cache_bytes is not None:
        options["kv_cache_memory_bytes"] = settings.cache_bytes
    elif settings.replicas > 1 and weights is not None:
        left = int(share * memory.free - 1.1 * weights - WORKING_MEMORY)
        if left <= 0:
            raise ConfigError(
                f"{settings.replicas} engine replicas of this model need more than memory_share {settings.memory_share} of the "
                f"{memory.free} MiB that are free: fewer of them, or a larger share"
            )
        options["kv_cache_memory_bytes"] = left * 2**20
    return options


def again(first: Memory, now: Memory, settings: VllmSettings) -> Memory:
    """What a server that is started anew goes by: the memory of its first start, as far as what is free now allows, where its
    neighbours have taken theirs."""
    fits = int(0.9 * now.free * settings.replicas / settings.memory_share)
    return Memory(free=min(first.free, fits), total=now.total)


def weights_of(model: str) -> int | None:
    """The size of a model folder's weights in MiB; None for one that is not there yet, as a hub's may be."""
    sizes = [file.stat().st_size for file in Path(model).glob("*.safetensors")]
    return sum(sizes) >> 20 if sizes else None


def words_of(name: str, value: Any) -> list[str]:
    """One option on the command line: a flag, `--no-` flag, JSON for a mapping, several words for a list."""
    option = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [option if value else "--no-" + option.removeprefix("--")]
    if isinstance(value, Mapping):
        return [option, json.dumps(value, separators=(",", ":"))]
    if isinstance(value, list | tuple):
        return [option, *map(str, value)]
    return [option] if value is None else [option, str(value)]


def vllm_environment(*, key: str, cache: Path, full_weights: bool, gpu: bool, every_step: bool = False) -> dict[str, str]:
    """Our environment with what vLLM reads from its own. The switches with which weights are replaced open doors that only
    a server on loopback with a key may have. On a GPU one CPU thread, where the environment does not say how many: an adapter's
    tensors are small, and as many threads as there are cores, in every engine, wait for each other over each of them. (vLLM
    before 0.32 leaves that at all cores; on a CPU vLLM binds threads to cores itself.)"""
    ours = {
        "VLLM_API_KEY": key,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "86400",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1" if full_weights else "0",
    }
    threads = {"OMP_NUM_THREADS": "1"} if gpu else {}
    graphs = {vllm_graphs.BREAKABLE: "1"} if every_step else {}
    return {"VLLM_CACHE_ROOT": str(cache), **threads, **graphs, **os.environ, **ours}


def cache_folder() -> Path:
    """Where compiled kernels stay from run to run, as the platform wants it."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "art_mcp" / "vllm"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "art_mcp" / "vllm"


def gpu_memory() -> Memory | None:
    """Of the first GPU that this process may use; None where there is none. Another process asks: torch would take half a GiB
    of it in the one that does."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    query = ["--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits"]
    in_torch = "import torch; print(*(number >> 20 for number in torch.cuda.mem_get_info()), sep=',')"
    for argv in (["nvidia-smi", f"--id={visible}", *query], [sys.executable, "-c", in_torch]) if visible else ():
        numbers = answer_of(argv, timeout=60).strip().split(",")
        if len(numbers) == 2 and all(part.strip().isdigit() for part in numbers):
            return Memory(free=int(numbers[0]), total=int(numbers[1]))
    return None


def answer_of(argv: Sequence[str], *, timeout: float) -> str:
    """What a command prints; empty where it fails."""
    command, args = launch_command(argv[0], argv[1:])
    try:
        done = subprocess.run([command, *args], capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return "" if done.returncode else done.stdout


def complaint_about(args: Mapping[str, Any], line: str, settings: VllmSettings) -> str:
    """What to tell the user whose `args` vLLM's parser refused with `line`: which of them, and what may have been meant."""
    known = list_options(settings)
    for name in args:
        option = "--" + name.removeprefix("--").replace("_", "-")
        if known and option not in known and option.replace("--no-", "--", 1) not in known:
            close = difflib.get_close_matches(option, known, n=1)
            meant = f"; did you mean {close[0].removeprefix('--').replace('-', '_')}?" if close else ""
            return f"vLLM has no engine argument {name!r}{meant}"
    return f"vLLM refuses its arguments: {line}"


def list_options(settings: VllmSettings, script: str = LIST_OPTIONS) -> list[str]:
    """Every option of the installed version's own parser, or what another `script` prints as a list; empty where it cannot be
    asked."""
    said = answer_of([settings.python or sys.executable, "-c", script], timeout=300).splitlines()
    return [str(name) for name in json.loads(said[-1])] if said else []
