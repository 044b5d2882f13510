"""Runs as those behind the GPU pages of docs/results (whose JSON files have each one's own command), one on each GPU of a host
at a time, within a time that they share.

    art-mcp prepare MODEL PREPARED
    python -m benchmarks.gpu_arms weak   --model PREPARED --out OUT --limit 2000
    python -m benchmarks.gpu_arms others --model PREPARED --out OUT --limit 1600
    python -m benchmarks.gpu_arms speed  --model PREPARED --out OUT --limit 500

`weak` is the two halves of three seeds from a weak start and of their control; `others` the main line, tests (of gradients, of
the main line's adapter elsewhere, of kill -9), rewards alone, and a second control; `checks` a step's time by phase, and what
the weak start learns without the correction of what the sampler is from the trainer; `speed` what graphs and servers bring to
the first seed's rollouts. Several sets may be given (`weak others`). Where there are fewer GPUs than arms, they wait for one
another, in this order; the next one's engine starts while the last one's answers are evaluated, a lone test after that, for
which that GPU is kept. The limits are for two GPUs; arms for which too little is left are named. Each writes OUT/ARM.log and
OUT/ARM/result.json (the step's time step_budget.json, those of `speed` rollout_speed.json), and tests OUT/ARM.json. What OUT
has finished already is not run again, but for tests.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from art_mcp.child import launch_command

ENGINE = "--engine vllm --micro-batch-tokens 8192 --engine-replicas 3 --memory-share 0.25 --tool-processes 1"
SHARED = "--groups 128 --rollouts 8 --share learning --progress 0.3 --temperature 1.2 --overlap 2 --seconds 288 --eval-n 500"
WEAK = f"--trainer torch {SHARED} --warm-epochs 4 --warm-batch 32 --learning-rate 2e-4 --reserve 45"
FIRST = f"{WEAK} --warm-start 200 --no-before --no-beyond"
MAIN = (
    f"{SHARED} --warm-start 6600 --warm-levels [2,3,6,10,12] --warm-rate 3e-4 --warm-batch 64 --learning-rate 1e-4 "
    "--final-rate 2e-5 --reserve 65"
)
ALONE = (
    "--trainer torch --warm-start 0 --lenient --progress 0.3 --groups 32 --rollouts 8 --seconds 300 --learning-rate 1e-4 "
    "--eval-n 500 --no-before"
)
SHORT = "--trainer unsloth --warm-start 512 --seconds 40 --reserve 45 --eval-n 50 --no-before --no-beyond"
GRADIENTS = "tests/gpu/test_gradients.py -k 'not every_token'"
ELSEWHERE = "tests/gpu/test_adapter_elsewhere.py tests/gpu/test_full_weights.py tests/gpu/test_unsloth_loading.py"
BUDGET = "--resume OUT/weak-1-first/saved --trainer torch --groups 128 --rollouts 8 --steps 5"
SPEED = "--resume OUT/weak-1-first/saved --settings 64x8@512AA --rounds 2"
DECODING = """--engine-args '{"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", \
"cudagraph_capture_sizes": [1, 8, 32, 64, 128, 192, 256, 384, 512]}}'"""
"""CUDA graphs of steps in which no request begins, which was the fast start of earlier sessions."""
SPARE = 12.0
"""Seconds of the limit that an arm is not given: for its end."""
WRITES = {"gpu_calculator": "result.json", "gpu_rollout_speed": "rollout_speed.json", "gpu_step_budget": "step_budget.json"}
LEFT = ("evaluating", "finished")
"""The statuses of a run that has left its model."""
BESIDE = "--memory-share 0.45"
"""Of the memory that is free while the arm before it, on the same GPU, still evaluates: as much as its own share of all."""


def second_half(first: str) -> str:
    return f"{WEAK} --final-rate 1e-4 --resume OUT/{first}/saved --against OUT/{first}/result.json"


@dataclass(frozen=True, slots=True)
class Arm:
    """A run of `gpu_calculator`, or of another of the modules, with these options, that goes on from what another arm left; and
    then perhaps a test of what it left. Without options it is a test alone, of what the other arm left if there is one.
    `least` is the seconds without which it is not begun: the start, and for training what is asked for."""

    name: str
    options: str = ""
    after: str = ""
    tested: str = ""
    module: str = "gpu_calculator"
    least: float = 400.0

    def status(self, out: Path) -> str:
        """How far it is, as its file says."""
        path = out / self.name / WRITES[self.module]
        return str(json.loads(path.read_text())["status"]) if path.is_file() else ""

    def has_left(self, out: Path) -> bool:
        """Whether its model is there, and its GPU needed for no more than evaluations."""
        return self.module == "gpu_calculator" and not self.tested and self.status(out) in LEFT

    def is_ready(self, out: Path) -> bool:
        """Whether what it goes on from is there; for a test alone, with its figures."""
        if not self.after:
            return True
        return ALL[self.after].has_left(out) if self.options else ALL[self.after].is_done(out)

    def is_done(self, out: Path) -> bool:
        """Whether there is nothing to run; a test is always run."""
        return not self.tested and self.status(out) == "finished"

    def command(self, model: Path, out: Path, *, limit: float, more: str = "") -> list[str]:
        folder = out / self.name
        options = [word.replace("OUT/", f"{out}/") for word in shlex.split(f"{ENGINE} {self.options} {more}")]
        saved = ["--save", str(folder / "saved")] if self.module == "gpu_calculator" else []
        paths = ["--model", str(model), *saved, "--out", str(folder), "--deadline", f"{limit:.0f}"]
        run = [sys.executable, "-m", f"benchmarks.{self.module}", *paths, *options]
        if not self.tested:
            return run
        shown = shlex.quote(str(out / (self.after or self.name)))
        test = f"ART_MCP_GPU_RUN={shown} {sys.executable} -m pytest -vv -p no:cacheprovider -m gpu {self.tested}"
        dumping = shlex.join([*run, "--dump", str(folder / "samples.json")])
        return ["timeout", str(int(limit)), "sh", "-c", f"{dumping} && {test}" if self.options else test]


def both_halves(name: str, options: str) -> list[Arm]:
    first, second = f"{name}-first", f"{name}-second"
    return [Arm(first, f"{FIRST} {options}"), Arm(second, f"{second_half(first)} {options}", after=first)]


def speed_of(name: str, options: str) -> Arm:
    return Arm(name, f"{SPEED} {options}", after="weak-1-first", module="gpu_rollout_speed", least=150.0)


WEAK_1, WEAK_2, WEAK_3 = (both_halves(f"weak-{seed}", f"--seed {seed}") for seed in (1, 2, 3))
CONTROL_1 = both_halves("control-1", "--seed 1 --control shuffled")
ARMS = {
    "weak": [WEAK_1[0], WEAK_2[0], WEAK_1[1], CONTROL_1[0], WEAK_2[1], CONTROL_1[1], *WEAK_3],
    "others": [
        Arm("main-unsloth", f"{MAIN} --trainer unsloth --seed 16 --before sampled --dump OUT/main-unsloth/samples.json"),
        Arm("gradients", SHORT, tested=GRADIENTS, least=240.0),
        Arm("main-torch", f"{MAIN} --trainer torch --seed 17 --no-before"),
        Arm("elsewhere", after="main-unsloth", tested=ELSEWHERE, least=300.0),
        Arm("kills", tested="tests/gpu/test_kills.py", least=120.0),
        Arm("rewards-alone", f"{ALONE} --seed 1"),
        Arm("control-2-first", f"{FIRST} --seed 2 --control shuffled"),
    ],
    "checks": [
        Arm("budget", BUDGET, after="weak-1-first", module="gpu_step_budget", least=220.0),
        Arm("uncorrected", f"{FIRST} --seed 1 --objective reinforce"),
    ],
    "speed": [
        speed_of("speed-3", "--engine-replicas 3"),
        speed_of("speed-3-here", "--engine-replicas 3 --tool-processes 0"),
        speed_of("speed-3-decoding", f"--engine-replicas 3 {DECODING}"),
        speed_of("speed-1", "--engine-replicas 1"),
        speed_of("speed-5", "--engine-replicas 5"),
    ],
}
ALL = {arm.name: arm for arms in ARMS.values() for arm in arms}


def gpus() -> list[str]:
    """The GPUs that may be used, by the names that CUDA_VISIBLE_DEVICES takes."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked is not None:
        return [name for name in asked.split(",") if name]
    listed = subprocess.run(["nvidia-smi", "-L"], check=True, capture_output=True, text=True).stdout
    return [str(place) for place, _ in enumerate(listed.splitlines())]


