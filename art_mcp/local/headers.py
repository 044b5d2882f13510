"""What the headers of safetensors files say of a model's weights; no number of a weight is read, and torch is not needed."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from art_mcp.errors import ModelError, boundary

OUTPUTS = ("lm_head.weight", "embed_out.weight", "output.weight")
"""What models call the matrix that gives each token its logit."""


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
    with boundary(ModelError, f"reading {file}", OSError, ValueError, struct.error), file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header: dict[str, Any] = json.loads(opened.read(length))
    parts = {name: part for name, part in header.items() if name != "__metadata__"}
    return [
        Entry(name, str(part["dtype"]), tuple(map(int, part["shape"])), 8 + length + int(part["data_offsets"][0]))
        for name, part in parts.items()
    ]


def count_parameters(folder: Path, *, tied: bool) -> int:
    """How many numbers the weights in `folder` have; 0 where there are no safetensors files. `tied`: an output matrix in the
    files is the embedding once more."""
    entries = [entry for file in sorted(folder.glob("*.safetensors")) for entry in read_entries(file)]
    counted = [entry for entry in entries if not (tied and entry.name.endswith(OUTPUTS))]
    return sum(math.prod(entry.shape) for entry in counted)
