"""Runs as those behind the GPU pages of docs/results (whose JSON files have each one's own command), one on each GPU of a host,
within a time that they share.

    art-mcp prepare MODEL PREPARED
    python -m benchmarks.gpu_arms weak-first  --model PREPARED --out OUT --limit 575
    python -m benchmarks.gpu_arms speed       --model PREPARED --out OUT --limit 400
    python -m benchmarks.gpu_arms weak-second --model PREPARED --out OUT --limit 480 --fastest
    python -m benchmarks.gpu_arms others      --model PREPARED --out OUT --limit 510

`weak-first` and `weak-second` are the two halves of three seeds from a weak start and of their control; `speed` what graphs,
more vLLM servers and turns without seeds bring to the first seed's rollouts, and the test of gradients; `others` a second
control, the main line, and rewards alone. Where there are fewer GPUs than arms, the first are run. Each writes OUT/ARM.log and
OUT/ARM/result.json, those of `speed` OUT/ARM/rollout_speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from art_mcp.child import launch_command

ENGINE = "--engine vllm --micro-batch-tokens 8192 --engine-replicas 3 --memory-share 0.35"
SHARED = "--groups 128 --rollouts 8 --share learning --progress 0.3 --temperature 1.2 --overlap 2 --seconds 288 --eval-n 500"
WEAK = f"--trainer torch {SHARED} --warm-epochs 4 --warm-batch 32 --learning-rate 2e-4 --reserve 45"
FIRST = f"{WEAK} --warm-start 200 --no-before"
MAIN = (
    f"{SHARED} --warm-start 6600 --warm-levels [2,3,6,10,12] --warm-rate 3e-4 --warm-batch 64 --learning-rate 1e-4 "
    "--final-rate 2e-5 --no-before --reserve 65"
)
ALONE = (
    "--trainer torch --warm-start 0 --lenient --progress 0.3 --groups 32 --rollouts 8 --seconds 300 --learning-rate 1e-4 "
    "--eval-n 500 --no-before"
)
SHORT = "--trainer unsloth --warm-start 512 --seconds 40 --reserve 45 --eval-n 50 --no-before"
GRADIENTS = "tests/gpu/test_gradients.py -k 'not every_token'"
SPEED = "--resume OUT/weak-1-first/saved --settings 64x8@512AA,64x8@512AAN --rounds 2"
GRAPHS = """--engine-args '{"compilation_config": {"mode": 0, "cudagraph_mode": "FULL", \
"cudagraph_capture_sizes": [1, 8, 32, 64, 128, 192, 256, 384, 512, 768, 1024]}}'"""
"""CUDA graphs of steps that begin requests too, which FlashAttention 3 can, without compiling anything. Nearly every step of
rollouts over tools begins some, of few tokens that are not in the prefix cache."""
SPARE = 12.0
"""Seconds of the limit that an arm is not given: for its end."""


def second_half(first: str) -> str:
    return f"{WEAK} --final-rate 1e-4 --resume OUT/{first}/saved --against OUT/{first}/result.json"


@dataclass(frozen=True, slots=True)
class Arm:
    """A run of `gpu_calculator`, or of another of the modules, with these options; and then perhaps a test of what it left."""

    name: str
    options: str
    tested: str = ""
    module: str = "gpu_calculator"

    def command(self, model: Path, out: Path, *, limit: float, more: str = "") -> list[str]:
        folder = out / self.name
        options = [word.replace("OUT/", f"{out}/") for word in shlex.split(f"{ENGINE} {self.options} {more}")]
        saved = ["--save", str(folder / "saved")] if self.module == "gpu_calculator" else []
        paths = ["--model", str(model), *saved, "--out", str(folder), "--deadline", f"{limit:.0f}"]
        run = [sys.executable, "-m", f"benchmarks.{self.module}", *paths, *options]
        if not self.tested:
            return run
        dumping = shlex.join([*run, "--dump", str(folder / "samples.json")])
        test = f"{sys.executable} -m pytest -vv -p no:cacheprovider -m gpu {self.tested}"
        return ["timeout", str(int(limit)), "sh", "-c", f"{dumping} && ART_MCP_GPU_RUN={shlex.quote(str(folder))} {test}"]


ARMS = {
    "weak-first": [
        Arm("weak-1-first", f"{FIRST} --seed 1"),
        Arm("control-1-first", f"{FIRST} --seed 1 --control shuffled"),
        Arm("weak-2-first", f"{FIRST} --seed 2"),
        Arm("weak-3-first", f"{FIRST} --seed 3"),
    ],
    "weak-second": [
        Arm("weak-1-second", f"{second_half('weak-1-first')} --seed 1"),
        Arm("control-1-second", f"{second_half('control-1-first')} --seed 1 --control shuffled"),
        Arm("weak-2-second", f"{second_half('weak-2-first')} --seed 2"),
        Arm("weak-3-second", f"{second_half('weak-3-first')} --seed 3"),
    ],
    "others": [
        Arm("control-2-first", f"{FIRST} --seed 2 --control shuffled"),
        Arm("main-unsloth", f"{MAIN} --trainer unsloth --seed 8"),
        Arm("main-torch", f"{MAIN} --trainer torch --seed 10"),
        Arm("rewards-alone", f"{ALONE} --seed 1"),
    ],
    "speed": [
        Arm("speed-3", f"{SPEED} --engine-replicas 3", module="gpu_rollout_speed"),
        Arm("speed-3-graphs", f"{SPEED} --engine-replicas 3 {GRAPHS}", module="gpu_rollout_speed"),
        Arm("speed-5-graphs", f"{SPEED} --engine-replicas 5 {GRAPHS}", module="gpu_rollout_speed"),
        Arm("gradients", SHORT, GRADIENTS),
    ],
}


def fastest(out: Path) -> str:
    """The engine's options in the run of `speed` that played the most tokens a second; none where nothing was measured."""
    found: dict[str, list[float]] = {}
    for arm in ARMS["speed"]:
        path = out / arm.name / "rollout_speed.json"
        rows = json.loads(path.read_text()).get("measured", []) if path.is_file() else []
        for row in (one for one in rows if not one.get("warm_up")):
            options = arm.options.removeprefix(SPEED) + " --no-seeds" * row["setting"].endswith("N")
            found.setdefault(options, []).append(row["tokens_per_second"])
    return max(found, key=lambda options: fmean(found[options]), default="")


