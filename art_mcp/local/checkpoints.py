"""Checkpoints: written aside and renamed, so that a folder that exists is whole. What is in them is the trainer's."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from glob import escape
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from art_mcp.errors import RunError, boundary
from art_mcp.local.torch_trainer import TorchTrainer
from art_mcp.store.aside import put_back, replace_folder

OPTIMIZER_FILE, STATE_FILE = "optimizer.pt", "trainer.json"


@contextmanager
def written_aside(folder: Path) -> Generator[Path]:
    """A folder beside `folder` to write into; it takes its place, complete and synced, when the block ends well.

    At no moment is there half a checkpoint under the name `folder`, and a kill at any moment leaves a whole one there, or where
    `put_back` finds it. What an earlier process left half written is removed.
    """
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.new.tmp")
    try:
        with boundary(RunError, f"writing {folder}", OSError, RuntimeError, SafetensorError):
            put_back(folder.parent, folder.name)
            for left in folder.parent.glob(f".{escape(folder.name)}.*.tmp"):
                shutil.rmtree(left)
            aside.mkdir(parents=True)
            yield aside
            sync(aside)
            replace_folder(aside, folder)
            sync(folder.parent)
    finally:
        put_back(folder.parent, folder.name)
        shutil.rmtree(aside, ignore_errors=True)


def sync(folder: Path) -> None:
    """Flushes a folder and the files that stand in it to the disk."""
    for path in [folder, *(path for path in folder.iterdir() if path.is_file())]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_checkpoint(folder: Path, *, trainer: TorchTrainer, tokenizer: Any, step: int) -> None:
    """The model (a standard Hugging Face folder, or a peft adapter) as it is sampled from, its tokenizer, the optimizer, the
    float32 masters of weights in half precision, and torch's RNG."""
    with written_aside(folder) as aside:
        trainer.model.save_pretrained(aside, safe_serialization=True)
        tokenizer.save_pretrained(aside)
        state: dict[str, Any] = {"optimizer": trainer.optimizer.state_dict(), "rng": torch.get_rng_state()}
        if trainer.masters:
            state["masters"] = [master.detach() for master in trainer.masters.moved]
        torch.save(state, aside / OPTIMIZER_FILE)
        (aside / STATE_FILE).write_text(json.dumps({"step": step}))


def write_weights(folder: Path, *, trainer: TorchTrainer, tokenizer: Any) -> None:
    """What another engine loads: the adapter alone, or the whole model with its tokenizer; nothing to train on with.

    `folder` is new, and gone where it cannot be whole. It is read at once and worth nothing after a crash, so nobody waits for
    the disk.
    """
    with boundary(RunError, f"writing {folder}", OSError, RuntimeError, SafetensorError), ExitStack() as unfinished:
        unfinished.callback(shutil.rmtree, folder, ignore_errors=True)
        if hasattr(trainer.model, "peft_config"):
            write_adapter(folder, trainer)
        else:
            trainer.model.save_pretrained(folder, safe_serialization=True)
            tokenizer.save_pretrained(folder)
        unfinished.pop_all()


def write_adapter(folder: Path, trainer: TorchTrainer) -> None:
    """As peft's `save_pretrained` lays it out, in the precision of the weights beneath it: an engine rounds an adapter to that
    when it reads it. (`save_pretrained` makes a model card as well, which took a third of the time.)"""
    from peft import get_peft_model_state_dict  # loaded with the adapter; a model without one does not need it
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    model: Any = trainer.model
    # without the last argument peft asks the hub for the base's vocabulary each time
    state = get_peft_model_state_dict(model, fetched(model, trainer.dtype), save_embedding_layers=False)
    folder.mkdir()
    save_file(state, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    replace(model.peft_config["default"], inference_mode=True).save_pretrained(str(folder))


def fetched(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The adapters of `model`, by name, as `dtype` in the memory of the CPU: from a GPU in one copy, because each copy waits
    until those who share the GPU let it in, and an adapter has hundreds of tensors."""
    weights = model.named_parameters()
    trained = {name: weight.detach() for name, weight in weights if weight.requires_grad or "lora_" in name}
    flat = torch.cat([weight.flatten() for weight in trained.values()]).to(dtype).cpu()
    parts = flat.split([weight.numel() for weight in trained.values()])
    return {name: part.view(weight.shape).clone() for (name, weight), part in zip(trained.items(), parts, strict=True)}


def load_checkpoint(folder: Path, trainer: TorchTrainer) -> int:
    """Restores optimizer, masters and RNG beside weights that were loaded from `folder`; returns the step. Weights that were
    trained in half precision go on in any; raises RunError where others are to go on in half precision."""
    with boundary(RunError, f"resuming from {folder}", OSError, ValueError, KeyError, RuntimeError, EOFError, UnpicklingError):
        state = torch.load(folder / OPTIMIZER_FILE, weights_only=True, map_location="cpu")
        if "masters" in state:
            trainer.masters.restore(state["masters"])
        elif trainer.masters:
            raise RunError(f"{folder} was not trained in half precision, which would cut its weights off: leave dtype out")
        trainer.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        return int(json.loads((folder / STATE_FILE).read_text())["step"])
