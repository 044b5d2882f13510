"""A trained model for other programs: which one is meant, and the card that says where it comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from art_mcp.errors import RunError, boundary
from art_mcp.store.run import open_run, run_folder
from art_mcp.wiring.stage import find_model

if TYPE_CHECKING:
    from art_mcp.local.export import Exported

LOADING = {
    "adapter": """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained({out!r})""",
    "whole": """from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained({out!r}), AutoTokenizer.from_pretrained({out!r})""",
}


def export_model(text: str, out: Path, *, adapter: bool, dtype: str | None) -> dict[str, Any]:
    """Writes what `text` names (a run, run@step, a folder) to `out`, with a card; returns what was written, for people."""
    from art_mcp.local.export import export

    source = find_model(text)
    folder = None if text == "tiny" else run_folder(text.partition("@")[0])
    exported = export(source, out, adapter=adapter, dtype=dtype)
    manifest: Mapping[str, Any] = open_run(folder).manifest if folder else {}
    card = write_card(exported, manifest, source=source, out=out)
    with boundary(RunError, f"writing {out / 'README.md'}"):
        (out / "README.md").write_text(card, encoding="utf-8")
    names = ("kind", "base", "dtype", "weights_sha256", "rounding", "prepared")
    return {"out": str(out), "source": source, **{name: getattr(exported, name) for name in names}}


def write_card(exported: Exported, manifest: Mapping[str, Any], *, source: str, out: Path) -> str:
    """README.md: what was trained on what, what was changed, how well it did, how it is loaded."""
    adapter = exported.kind == "adapter"
    head = {"base_model": exported.base, "library_name": "peft" if adapter else "transformers", "tags": ["art-mcp", "mcp"]}
    what = {"adapter": "A LoRA adapter", "merged": "A model with its LoRA adapter merged in", "full": "A model"}[exported.kind]
    parts = [
        "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in head.items()), "---"]),
        f"# {out.name}",
        f"{what}, trained by art_mcp to use the tools of an MCP server. Written from `{source}`.",
        *told_of_base(exported),
        *told_of_run(manifest),
        *(told_of_gain(manifest) if Path(source).name.endswith(f"-{manifest.get('steps', 0):06d}") else ()),
        "## Loading",
        f"```python\n{LOADING['adapter' if adapter else 'whole'].format(out=str(out))}\n```",
        "Tool calls are written in the form of the chat template that is in this folder.",
    ]
    return "\n\n".join(parts) + "\n"


def told_of_base(exported: Exported) -> list[str]:
    lossless = f"the largest difference of a logit is {exported.rounding:.1e} of the largest logit"
    merged = f"The adapter was merged in float32 and cast to {exported.dtype}; to what was trained, {lossless}."
    cast = f"The weights are in {exported.dtype}; to what was trained, {lossless}."
    how = {"adapter": f"Its base is `{exported.base}`.", "merged": f"Its base was `{exported.base}`. {merged}", "full": cast}
    told = ["## Base", how[exported.kind]]
    record = exported.prepared
    if record:
        tags = ", ".join(f"`{tag['tag']}` (token {tag['id']})" for tag in record["tags"])
        told.append(
            f"That base is a copy of `{record['source']}` (sha256 {record['source_sha256']}) in which the embedding of {tags}, "
            f"never trained there, is {record['method']}. The same copy is made again by `art-mcp prepare`; "
            "`art_mcp_prepared.json` holds the details."
        )
        if exported.kind == "adapter":
            told.append("**The adapter needs that copy: on the original it does not work.**")
    return told


def told_of_run(manifest: Mapping[str, Any]) -> list[str]:
    if "training" not in manifest:
        return []
    asked, warm = manifest["training"], manifest.get("warm_start")
    options = " ".join(f"{name}={value}" for name, value in asked["setting"]["options"].items())
    lora = asked["setting"]["lora"]
    weights = f"a LoRA adapter of rank {lora}" if lora else "all weights"
    line = f"Environment `{asked['setting']['environment']}` {options}".strip() + f"; {weights}"
    if warm:
        line += f"; {warm['demonstrations']} demonstrations ({Path(warm['source']).name}) in {told_steps(warm['steps'])}"
    rewarded = manifest.get("steps", 0) - (warm["steps"] if warm else 0)
    if rewarded > 0:
        line += f"; reinforcement learning of {told_steps(rewarded)}"
    return ["## Training", f"{line}; {manifest.get('train_seconds', 0.0):.0f} s of training in all."]


def told_steps(count: int) -> str:
    return f"{count} step{'s' * (count != 1)}"


def told_of_gain(manifest: Mapping[str, Any]) -> list[str]:
    """How well the run's last step does, and what it began with."""
    lines = ["| held-out scenarios | n | before | after |", "| --- | --- | --- | --- |"]
    measured: Mapping[str, Any] = manifest.get("after") or {}
    for decoding, after in measured.items():
        before = manifest["before"][decoding]
        lines.append(f"| {decoding} | {after['n']} | {before['solved']:.3f} | {after['solved']:.3f} |")
    return ["\n".join(lines)] if len(lines) > 2 else []
