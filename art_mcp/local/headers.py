"""What the headers of safetensors files say of a model's weights; no number of a weight is read, and torch is not needed."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from art_mcp.errors import ModelError, boundary

OUTPUTS = ("lm_head.weight", "embed_out.weight", "output.weight")
"""What models call the matrix that gives each token its logit."""


POINTER = b"version https://git-lfs.github.com/spec/"
LONGEST = 100_000_000
"""Bytes of a header, as the safetensors library has it."""
MISSHAPEN = (KeyError, IndexError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: `dtype` as the format spells it ("BF16"), `start` its first byte in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int


def read_entries(file: Path) -> list[Entry]:
    """The tensors of a safetensors file (github.com/huggingface/safetensors: 8 bytes of length, a JSON header, the data).
    Raises ModelError where it is none."""
    refuse_pointer(file)
    with boundary(ModelError, f"reading {file}", OSError, ValueError, struct.error, RecursionError), file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > min(LONGEST, file.stat().st_size - 8):
            raise ModelError(f"{file} is no safetensors file, or was cut short: a header of {length} bytes does not fit")
        header: Any = json.loads(opened.read(length))
        if not isinstance(header, dict):
            raise ModelError(f"{file} is no safetensors file: its header is no JSON object")
    parts: dict[str, Any] = {str(name): part for name, part in cast("dict[Any, Any]", header).items()}
    parts.pop("__metadata__", None)
    with boundary(ModelError, f"reading {file}: a tensor has no dtype, shape or place", *MISSHAPEN):
        return [
            Entry(name, str(part["dtype"]), tuple(map(int, part["shape"])), 8 + length + int(part["data_offsets"][0]))
            for name, part in parts.items()
        ]


def refuse_pointer(file: Path) -> None:
    """Raises ModelError for what git leaves in a file's place where git-lfs has not fetched it."""
    with boundary(ModelError, f"reading {file}"), file.open("rb") as opened:
        if opened.read(len(POINTER)) == POINTER:
            raise ModelError(f"{file} is only a pointer of git-lfs to the file: fetch it with `git lfs pull` in {file.parent}")


def count_parameters(folder: Path, *, tied: bool) -> int:
    """How many numbers the weights in `folder` have; 0 where there are no safetensors files. `tied`: an output matrix in the
    files is the embedding once more."""
    entries = [entry for file in sorted(folder.glob("*.safetensors")) for entry in read_entries(file)]
    counted = [entry for entry in entries if not (tied and entry.name.endswith(OUTPUTS))]
    return sum(math.prod(entry.shape) for entry in counted)
