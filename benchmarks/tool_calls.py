"""Tool calls a second through our toolbox, against the raw MCP SDK: `python -m benchmarks.tool_calls --json`

The same tool of the same server with the same arguments, over each transport, from one event loop: batches through the
toolbox and through the SDK's `Client` take turns, each with a connection of its own. SSE and HTTP connections lead to one
server process; a stdio or in-process connection has a server of its own, as always. The ratios are for 16 calls at a time;
one at a time is reported beside them (`alone`).
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import anyio
from mcp import Client, StdioServerParameters
from mcp.client.sse import sse_client

from art_mcp.child import launch_command
from art_mcp.tools import open_tools
from art_mcp.tools.inprocess import load_server
from art_mcp.types import ServerSpec, ToolCall
from benchmarks.pairs import compare, rounds, without_collections
from benchmarks.report import line_of, own_versions, publish, read_options, result_of

SERVER = Path(__file__).resolve().parent.parent / "servers" / "calculator" / "server.py"
CASES = {"in_process": "in-process", "stdio": "stdio", "sse": "sse", "http": "streamable-http"}
BOUND = 0.9
TOGETHER = 16
CALLS = {False: 320, True: 32}
"""Calls of one batch, by whether it is a quick run; one at a time, a quarter of that."""
TOOL, ARGUMENTS, ANSWER = "add", {"a": 1234.5, "b": -0.25}, "1234.25"

Call = Callable[[], Awaitable[str]]
"""Makes the call and gives the text of its result."""


@contextmanager
def serving(transport: str) -> Iterator[ServerSpec]:
    """Where the calculator is to be reached, until the block ends."""
    if transport == "in-process":
        yield ServerSpec("calculator", "in-process", target=f"{SERVER}:server")
    elif transport == "stdio":
        yield ServerSpec("calculator", "stdio", command=sys.executable, args=(str(SERVER),))
    else:
        command, args = launch_command(sys.executable, [str(SERVER), "--transport", transport, "--port", "0"])
        with subprocess.Popen([command, *args], stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stderr is not None
                announced = process.stderr.readline()
                found = re.search(r"http://\S+", announced)
                if found is None:
                    raise SystemExit(f"the calculator did not start: {announced}")
                yield ServerSpec("calculator", "sse" if transport == "sse" else "streamable-http", url=found[0])
            finally:
                process.terminate()


@asynccontextmanager
async def raw_call(spec: ServerSpec) -> AsyncIterator[Call]:
    """The call as one writes it with the SDK alone."""
    match spec.transport:
        case "in-process":
            client = Client(load_server(spec.target))
        case "stdio":
            client = Client(StdioServerParameters(command=spec.command, args=list(spec.args)))
        case "sse":
            client = Client(sse_client(spec.url))
        case "streamable-http":
            client = Client(spec.url)
    async with client:

        async def call() -> str:
            result = await client.call_tool(TOOL, ARGUMENTS)
            return result.content[0].text

        yield call


@asynccontextmanager
async def our_call(spec: ServerSpec, *, processes: int = 0) -> AsyncIterator[Call]:
    async with open_tools([spec], processes=processes) as toolbox:

        async def call() -> str:
            return (await toolbox.call(ToolCall(TOOL, ARGUMENTS))).text

        yield call


async def time_batch(call: Call, calls: int, *, together: int, clock: Callable[[], float] = perf_counter) -> float:
    """Seconds a call by `clock`, with so many under way at a time."""

    async def one_after_the_other() -> None:
        for _ in range(calls // together):
            text = await call()
            assert text == ANSWER, text

    with without_collections():
        began = clock()
        async with anyio.create_task_group() as tasks:
            for _ in range(together):
                tasks.start_soon(one_after_the_other)
        return (clock() - began) / (calls // together * together)


async def compare_transport(transport: str, *, pairs: int, calls: int) -> dict[int, dict[str, Any]]:
    """The figures by the number of calls under way."""
    found: dict[int, dict[str, Any]] = {}
    with serving(transport) as spec:
        async with our_call(spec) as ours, raw_call(spec) as peer:
            sides: Mapping[str, Call] = {"ours": ours, "peer": peer}
            for together in (TOGETHER, 1):
                batch = calls if together > 1 else calls // 4
                times: dict[str, list[float]] = {side: [] for side in sides}
                for number, side in enumerate(rounds(list(sides), pairs + 1)):
                    seconds = await time_batch(sides[side], batch, together=together)
                    if number >= len(sides):  # the first pair warms up
                        times[side].append(seconds)
                found[together] = with_rates(compare(times["ours"], times["peer"]))
    return found


def with_rates(figures: dict[str, Any]) -> dict[str, Any]:
    rates = {f"{side}_calls_per_second": round(1 / figures[f"{side}_seconds"]["median"], 1) for side in ("ours", "peer")}
    return figures | rates


def measure(transports: Sequence[str] = tuple(CASES), *, pairs: int, calls: int) -> dict[str, Any]:
    found = {case: anyio.run(lambda case=case: compare_transport(CASES[case], pairs=pairs, calls=calls)) for case in transports}
    cases = {case: figures[TOGETHER] for case, figures in found.items()}
    return result_of(
        "tool_calls",
        cases,
        versions=own_versions("mcp", "anyio", "pydantic"),
        bounds=dict.fromkeys(cases, BOUND),
        alone={case: figures[1] for case, figures in found.items()},
        together=TOGETHER,
        calls_a_batch=calls,
    )


def main(argv: Sequence[str] | None = None) -> None:
    options = read_options(__doc__, argv)
    result = measure(pairs=options.pairs, calls=CALLS[options.quick])
    for case, figures in result["alone"].items():
        print(line_of(f"{case} alone", figures))
    publish(result, options)


if __name__ == "__main__":
    main()
