"""Can reward discover two calls in a row, which no demonstration showed? `python -m benchmarks.beyond --json`

Warm starts that were shown one call and then an answer, trained by reward on the calculator. `ARMS` says what each arm changes.
Every arm and seed leaves one file under --folder; what is there is not made again. One process at a time, one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import anyio

from art_mcp.agent.loop import Plan, train_loop
from art_mcp.types import TrainConfig
from benchmarks.report import hand_out
from benchmarks.second_calls import ROOT, SIGNS, Counts, Pushing, Stage, calculator, measure, open_stage, second_call_chances

EVERY = 25
"""Steps between two looks at how likely a second call is."""


@dataclass(frozen=True, slots=True)
class Start:
    """A warm start: what scripts/build_tiny_policy.py is told, and the folder whose weights it goes on from ("-clean": those
    of another start before its noisy stage)."""

    options: str
    parent: str = ""


STARTS: Mapping[str, Start] = {
    "unread": Start("--levels 1 --steps 900 250"),
    "read": Start("--levels 1 2 --carried 0 --steps 350 250", "unread-clean"),
    "shown-1%": Start("--levels 1 2 --carried 0.01 --steps 0 60", "read"),
    "shown-5%": Start("--levels 1 2 --carried 0.05 --steps 0 60", "read"),
    "shown-20%": Start("--levels 1 2 --carried 0.2 --steps 0 120", "read"),
    "shown-50%": Start("--levels 1 2 --carried 0.5 --steps 0 200", "read"),
}
"""unread: never saw a question of two operations. read: saw them, answered with the result of the first call. shown: read, and
60 to 200 noisy batches of 48 more, in which a share of those questions is worked out to the end."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One setting. `seeds`: from 0 on. `alone`: steps at the beginning that draw level 2 alone, before the default mix.
    `credit`: 0.3 for each of these SIGNS; `without`: the environment's rewards that are left out. `push`: the share of the
    turns after a first result that are made to call again."""

    start: str
    seeds: int = 1
    steps: int = 60
    groups: int = 16
    rollouts: int = 8
    temperature: float = 1.0
    alone: int = 0
    credit: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    push: float = 0.0


LADDER = ("second", "takes-up")

ARMS: Mapping[str, Arm] = {
    "unread": Arm("unread", seeds=3, steps=100),
    "read": Arm("read", seeds=3, steps=100),
    "rollouts-32": Arm("read", steps=30, rollouts=32),
    "level-2-alone": Arm("read", steps=100, alone=100),
    "temperature-1.5": Arm("read", temperature=1.5),
    "temperature-2": Arm("read", temperature=2.0),
    "credit": Arm("read", credit=LADDER),
    "push": Arm("read", push=0.25, credit=LADDER),
    "all-1.5": Arm("read", alone=60, temperature=1.5, push=0.25, credit=LADDER),
    "forgiving": Arm("read", alone=60, temperature=1.5, push=0.25, credit=LADDER, without=("malformed",)),
    "shown-1%": Arm("shown-1%", steps=100),
    "shown-5%": Arm("shown-5%", steps=100),
    "shown-20%": Arm("shown-20%", steps=100),
    "shown-20%-credit": Arm("shown-20%", steps=100, credit=LADDER),
    "shown-50%": Arm("shown-50%", seeds=3, steps=100),
    "shown-50%-credit": Arm("shown-50%", steps=150, credit=LADDER),
}


def legs(arm: Arm) -> Iterator[tuple[int, str]]:
    """The training in legs: up to which step, on which levels."""
    for until in sorted({*range(EVERY, arm.steps, EVERY), arm.alone, arm.steps} - {0}):
        yield until, "2" if until <= arm.alone else "1-2"


async def not_kept(step: int) -> None:
    """The weights that an arm ends with are of no further use."""


async def train(stage: Stage, arm: Arm, *, seed: int) -> dict[str, Any]:
    """The arm's tallies step by step, and the chances of a second call on the way."""
    counts = Counts(calculator())
    chances = {"0": await second_call_chances(stage)}
    for until, levels in legs(arm):
        await train_loop(
            Pushing(stage.model, arm.push) if arm.push else stage.model,
            calculator(levels, credit=arm.credit, without=arm.without),
            toolbox=stage.toolbox,
            plan=Plan(steps=until, groups=arm.groups, rollouts=arm.rollouts, seed=seed),
            config=TrainConfig(temperature=arm.temperature, seed=seed),
            recorder=counts,
            save=not_kept,
        )
        chances[str(until)] = await second_call_chances(stage)
    return {"steps": counts.steps, "chances": chances}


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers", "mcp")}}


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the file holds; `make()` is asked for it where there is none yet."""
    if not path.exists():
        began = time.monotonic()
        result = {**make(), "seconds": round(time.monotonic() - began), "versions": versions()}
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps(result))
        aside.replace(path)
        print(f"{path.stem}: {result['seconds']} s", file=sys.stderr, flush=True)
    return json.loads(path.read_text())


def in_loop(look: Callable[..., Any], built: Callable[[], Path], **options: int) -> dict[str, Any]:
    """What the async `look` finds of a warm start, which is built first where it is missing."""
    return anyio.run(partial(look, built(), **options))


def build_start(name: str, folder: Path) -> Path:
    """The folder of a warm start, which is made first where it is missing."""
    out, start = folder / name, STARTS[name]
    if not (out / "config.json").exists():
        command = [sys.executable, str(ROOT / "scripts" / "build_tiny_policy.py"), "--out", str(out), *start.options.split()]
        if start.parent:
            build_start(start.parent.removesuffix("-clean"), folder)
            command += ["--start", str(folder / start.parent)]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=sys.stderr, check=True)
    return out


async def look_before(source: Path, *, n: int) -> dict[str, Any]:
    """A warm start before any reward, with the chances of a second call at higher temperatures too."""
    async with open_stage(str(source)) as stage:
        warmer = {str(t): await second_call_chances(stage, temperature=t) for t in (1.3, 1.5, 2.0)}
        return {**await measure(stage, n=n, seed=0), "warmer": warmer}


def settings(arm: Arm) -> dict[str, Any]:
    """What a result depends on beside its seed, as JSON gives it back."""
    return {name: value for name, value in json.loads(json.dumps(asdict(arm))).items() if name != "seeds"}


async def run_arm(arm: Arm, source: Path, *, seed: int, n: int) -> dict[str, Any]:
    async with open_stage(str(source), seed=seed) as stage:
        trained = await train(stage, arm, seed=seed)
        return {"arm": settings(arm), "seed": seed, "training": trained, "after": await measure(stage, n=n, seed=seed)}


def added(tallies: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {name: sum(tally[name] for tally in tallies) for name in ("n", "solved", *SIGNS)}


def by_leg(training: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tallies of each EVERY steps added up, with the chances of a second call at their end."""
    found: list[dict[str, Any]] = []
    first = 0
    for until in [int(until) for until in training["chances"] if until != "0"]:
        leg = training["steps"][first:until]
        sums = {level: added([step[level] for step in leg if level in step]) for level in ("1", "2")}
        reward = round(fmean(step["reward"] for step in leg), 4)
        found.append({"until": until, "reward": reward, **sums, "chances": training["chances"][str(until)]})
        first = until
    return found


