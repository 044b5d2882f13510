"""What lies between supervised and reinforcement learning in a checkpoint: an optimizer that begins anew."""

from __future__ import annotations

import os
from pathlib import Path
from pickle import UnpicklingError

import torch

from art_mcp.errors import RunError, boundary
from art_mcp.local.checkpoints import OPTIMIZER_FILE


def forget_optimizer(checkpoint: Path) -> None:
    """Empties the optimizer's state in `checkpoint`: what resumes from it has its weights, its RNG and its step, and an
    optimizer that has seen no gradient. The file is written aside and renamed."""
    path = checkpoint / OPTIMIZER_FILE
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with boundary(RunError, f"resetting the optimizer of {checkpoint}", OSError, RuntimeError, KeyError, UnpicklingError):
        state = torch.load(path, map_location="cpu", weights_only=True)
        torch.save({**state, "optimizer": {**state["optimizer"], "state": {}}}, aside)
        aside.replace(path)


def default_rate(*, lora: bool, parameters: int) -> float:
    """The highest learning rate of a supervised start, where none is given: 2e-4 for LoRA, 1e-3 for models under 10 M
    parameters, 2e-5 for the full weights of larger ones."""
    if lora:
        return 2e-4
    return 1e-3 if parameters < 10_000_000 else 2e-5
