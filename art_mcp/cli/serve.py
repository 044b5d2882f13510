"""`art-mcp serve`: a model as an OpenAI-compatible endpoint for any agent."""

from __future__ import annotations

from typing import Annotated

import typer

from art_mcp.cli import completion
from art_mcp.cli import options as o

HELP = "Serve a model to any agent, as an OpenAI-compatible endpoint on this machine. Ctrl-C ends it."
EXAMPLE = "Example: art-mcp serve runs/latest --port 8000"

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="tiny, a model folder, a run, run@step, or a hub id.", autocompletion=completion.models
    ),
]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one.")]
Host = Annotated[str, typer.Option("--host", help="The address to listen on; beyond loopback only with --allow-host.")]
AllowHost = Annotated[
    list[str] | None,
    typer.Option("--allow-host", metavar="NAME", help="A name by which clients may call it, beside loopback; repeatable."),
]
Token = Annotated[
    str | None, typer.Option("--token", envvar="ART_MCP_TOKEN", help="The API key that clients bring (default: a random one).")
]


def command(
    context: typer.Context,
    model: ModelArgument = "tiny",
    host: Host = "127.0.0.1",
    port: Port = 0,
    allow_host: AllowHost = None,
    token: Token = None,
    lenient: o.Lenient = False,
    deterministic: o.Deterministic = False,
    engine: o.Engine = None,
    engine_python: o.EnginePython = None,
    engine_arg: o.EngineArgs = None,
    json: o.Json = False,
) -> None:
    import anyio

    from art_mcp.wiring.serving import Place, serving

    # nothing is played here, and nothing is trained
    setting = o.setting_of(context.params | {"option": None}, environment="", trainer="torch")
    place = Place(host, port, tuple(allow_host or ()), token)

    async def run() -> None:
        async with serving(setting, place) as (served, endpoint):
            o.write(f"{served.policy} is served; Ctrl-C ends it")
            o.write(f"  base_url  {served.base_url}")
            o.write(f"  api_key   {served.api_key}")
            o.write(f"  model     {served.model}")
            if json:
                o.write_json(served.to_json())
            await endpoint.ended()

    anyio.run(run)
