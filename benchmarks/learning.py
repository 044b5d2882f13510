"""Does the main job learn, and does its control not? `python -m benchmarks.learning --seeds 3 --json`

Each seed is the command of `make train` (with a number of steps in place of a number of seconds, so that a busy machine
changes nothing) and, with the same hyperparameters, `--control shuffled`: rewards dealt out anew over the whole batch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.report import hand_out

BOUND_SOLVED, BOUND_CONTROL = 0.9, 0.1


def train(seed: int, control: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run of the command line in a process of its own; its report."""
    name = f"learning-{int(time.time())}-{os.getpid()}-{seed}-{control}"
    command = [
        *(sys.executable, "-c", "from art_mcp.cli.main import main; main()", "train", "calculator"),
        *("--steps", str(arguments.steps), "--seed", str(seed), "--control", control, "--name", name),
        *("--eval-n", str(arguments.eval_n), "--save-every", "0", "--json"),
    ]
    print(f"seed {seed}, control {control}: started", file=sys.stderr, flush=True)
    began = time.monotonic()
    threads = {"OMP_NUM_THREADS": "1"} if arguments.jobs > 1 else {}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **threads}, check=True)
    report = json.loads(done.stdout.splitlines()[-1])
    print(f"seed {seed}, control {control}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return report


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """Before and after for each decoding, overall and by level."""
    found: dict[str, Any] = {"steps": report["steps"], "train_seconds": round(report["train_seconds"], 1)}
    for decoding in ("greedy", "sampled"):
        before, after = report["before"][decoding], report["after"][decoding]
        found[decoding] = {
            "before": before["solved"],
            "before_ci95": before["ci95"],
            "after": after["solved"],
            "after_ci95": after["ci95"],
            "gain": after["solved"] - before["solved"],
            "n": after["n"],
            "by_level": {
                level: {
                    "before": before["by_level"][level]["solved"],
                    "after": one["solved"],
                    "ci95": one["ci95"],
                    "n": one["n"],
                }
                for level, one in after["by_level"].items()
            },
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each run")
    parser.add_argument("--eval-n", type=int, default=1000, help="held-out scenarios, half of each level")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (more than one: one torch thread each)")
    parser.add_argument("--out", type=Path, help="also write the result here")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    arguments = parser.parse_args()
    jobs = [(seed, control) for seed in range(arguments.seeds) for control in ("none", "shuffled")]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        reports = list(pool.map(lambda job: train(*job, arguments), jobs))
    results = {f"{seed}/{control}": figures(report) for (seed, control), report in zip(jobs, reports, strict=True)}
    solved = [
        one[decoding]["after"] for key, one in results.items() if key.endswith("none") for decoding in ("greedy", "sampled")
    ]
    gains = [
        one[decoding]["gain"] for key, one in results.items() if key.endswith("shuffled") for decoding in ("greedy", "sampled")
    ]
    summary = {
        "date": date.today().isoformat(),
        "command": " ".join(["python -m benchmarks.learning", *sys.argv[1:]]),
        "solved_min": min(solved),
        "control_gain_max": max(gains),
        "holds": min(solved) >= BOUND_SOLVED and max(gains) <= BOUND_CONTROL,
        "runs": results,
    }
    for key, one in results.items():
        for decoding in ("greedy", "sampled"):
            print(f"seed/control {key:<12} {decoding:<8} {one[decoding]['before']:.3f} -> {one[decoding]['after']:.3f}")
    hand_out(summary, arguments)


if __name__ == "__main__":
    main()