def start(arm: Arm, gpu: str, given: argparse.Namespace, *, limit: float, beside: bool) -> subprocess.Popen[bytes]:
    command = arm.command(given.model, given.out, limit=limit, more=f"{BESIDE * beside} {given.more}")
    notes = {"ART_MCP_GPU_MODEL": str(given.model), "ART_MCP_GPU_NOTES": str(given.out / f"{arm.name}.json")}
    with (given.out / f"{arm.name}.log").open("wb") as log:
        log.write(f"{shlex.join(command)}\n".encode())
        log.flush()
        where = {**os.environ, **notes, "CUDA_VISIBLE_DEVICES": gpu, "PYTHONUNBUFFERED": "1"}
        launcher, words = launch_command(command[0], command[1:])  # which ends it when this process ends
        return subprocess.Popen([launcher, *words], env=where, stdout=log, stderr=subprocess.STDOUT)


class Queue:
    """The arms that wait for a GPU or for another arm, and those that run. An arm leaves its GPU to the next one when it has
    trained and been compared with raw vLLM."""

    def __init__(self, arms: Sequence[Arm], given: argparse.Namespace, *, until: float) -> None:
        self._given, self._until = given, until
        self._waiting = list(arms)
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._holding: dict[str, Arm | None] = dict.fromkeys(gpus())
        if not self._holding:
            raise SystemExit("there is no GPU")
        self.failed = self.left = 0

    def run(self) -> None:
        while self._running or self._begin():
            time.sleep(0.5)
            self._end()
            self._begin()
        self.left = len(self._waiting)
        if self.left:
            names = " ".join(arm.name for arm in self._waiting)
            print(f"not begun, for lack of time or of what they go on from: run again with --only {names}")

    def _begin(self) -> bool:
        """Gives free GPUs to the arms that can begin; whether any did."""
        begun = False
        tests = sum(not arm.options and arm.is_ready(self._given.out) for arm in self._waiting)
        for gpu, before in self._holding.items():
            left = self._until - time.monotonic()
            beside = before is not None and before.name in self._running
            free = not beside or (before is not None and before.has_left(self._given.out))
            if free and beside and tests:
                tests -= 1  # it is kept for a test, which asks for the GPU's whole memory
                continue
            able = [arm for arm in self._waiting if arm.is_ready(self._given.out) and left > (self._given.least or arm.least)]
            able = [arm for arm in able if arm.options or not beside]
            if free and able:
                arm = able[0]
                self._waiting.remove(arm)
                self._running[arm.name] = start(arm, gpu, self._given, limit=left, beside=beside)
                self._holding[gpu] = arm
                print(f"[{self._given.limit - SPARE - left:6.1f} s] {arm.name} begins on GPU {gpu}", flush=True)
                begun = True
        return begun

    def _end(self) -> None:
        for name, process in list(self._running.items()):
            if process.poll() is not None:
                del self._running[name]
                self.failed += process.returncode != 0
                last = (self._given.out / f"{name}.log").read_text(errors="replace").splitlines()[-1:]
                print(f"{name}: exit code {process.returncode}: {' '.join(last)}", flush=True)


def main() -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", choices=ARMS, help="which runs")
    parser.add_argument("--only", nargs="*", default=(), metavar="ARM", help="of these, only so called ones")
    parser.add_argument("--more", default="", metavar="OPTIONS", help="for each run, such as '--engine-replicas 5'")
    parser.add_argument("--least", type=float, metavar="SECONDS", help="begin an arm with so much left: it trains shorter")
    parser.add_argument("--model", type=Path, required=True, help="the folder that `art-mcp prepare` wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=float, default=575.0, help="seconds for all, the start included")
    given = parser.parse_args()
    given.model, given.out = given.model.resolve(), given.out.resolve()
    given.out.mkdir(parents=True, exist_ok=True)
    offered = [arm for name in given.arms for arm in ARMS[name]]
    chosen = [arm for arm in offered if not given.only or arm.name in given.only]
    if unknown := set(given.only) - {arm.name for arm in chosen}:
        parser.error(f"no {', '.join(sorted(unknown))} among {', '.join(arm.name for arm in offered)}")
    queue = Queue([arm for arm in chosen if not arm.is_done(given.out)], given, until=began + given.limit - SPARE)
    queue.run()
    return 1 if queue.failed or queue.left else 0


if __name__ == "__main__":
    sys.exit(main())
