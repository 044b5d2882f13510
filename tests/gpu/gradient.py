"""The first step's gradient of one trainer in a process of its own: `python gradient.py TRAINER DTYPE ADAPTER SAMPLES
TEMPERATURE OUT`."""

import json
import sys
from pathlib import Path

from art_mcp.local.remote import unpacked
from art_mcp.local.worker import Settings, open_trainer
from art_mcp.types import ModelSpec, TrainConfig

CONFIG = TrainConfig(micro_batch_tokens=8192)
SMALL = 1024
"""Tokens of a micro-batch in double precision, where attention keeps its scores."""


def first_gradient(trainer_name, adapter, samples, *, temperature, dtype="auto"):
    """By parameter name, in float32 on the CPU; and the figures of the loss. The samples were drawn at `temperature`."""
    config = CONFIG.with_(
        temperature=temperature, micro_batch_tokens=SMALL if dtype == "float64" else CONFIG.micro_batch_tokens
    )
    loaded, trainer = open_trainer(ModelSpec(source=str(adapter), dtype=dtype), Settings(trainer=trainer_name))
    figures = trainer.accumulate(samples, config)
    named = [(name, parameter) for name, parameter in loaded.model.named_parameters() if parameter.requires_grad]
    return {name: parameter.grad.float().cpu() for name, parameter in named if parameter.grad is not None}, figures


def read(path):
    return [unpacked(row) for row in json.loads(Path(path).read_text())]


if __name__ == "__main__":
    trainer_name, dtype, adapter, samples, temperature, out = sys.argv[1:]
    gradient, figures = first_gradient(trainer_name, adapter, read(samples), temperature=float(temperature), dtype=dtype)
    from safetensors.torch import save_file  # after Unsloth, which must be imported first

    save_file({name: tensor.contiguous() for name, tensor in gradient.items()}, out, metadata={"figures": json.dumps(figures)})
