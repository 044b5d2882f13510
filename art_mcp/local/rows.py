"""Single rows of a model's embedding matrices, read from and written into its safetensors files; no model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from art_mcp.local.headers import OUTPUTS, read_entries

INPUTS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tok_embeddings.weight")
"""What models call the matrix that has a row for each token; that for their output is `OUTPUTS`."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix in a safetensors file: `rows` rows of `width` numbers, the first at byte `start`."""

    file: Path
    name: str
    dtype: torch.dtype
    rows: int
    width: int
    start: int

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    def read(self, ids: Sequence[int]) -> Tensor:
        """Rows in float32, (ids, width)."""
        with self.file.open("rb") as file:
            parts: list[Tensor] = []
            for row in ids:
                file.seek(self.start + row * self.row_bytes)
                parts.append(torch.frombuffer(bytearray(file.read(self.row_bytes)), dtype=self.dtype).float())
        return torch.stack(parts) if parts else torch.zeros(0, self.width)

    def write(self, row: int, values: Tensor) -> None:
        """Replaces one row, rounded to the matrix's own precision; no other byte of the file changes."""
        data = bytes(values.to(self.dtype).contiguous().view(torch.uint8).tolist())
        with self.file.open("r+b") as file:
            file.seek(self.start + row * self.row_bytes)
            file.write(data)


def token_matrices(folder: Path) -> list[Matrix]:
    """The input embedding of the model in `folder`, and its output embedding where the files hold one of its own; nothing where
    it is not clear which matrix that is, or its numbers are quantized. Raises ModelError for a file that cannot be read."""
    found = [matrix for file in sorted(folder.glob("*.safetensors")) for matrix in read_header(file)]
    inputs = [matrix for matrix in found if matrix.name.endswith(INPUTS)]
    if len(inputs) != 1:
        return []
    rows = (inputs[0].rows, inputs[0].width)
    return [*inputs, *(m for m in found if m.name.endswith(OUTPUTS) and (m.rows, m.width) == rows)]


def read_header(file: Path) -> list[Matrix]:
    """The matrices of a safetensors file whose numbers are plain."""
    plain = [entry for entry in read_entries(file) if entry.dtype in DTYPES and len(entry.shape) == 2]
    return [Matrix(file, entry.name, DTYPES[entry.dtype], *entry.shape, start=entry.start) for entry in plain]
