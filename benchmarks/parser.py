"""Tool calls out of a policy's turn, against vLLM's Hermes parser: `python -m benchmarks.parser --json`

Both sides go from the text to names and argument dicts, in turns, each in its own process, the peer with a parser for each
text, as vLLM's server has one for each request. Ours checks arguments against the tool's schema too, which the peer does
not: the ratios leave that out, `validation_seconds` is its time and `validated` the ratio with it. `kept` is the ratio
to a parser that is made once for all texts, `served` that to all that vLLM's server does around its parser.

Beside the ratios: long texts, and broken ones, with the calls that each side recovers of the three that were begun (vLLM
gives up a whole turn at once; that it logs why, with a traceback, is switched off).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from art_mcp.core import read_call
from art_mcp.core.arguments import validate
from art_mcp.core.parse import parse_calls
from art_mcp.types import Malformed, ToolCall
from benchmarks.pairs import compare, figure, repeats_for, rounds, settled, time_of
from benchmarks.peer import Ask, open_peer
from benchmarks.report import duration, own_versions, publish, read_options, result_of
from benchmarks.tool_call_texts import BROKEN, LONG, TOOLS, WELL_FORMED

TOKENIZER = Path(__file__).resolve().parent.parent / "art_mcp" / "tiny_policy"
BOUND = 5.0
SECONDS = {False: 0.1, True: 0.002}
"""How long one measurement of a pair takes, by whether it is a quick run."""
PEERS = ("anew", "kept", "served")


@contextmanager
def without_validation() -> Iterator[None]:
    """Takes out the one step that the peer does not have."""
    read_call.validate = lambda arguments, tool: None
    try:
        yield
    finally:
        read_call.validate = validate


def read(text: str) -> list[list[Any]]:
    """What can be called: names and arguments."""
    return [[call.name, call.arguments] for call in parse_calls(text, TOOLS).calls if isinstance(call, ToolCall)]


def reading(texts: Sequence[str]) -> Callable[[], None]:
    """Our side. Calls have names and argument dicts, so nothing is left to do after parsing."""

    def work() -> None:
        for text in texts:
            parse_calls(text, TOOLS)

    return work


def validating(texts: Sequence[str]) -> Callable[[], None]:
    """The schema validation of the calls in the texts alone."""
    offered = {tool.name: tool for tool in TOOLS}
    calls = [(arguments, offered[name]) for text in texts for name, arguments in read(text)]

    def work() -> None:
        for arguments, tool in calls:
            validate(arguments, tool)

    return work


def measure_sides(ask: Ask, case: str, texts: Sequence[str], *, pairs: int, seconds: float) -> dict[str, list[float]]:
    """Seconds a text of each side, taken in turns: "ours" without and "validated" with schemas, and the peer's ways."""
    work = reading(texts)
    repeats = repeats_for(work, seconds)
    peers_repeats = max(1, round(seconds / len(texts) / ask("time", case=case, repeats=3)))

    def time_side(side: str) -> float:
        if side in PEERS:
            return ask("time", case=case, repeats=peers_repeats, way=side)
        if side == "validated":
            return time_of(work, max(1, repeats // 4)) / len(texts)
        with without_validation():
            return time_of(work, repeats) / len(texts)

    times: dict[str, list[float]] = {side: [] for side in ("ours", "anew", "validated", "kept", "served")}
    for side in rounds(list(times), pairs):
        times[side].append(time_side(side))
    return times


def measure_cases(ask: Ask, cases: Mapping[str, Sequence[str]], *, pairs: int, seconds: float) -> dict[str, dict[str, Any]]:
    """The figures of each case: the ratio proper, the others beside it, and the time for validation alone."""
    found: dict[str, dict[str, Any]] = {}
    for case, texts in cases.items():
        times = measure_sides(ask, case, texts, pairs=pairs, seconds=seconds)
        work = validating(texts)
        repeats = repeats_for(work, seconds / 4)
        found[case] = compare(times["ours"], times["anew"]) | {
            "validation_seconds": figure([time_of(work, repeats) / len(texts) for _ in range(pairs)]),
            "validated": compare(times["validated"], times["anew"]),
            "kept": compare(times["ours"], times["kept"]),
            "served": compare(times["ours"], times["served"]),
        }
    return found


def check_agreement(ask: Ask) -> None:
    """Both sides must find the same in well-formed texts, or there is nothing to compare."""
    for case, texts in WELL_FORMED.items():
        for text, found in zip(texts, ask("found", case=case), strict=True):
            if read(text) != found:
                raise SystemExit(f"the sides differ on {text!r}: {read(text)} and {found}")


def recovered(ask: Ask, case: str, text: str) -> dict[str, int]:
    """Calls that can be made, of each side; and what ours says of the others."""
    calls = parse_calls(text, TOOLS).calls
    explained = sum(isinstance(call, Malformed) for call in calls)
    return {"ours": len(calls) - explained, "explained": explained, "peer": len(ask("found", case=case)[0])}


def measure(*, pairs: int, seconds: float) -> dict[str, Any]:
    with open_peer("vllm", "benchmarks.peers.hermes") as ask:
        single = {case: [text] for case, text in (LONG | BROKEN).items()}
        tools = [tool.schema() for tool in TOOLS]
        versions = ask("load", tokenizer=str(TOKENIZER), tools=tools, texts=WELL_FORMED | single)
        check_agreement(ask)
        with settled():
            cases = measure_cases(ask, WELL_FORMED, pairs=pairs, seconds=seconds)
            beside = measure_cases(ask, single, pairs=max(3, pairs // 2), seconds=seconds / 5)
        for case, (text,) in single.items():
            beside[case]["calls"] = recovered(ask, case, text)
    parts = {
        "long": {case: beside[case] for case in LONG},
        "broken": {case: beside[case] | {"begun": 3} for case in BROKEN},
        "texts": {case: len(texts) for case, texts in WELL_FORMED.items()},
        "longest_text_bytes": max(len(text.encode()) for texts in WELL_FORMED.values() for text in texts),
    }
    return result_of("parser", cases, versions=own_versions("pydantic") | versions, bounds=dict.fromkeys(cases, BOUND), **parts)


def print_beside(result: Mapping[str, Any]) -> None:
    for case, figures in (result["long"] | result["broken"]).items():
        calls, ratio = figures["calls"], figures["ratio"]["median"]
        made = f"calls made: {calls['ours']}, explained: {calls['explained']}, made by the peer: {calls['peer']}"
        print(f"{case:<38} {ratio:>7.2f} × the peer; {made}")
    for case, figures in result["cases"].items():
        ratios = {name: figures[name]["ratio"]["median"] for name in ("validated", "kept", "served")}
        checking = duration(figures["validation_seconds"]["median"])
        print(f"{case:<16} with validation, which takes {checking}: {ratios['validated']:.2f} × the peer")
        print(f"{case:<16} against a kept parser {ratios['kept']:.2f}, against vLLM's server {ratios['served']:.2f}")


def main(argv: Sequence[str] | None = None) -> None:
    options = read_options(__doc__, argv)
    result = measure(pairs=options.pairs, seconds=SECONDS[options.quick])
    print_beside(result)
    publish(result, options)


if __name__ == "__main__":
    main()
