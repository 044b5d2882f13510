"""`art-mcp prepare`: a copy of a model in which the tags of tool calls can be learned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from art_mcp.cli import options as o

HELP = "Find tool-call tags that a model was never trained on, and write a copy of it in which they can be learned."
EXAMPLE = "Example: art-mcp prepare models/qwen2.5-coder-0.5b models/qwen2.5-coder-0.5b-prepared"


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or a hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    json: o.Json = False,
) -> None:
    from art_mcp.local.prepare import prepare

    record = prepare(model, out)
    for tag in record["tags"]:
        o.write(told(tag))
    o.write(f"{out}: {model} with these rows of {' and '.join(record['matrices'])} set to {record['method']}")
    if json:
        o.write_json(record)


def told(tag: dict[str, Any]) -> str:
    return f"{tag['tag']} (token {tag['id']}) was never trained: its row is that of {tag['like']}, cosine {tag['cosine']:.5f}"
