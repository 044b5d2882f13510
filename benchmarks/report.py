"""What every benchmark against peers has in common: its options, its result as lines and as JSON, and where it was taken."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.pairs import METHOD

PAIRS, QUICK_PAIRS = 15, 3


def read_options(doc: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with `pairs` resolved."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_PAIRS} short pairs: shows that it runs, measures nothing")
    parser.add_argument("--pairs", type=int, help=f"how many pairs a case (default: {PAIRS})")
    parser.add_argument("--out", type=Path, help="also write the JSON object here")
    options = parser.parse_args(argv)
    options.pairs = options.pairs or (QUICK_PAIRS if options.quick else PAIRS)
    return options


def result_of(
    name: str, cases: Mapping[str, Mapping[str, Any]], *, versions: Mapping[str, str], bounds: Mapping[str, float], **more: Any
) -> dict[str, Any]:
    """The JSON object: `ratios` (ours ÷ peer as rates, so larger is better), the least that they should be by case, and the
    figures behind them in `cases`."""
    ratios = {case: figures["ratio"]["median"] for case, figures in cases.items()}
    return {
        "benchmark": name,
        "ratios": ratios,
        "bounds": dict(bounds),
        "holds": all(ratios[case] >= bound for case, bound in bounds.items()),
        "method": METHOD,
        "cases": dict(cases),
        **more,
        "versions": dict(versions),
        "machine": describe_machine(),
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
    }


def publish(result: Mapping[str, Any], options: argparse.Namespace) -> None:
    """The ratios as lines, then what `options` ask for."""
    for case, figures in result["cases"].items():
        print(line_of(case, figures))
    hand_out(result, options)


def hand_out(result: Mapping[str, Any], options: argparse.Namespace) -> None:
    """The result as `options` ask for it: in the file `out`, and with `json` as the last line."""
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {options.out}")
    if options.json:
        print(json.dumps(result))


def line_of(case: str, figures: Mapping[str, Any]) -> str:
    ratio = figures["ratio"]
    low, high = ratio["interval"]
    ours, peer = figures["ours_seconds"]["median"], figures["peer_seconds"]["median"]
    return f"{case:<16} {ratio['median']:>7.2f} × the peer  [{low:.2f}, {high:.2f}]   {duration(ours)} against {duration(peer)}"


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def own_versions(*packages: str) -> dict[str, str]:
    return {"python": platform.python_version(), **{package: version(package) for package in ("art-mcp", *packages)}}


def describe_machine() -> dict[str, Any]:
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def processor() -> str:
    """The processor's model where the system tells it (Linux), else its architecture."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
