"""Before a training run: whether its model can learn to write tool calls at all, and a mended copy where it may be made."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from art_mcp.errors import ModelError
from art_mcp.wiring.stage import Setting, find_model, look_over


def check_tags(setting: Setting, *, prepare: bool) -> Setting:
    """The setting with a model whose tags are trained: its own, or with `prepare` a mended copy of it in the user's cache.

    Raises ModelError, naming the command that mends it, where the model writes tags that were never trained.
    """
    source = look_over(find_model(setting.model))
    if source == "tiny":
        return setting
    from art_mcp.local.prepare import prepare as write_copy
    from art_mcp.local.prepare import untrained_tags, weights_folder

    tags = untrained_tags(source)
    if not tags:
        return setting
    if not prepare:
        name = re.sub(r"[^\w.-]", "-", Path(source).name)
        raise ModelError(
            f"{source} can hardly learn to write {' and '.join(one.tag for one in tags)}: in its embedding they were never "
            f"trained (their rows are those of {tags[0].like}). Mend them in a copy, by `art-mcp prepare {source} "
            f"{name}-prepared`, and train that, or let this run do it, by --prepare"
        )
    copy = cached_copy(weights_folder(source))
    if not copy.is_dir():
        write_copy(source, copy)
    return replace(setting, model=str(copy))


def cached_copy(folder: Path) -> Path:
    """Where the mended copy of the model in `folder` is kept, for every run that asks for it."""
    from art_mcp.local.models import hash_weights

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "art_mcp" / "prepared"
    return cache / f"{folder.name}-{str(hash_weights(str(folder)))[:12]}"
