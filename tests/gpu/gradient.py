"""The first step's gradient of one trainer in a process of its own: `python gradient.py TRAINER ADAPTER SAMPLES
TEMPERATURE OUT`, where "exact" is torch's in double precision."""

import json
import sys
from pathlib import Path

from art_mcp.local.worker import Settings, open_trainer
from art_mcp.types import ModelSpec, Sample, TrainConfig

CONFIG = TrainConfig(micro_batch_tokens=8192)
EXACT = CONFIG.with_(micro_batch_tokens=1024)  # attention keeps its scores there


def first_gradient(kind, adapter, samples, *, temperature):
    """By parameter name, in float32 on the CPU; and the figures of the loss. The samples were drawn at `temperature`."""
    config = (EXACT if kind == "exact" else CONFIG).with_(temperature=temperature)
    if kind == "exact":
        loaded, trainer = open_trainer(ModelSpec(source=str(adapter), dtype="float64"), Settings(trainer="torch"))
    else:
        loaded, trainer = open_trainer(ModelSpec(source=str(adapter)), Settings(trainer=kind))
    figures = trainer.accumulate(samples, config)
    named = [(name, parameter) for name, parameter in loaded.model.named_parameters() if parameter.requires_grad]
    return {name: parameter.grad.float().cpu() for name, parameter in named if parameter.grad is not None}, figures


def read(path):
    rows = json.loads(Path(path).read_text())
    return [Sample(tuple(ids), tuple(map(bool, on)), tuple(lps), advantage) for ids, on, lps, advantage in rows]


if __name__ == "__main__":
    kind, adapter, samples, temperature, out = sys.argv[1:]
    gradient, figures = first_gradient(kind, adapter, read(samples), temperature=float(temperature))
    from safetensors.torch import save_file  # after Unsloth, which must be imported first

    save_file({name: tensor.contiguous() for name, tensor in gradient.items()}, out, metadata={"figures": json.dumps(figures)})
