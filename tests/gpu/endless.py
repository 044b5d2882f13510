"""A run that samples until it is killed: `python endless.py MODEL`; says on stdout what happens, one JSON object a line."""

import json
import sys

import anyio

from art_mcp.errors import EngineError
from art_mcp.local.backend import LocalBackend
from art_mcp.model import TrainableModel
from art_mcp.types import LoraSpec, ModelSpec, Sample, SamplingParams, TrainConfig

PROMPT = list(range(100, 164))


def tell(**values):
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


async def main(folder):
    model = TrainableModel(name="policy", spec=ModelSpec(source=folder, lora=LoraSpec()))
    quick_start = {"max_model_len": 2048, "enforce_eager": True, "gpu_memory_utilization": 0.4}
    async with LocalBackend(engine="vllm", trainer="torch", in_process=False, engine_args=quick_start) as backend:
        await model.register(backend)
        tell(event="ready")
        engine_failed = trainer_failed = False
        turn = 0
        while True:
            try:
                await model.ready()  # an engine that died is begun anew here
                params = SamplingParams(max_tokens=64, seed=turn)
                span = (await model.sampler().sample(PROMPT, params=params, stop=frozenset())).span
                tell(event="sampled again" if engine_failed else "sampled")
                engine_failed = False
            except EngineError as error:
                tell(event="engine failed", error=str(error)[:500])
                engine_failed = True
                continue
            if turn % 10 == 0 and not trainer_failed:
                on = (False,) * len(PROMPT) + (True,) * len(span.token_ids)
                sample = Sample((*PROMPT, *span.token_ids), on, None, 1.0)
                try:
                    await backend.imitate(model, [sample], config=TrainConfig(learning_rate=1e-6))
                    tell(event="trained")
                except EngineError as error:
                    tell(event="trainer failed", error=str(error)[:500])
                    trainer_failed = True
            turn += 1


if __name__ == "__main__":
    anyio.run(main, sys.argv[1])
