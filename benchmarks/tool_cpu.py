"""How much of a program's core a tool call takes: the raw MCP SDK's client in it, against a toolbox whose connection another
process holds: `python -m benchmarks.tool_cpu --json`

CPU time of the calling process alone, all its threads, for the same calls as in `tool_calls`, 64 under way at a time. `here` is
the same for a toolbox that holds its connection itself. In process, the SDK's client has its server in the same process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from time import process_time
from typing import Any

import anyio

from art_mcp.types import ServerSpec
from benchmarks.pairs import compare, rounds
from benchmarks.report import line_of, own_versions, publish, read_options, result_of
from benchmarks.tool_calls import CALLS, CASES, Call, our_call, raw_call, serving, time_batch

BOUND = 2.0
TOGETHER = 64
Open = Callable[[ServerSpec], AbstractAsyncContextManager[Call]]
WAYS: dict[str, Open] = {"ours": lambda spec: our_call(spec, processes=1), "here": our_call, "peer": raw_call}


async def compare_transport(transport: str, *, pairs: int, calls: int) -> dict[str, dict[str, Any]]:
    """The figures of `ours`, and of `here`, beside the SDK's."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    with serving(transport) as spec:
        async with AsyncExitStack() as stack:
            sides = {way: await stack.enter_async_context(open_side(spec)) for way, open_side in WAYS.items()}
            for number, way in enumerate(rounds(list(WAYS), pairs + 1)):
                seconds = await time_batch(sides[way], calls, together=TOGETHER, clock=process_time)
                if number >= len(WAYS):  # the first round warms up
                    times[way].append(seconds)
    return {way: compare(times[way], times["peer"]) for way in ("ours", "here")}


def measure(transports: Sequence[str] = tuple(CASES), *, pairs: int, calls: int) -> dict[str, Any]:
    found = {case: anyio.run(lambda case=case: compare_transport(CASES[case], pairs=pairs, calls=calls)) for case in transports}
    cases = {case: figures["ours"] for case, figures in found.items()}
    return result_of(
        "tool_cpu",
        cases,
        versions=own_versions("mcp", "anyio", "pydantic"),
        bounds=dict.fromkeys(cases, BOUND),
        here={case: figures["here"] for case, figures in found.items()},
        together=TOGETHER,
        calls_a_batch=calls,
    )


def main(argv: Sequence[str] | None = None) -> None:
    options = read_options(__doc__, argv)
    result = measure(pairs=options.pairs, calls=4 * CALLS[options.quick])
    for case, figures in result["here"].items():
        print(line_of(f"{case} here", figures))
    publish(result, options)


if __name__ == "__main__":
    main()
