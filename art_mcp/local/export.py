"""A trained model as a plain Hugging Face folder: the adapter, or all weights with it merged in; what was written is loaded
again and compared."""

from __future__ import annotations

import gc
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from art_mcp.errors import ModelError
from art_mcp.local.checkpoints import written_aside
from art_mcp.local.models import adapter_base, hash_weights, load_model, load_tokenizer, model_source, stored_dtype
from art_mcp.local.prepare import RECORD, read_record
from art_mcp.sampling.tokenizer import BackendTokenizer
from art_mcp.types import ModelSpec

TEXT = '<|im_start|>user\nWhat is 12 × 7, and why?<|im_end|>\n{"name": "multiply", "arguments": {"a": 12, "b": 7}}'
"""A few tokens by which what was written is compared with what it was written from."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = 1e-4
"""By how much of the largest logit the logits of what was written may differ from what it was written from."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: the kind of folder, the base, and by how much of the largest logit it differs from what was trained
    (`rounding`, from merging and from `dtype`). `prepared` is the record of a base that was mended."""

    kind: Literal["adapter", "merged", "full"]
    base: str
    dtype: str
    weights_sha256: str | None
    prepared: dict[str, Any] | None
    rounding: float


def export(source: str, out: Path, *, adapter: bool, dtype: str | None) -> Exported:
    """Writes the model of `source` to `out`: an adapter as it is where `adapter`, otherwise all weights in one folder.

    An adapter is merged in float32, then everything is cast to `dtype` (default: the base's own). All weights are those that
    were sampled from and measured: of a model trained in bfloat16 these are the bfloat16 ones, and its float32 masters, which
    nobody has sampled from, stay in the checkpoint to train on with. Raises ModelError where
    `source` is no adapter but `adapter` is asked for, where `out` exists, and where what was written does not compute what it
    should.
    """
    place = Path(model_source(source))
    adapted = adapter_base(source) is not None
    if adapter and not adapted:
        raise ModelError(f"{source} holds all weights, and no adapter: leave out --adapter")
    if out.exists():
        raise ModelError(f"{out} exists already: choose another folder to export to")
    base = adapter_base(source) or source
    kind: Literal["adapter", "merged", "full"] = "adapter" if adapter else "merged" if adapted else "full"
    trained = load_model(ModelSpec(source=source, dtype="float32"))
    tokens = BackendTokenizer(trained.tokenizer).encode(TEXT)
    wanted = logits_of(trained.model, tokens)
    with written_aside(out) as aside:
        if adapter:
            written, expected, precision = write_adapter(trained.model, aside), wanted, "float32"
        else:
            stored = stored_dtype(base)
            precision = dtype or (stored if stored in DTYPES else "float32")
            written = write_merged(trained.model, aside, dtype=DTYPES[precision])
            expected = logits_of(written, tokens)
        load_tokenizer(str(place)).save_pretrained(aside)
        record = read_record(source)
        if record and (Path(model_source(base)) / RECORD).is_file():
            shutil.copyfile(Path(model_source(base)) / RECORD, aside / RECORD)
        del trained, written
        gc.collect()  # the weights are to be in memory once
        refuse_difference(str(aside), tokens, expected)
    rounding = difference(expected, wanted)
    return Exported(kind, base, precision, hash_weights(str(out)), record, rounding)


def write_adapter(model: Any, out: Path) -> Any:
    model.save_pretrained(out, safe_serialization=True)
    (out / "README.md").unlink(missing_ok=True)
    return model


def write_merged(model: Any, out: Path, *, dtype: torch.dtype) -> Any:
    """All weights, an adapter merged in float32 and then cast. Returns the model that was written, in float32 again."""
    whole = model.merge_and_unload() if hasattr(model, "peft_config") else model
    cast(whole, dtype)
    whole.config.dtype = dtype
    whole.save_pretrained(out, safe_serialization=True)
    cast(whole, torch.float32)
    return whole


def cast(model: Any, dtype: torch.dtype) -> None:
    """The weights alone: what is computed from the configuration (rotary frequencies) stays as exact as in a loaded model."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def logits_of(model: Any, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float()


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def refuse_difference(folder: str, tokens: list[int], expected: Tensor) -> None:
    """Raises ModelError where the model in `folder` does not compute what was written there."""
    again = load_model(ModelSpec(source=folder, dtype="float32"))
    found = difference(logits_of(again.model, tokens), expected)
    if not found <= TOLERANCE:
        raise ModelError(
            f"what was written to {folder} computes something else: its logits differ by {found:.2g} of the largest"
        )
