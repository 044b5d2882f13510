"""What it costs to start, against verifiers, a library of environments for RL: `python -m benchmarks.start --json`

Fresh processes in turns, from start to end, Python's own start (`python -c pass`) included and reported beside: importing
the package, ours against `import verifiers.v1`, where its public names are; and the help of the command line, ours against
`vf-eval --help`. `import mcp` is there for scale: who uses tools needs it sooner or later, ours when a server is opened.
Also checked: neither loads a heavy library.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.pairs import compare, figure, rounds
from benchmarks.peer import interpreter
from benchmarks.report import duration, own_versions, publish, read_options, result_of

HEAVY = ("torch", "transformers", "vllm", "mcp", "openai", "weave")
LIMITS = {"import": 0.3, "help": 0.5}
"""Seconds on a quiet machine."""

MAIN = "from art_mcp.cli.main import main; main()"
OURS = {"import": ("-c", "import art_mcp"), "help": ("-c", MAIN, "--help")}
BESIDE = {"python": ("-c", "pass"), "import mcp": ("-c", "import mcp")}

AT_EXIT = f"""
import atexit, sys
atexit.register(lambda: sys.stderr.write("loaded " + " ".join(name for name in {HEAVY} if name in sys.modules)))
"""


def time_process(command: Sequence[str]) -> float:
    """Seconds from start to end."""
    began = perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, check=True)
    return perf_counter() - began


def time_in_turns(commands: Mapping[str, Sequence[str]], *, pairs: int) -> dict[str, list[float]]:
    for command in commands.values():
        time_process(command)  # once uncounted: byte code is compiled, files are in memory
    times: dict[str, list[float]] = {name: [] for name in commands}
    for name in rounds(list(commands), pairs):
        times[name].append(time_process(commands[name]))
    return times


def heavy_modules(arguments: Sequence[str]) -> list[str]:
    """The heavy libraries that a process with these arguments has loaded by its end."""
    flag, program, *rest = arguments
    command = [sys.executable, flag, AT_EXIT + program, *rest]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    _, reported, names = done.stderr.rpartition("loaded ")
    if not reported:
        raise SystemExit(f"{program!r} did not report what it loaded: {done.stderr}")
    return names.split()


def own_commands() -> dict[str, list[str]]:
    return {name: [sys.executable, *arguments] for name, arguments in (OURS | BESIDE).items()}


def peer_commands() -> dict[str, list[str]]:
    python: Path = interpreter("verifiers")
    return {
        "peer import": [str(python), "-c", "import verifiers.v1"],
        "peer help": [str(python.with_name("vf-eval")), "--help"],
    }


def peer_version(python: Path) -> str:
    program = "from importlib.metadata import version; print(version('verifiers'))"
    return subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def seconds_of(times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The figures of ours and of what stands beside it; and whether ours keep to the limits."""
    within = {name: figure(times[name])["median"] < limit for name, limit in LIMITS.items()}
    seconds = {name: figure(values) for name, values in times.items() if not name.startswith("peer")}
    return {"seconds": seconds, "limits_seconds": LIMITS, "within_limits": within}


def measure(*, pairs: int) -> dict[str, Any]:
    times = time_in_turns(own_commands() | peer_commands(), pairs=pairs)
    cases = {name: compare(times[name], times[f"peer {name}"]) for name in OURS}
    versions = own_versions("typer", "pydantic", "mcp") | {"verifiers": peer_version(interpreter("verifiers"))}
    loaded = {name: heavy_modules(arguments) for name, arguments in OURS.items()}
    return result_of("start", cases, versions=versions, bounds=dict.fromkeys(OURS, 1.0), loaded=loaded, **seconds_of(times))


def main(argv: Sequence[str] | None = None) -> None:
    options = read_options(__doc__, argv)
    result = measure(pairs=options.pairs)
    for name, seconds in result["seconds"].items():
        low, high = seconds["interval"]
        limit = f", at most {duration(LIMITS[name])}" if name in LIMITS else ""
        print(f"{name:<16} {duration(seconds['median'])}  [{duration(low)}, {duration(high)}]{limit}")
    print(f"heavy libraries loaded: {json.dumps(result['loaded'])}")
    publish(result, options)


if __name__ == "__main__":
    main()