def line(name: str, figures: Mapping[str, Any], training: Sequence[Mapping[str, Any]] = ()) -> str:
    """One row of the table: solved by level in both decodings, and second calls."""
    shares = [
        f"{one['solved'] / one['n']:.3f} [{one['ci95'][0]:.3f}, {one['ci95'][1]:.3f}]"
        for decoding in ("greedy", "sampled")
        for one in (figures[decoding][level] for level in ("1", "2"))
    ]
    again = figures["sampled"]["2"]
    cells = [name, *shares, f"{again['second'] / again['n']:.3f}", f"{figures['chances']['begun']:.1e}"]
    if training:
        cells.append("/".join(str(sum(leg["2"][key] for leg in training)) for key in ("second", "takes-up", "solved", "n")))
    return " | ".join(cells)


HEADING = (
    "run | greedy, one | greedy, two | T=1, one | T=1, two | second calls at T=1 | P(second) | "
    "training, two operations: second calls/taking up/solved/rollouts"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS), metavar="ARM", help=", ".join(ARMS).replace("%", "%%")
    )
    parser.add_argument("--eval-n", type=int, default=1000, help="held-out questions, half of each level")
    parser.add_argument("--folder", type=Path, default=Path("runs/beyond"), help="warm starts and the results of each arm")
    parser.add_argument("--out", type=Path, help="also write the result here")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    arguments = parser.parse_args()
    folder, n = arguments.folder, arguments.eval_n
    starts: dict[str, Any] = {}
    runs: dict[str, Any] = {}
    for name, arm in ((name, ARMS[name]) for name in arguments.arms):
        built = partial(build_start, arm.start, folder / "starts")
        before = partial(in_loop, look_before, built, n=n)
        starts[arm.start] = kept(folder / "results" / f"before-{arm.start}.json", before)
        for seed in range(arm.seeds):
            path = folder / "results" / f"{name}-{seed}.json"
            run = kept(path, partial(in_loop, partial(run_arm, arm), built, seed=seed, n=n))
            if run["arm"] != settings(arm):
                parser.error(f"{path} was made with other settings: remove it")
            runs[f"{name}/{seed}"] = {**run, "training": by_leg(run["training"])}
    summary = {
        "date": date.today().isoformat(),
        "command": " ".join(["python -m benchmarks.beyond", *sys.argv[1:]]),
        "starts": {name: asdict(STARTS[name]) for name in starts},
        "before": starts,
        "runs": runs,
    }
    print(HEADING)
    for name, figures in starts.items():
        print(line(f"before: {name}", figures))
    for name, run in runs.items():
        print(line(name, run["after"], run["training"]))
    hand_out(summary, arguments)


if __name__ == "__main__":
    main()
