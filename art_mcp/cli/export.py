"""`art-mcp export`: a trained model as a folder that other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from art_mcp.cli import completion
from art_mcp.cli import options as o

HELP = "Write a trained model as a plain Hugging Face folder: merged weights, or the LoRA adapter; loaded again to check it."
EXAMPLE = "Example: art-mcp export latest exported; as an adapter: art-mcp export latest exported --adapter"


def command(
    model: Annotated[
        str, typer.Argument(metavar="RUN", help="A run, run@step, or a model folder.", autocompletion=completion.models)
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    adapter: Annotated[
        bool,
        typer.Option("--adapter/--merged", help="The LoRA adapter alone (it needs its base), or everything in one folder."),
    ] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option("--dtype", help="Of merged weights (default: what the base is stored in)."),
    ] = None,
    json: o.Json = False,
) -> None:
    from art_mcp.wiring.export import export_model

    with o.waiting("exporting"):
        told = export_model(model, out, adapter=adapter, dtype=dtype)
    base = f" of {told['base']}" if told["kind"] != "full" else ""
    o.write(f"{out}: {told['kind']}{base} in {told['dtype']}; logits differ by {told['rounding']:.1e} from what was trained")
    if told["prepared"]:
        o.write(f"its base was prepared from {told['prepared']['source']}: see {out / 'README.md'}")
    if json:
        o.write_json(told)
