"""How long a new adapter takes to be in use while nobody samples, and where vLLM's processes are meanwhile.

    python -m benchmarks.gpu_publish --model PREPARED --engine-replicas 3 --count 10 --out DIR

DIR/result.json has the seconds of each publication, writing included, and at what the engines were seen while they read an
adapter; DIR/stacks has that for each process.
"""

from __future__ import annotations

import time

import anyio

from art_mcp.agent.demonstrate import sample_of
from art_mcp.model import TrainableModel
from art_mcp.types import TrainConfig
from benchmarks.gpu_look import look_at_engines, seen_loading
from benchmarks.gpu_report import Clock, Report, describe_run
from benchmarks.gpu_setup import make_backend, make_spec, parser_of
from benchmarks.gpu_stage import open_conditions, play_demonstrations


async def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--count", type=int, default=10, help="publications")
    given = parser.parse_args()
    look_at_engines(given.out / "stacks")
    clock, report = Clock(given.deadline), Report(given.out / "result.json", **describe_run(vars(given)))
    async with make_backend(given) as backend, open_conditions(given.levels, progress=0.0) as conditions:
        shown = await play_demonstrations(conditions, None, count=20, seed=given.seed)
        model = TrainableModel(name="policy", spec=make_spec(given))
        await model.register(backend)
        worker = backend.sampler(model)
        await worker.ready()
        samples = [sample_of(one, dialect=model.dialect()) for one in shown]
        seconds: list[float] = []
        for _ in range(given.count):
            await backend.imitate(model, samples, config=TrainConfig(learning_rate=1e-4, micro_batch_tokens=8192))
            began = time.monotonic()
            await worker.ready()
            seconds.append(time.monotonic() - began)
            report.add(seconds_publish=seconds, facts=backend.facts(model))
            clock.say(f"publication {len(seconds)}: {seconds[-1]:.3f} s")
    report.add(seen_loading=seen_loading(given.out / "stacks"))
    for where, times in report.values["seen_loading"][:10]:
        clock.say(f"{times} x {where}")


if __name__ == "__main__":
    anyio.run(main)