def gpus() -> list[str]:
    """The GPUs that may be used, by the names that CUDA_VISIBLE_DEVICES takes."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked is not None:
        return [name for name in asked.split(",") if name]
    listed = subprocess.run(["nvidia-smi", "-L"], check=True, capture_output=True, text=True).stdout
    return [str(place) for place, _ in enumerate(listed.splitlines())]


def start(arm: Arm, gpu: str, arguments: argparse.Namespace, *, limit: float) -> subprocess.Popen[bytes]:
    command = arm.command(arguments.model, arguments.out, limit=limit, more=arguments.more)
    notes = {"ART_MCP_GPU_MODEL": str(arguments.model), "ART_MCP_GPU_NOTES": str(arguments.out / "gradients.json")}
    with (arguments.out / f"{arm.name}.log").open("wb") as log:
        log.write(f"{shlex.join(command)}\n".encode())
        log.flush()
        where = {**os.environ, **notes, "CUDA_VISIBLE_DEVICES": gpu, "PYTHONUNBUFFERED": "1"}
        launcher, words = launch_command(command[0], command[1:])  # which ends it when this process ends
        return subprocess.Popen([launcher, *words], env=where, stdout=log, stderr=subprocess.STDOUT)


def main() -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", choices=ARMS, help="which runs")
    parser.add_argument("--only", nargs="*", default=(), metavar="ARM", help="of these, only so called ones")
    parser.add_argument("--more", default="", metavar="OPTIONS", help="for each run, such as '--engine-replicas 5'")
    parser.add_argument(
        "--fastest", action="store_true", help="with the engine's options that were the fastest of OUT's `speed`"
    )
    parser.add_argument("--model", type=Path, required=True, help="the folder that `art-mcp prepare` wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=float, default=575.0, help="seconds for all, the start included")
    given = parser.parse_args()
    given.model, given.out = given.model.resolve(), given.out.resolve()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.fastest:
        given.more = f"{fastest(given.out)} {given.more}"
        print(f"engine: {given.more}", flush=True)
    chosen = [arm for arm in ARMS[given.arms] if not given.only or arm.name in given.only]
    if unknown := set(given.only) - {arm.name for arm in chosen}:
        parser.error(f"{given.arms} has no {', '.join(sorted(unknown))}, but {', '.join(arm.name for arm in ARMS[given.arms])}")
    limit = given.limit - SPARE - (time.monotonic() - began)
    running = {arm.name: start(arm, gpu, given, limit=limit) for arm, gpu in zip(chosen, gpus(), strict=False)}
    if not running:
        parser.error("there is no GPU")
    left = [arm.name for arm in chosen if arm.name not in running]
    if left:
        print(f"no GPU is left for {', '.join(left)}: run again with --only {' '.join(left)}")
    failed = 0
    for name, process in running.items():
        failed += process.wait() != 0
        last = (given.out / f"{name}.log").read_text(errors="replace").splitlines()[-1:]
        print(f"{name}: exit code {process.returncode}: {' '.join(last)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
