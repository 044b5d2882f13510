"""What a model's folder must have before anything is loaded from it; torch is not needed to see that."""

from __future__ import annotations

from pathlib import Path

from art_mcp.errors import ModelError
from art_mcp.local.headers import refuse_pointer

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def check_folder(source: str) -> bool:
    """Whether `source` is a folder, and not the hub's. Raises ModelError where it lacks what a model is loaded from."""
    folder = Path(source)
    if not folder.is_dir():
        if folder.is_absolute() or source.startswith(("./", "../", "~")):
            raise ModelError(f"no model folder at {source}")
        return False
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{source} is not a model folder: it has no config.json")
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    if not weights:
        raise ModelError(f"{source} has no weights: put *.safetensors there, or name another model")
    vocabularies = [folder / name for name in VOCABULARIES if (folder / name).is_file()]
    if not vocabularies:
        raise ModelError(f"{source} has no tokenizer: put tokenizer.json there")
    for file in (*vocabularies, *weights):
        refuse_pointer(file)
    return True
