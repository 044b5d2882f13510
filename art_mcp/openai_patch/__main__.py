"""`python -m art_mcp.openai_patch`: checks an endpoint, a line for each thing that it should do; ends with 1 where it cannot be
trained through."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Annotated

import anyio
import typer

from art_mcp.openai_patch.check import Finding, examine, tiny_endpoint
from art_mcp.ports import Tokenizer


def main(
    base_url: Annotated[str, typer.Option("--base-url", help="The endpoint, such as http://127.0.0.1:8000/v1.")] = "",
    api_key: Annotated[str, typer.Option("--api-key", envvar="OPENAI_API_KEY", show_envvar=True)] = "none",
    model: Annotated[str, typer.Option("--model", help="Which of its models (default: the first that it lists).")] = "",
    tokenizer: Annotated[str, typer.Option("--tokenizer", help="The model's folder, to decode token ids with.")] = "",
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="How long an answer may take.")] = 30.0,
) -> None:
    """Says what an OpenAI-compatible endpoint supports of what training needs. Without --base-url the tiny policy is started
    and checked."""
    findings = anyio.run(check, base_url, api_key, model, tokenizer, seconds)
    wrong = [finding.name for finding in findings if finding.stands_in_the_way]
    typer.echo(
        f"not trainable through this endpoint: {', '.join(wrong)}" if wrong else "an agent on this endpoint can be trained"
    )
    raise typer.Exit(1 if wrong else 0)


async def check(base_url: str, api_key: str, model: str, tokenizer: str, seconds: float) -> list[Finding]:
    from openai import AsyncOpenAI

    async with AsyncExitStack() as stack:
        if base_url:
            client = await stack.enter_async_context(AsyncOpenAI(base_url=base_url, api_key=api_key))
            reads = tokenizer_of(tokenizer) if tokenizer else None
        else:
            client, model, reads = await stack.enter_async_context(tiny_endpoint())
        findings: list[Finding] = []
        async for finding in examine(client, model=model, tokenizer=reads, seconds=seconds):
            typer.echo(f"{finding.name:<15} {finding.verdict:<6} {finding.words}")
            findings.append(finding)
    return findings


def tokenizer_of(folder: str) -> Tokenizer:
    from art_mcp.local.models import load_tokenizer, model_source
    from art_mcp.sampling.tokenizer import BackendTokenizer

    return BackendTokenizer(load_tokenizer(model_source(folder)))


if __name__ == "__main__":
    typer.run(main)
