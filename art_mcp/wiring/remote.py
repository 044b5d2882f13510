"""The remote model that a command line names, and who watches it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import fields
from urllib.parse import urldefrag

from art_mcp.core.address import without_login
from art_mcp.errors import ConfigError, boundary
from art_mcp.model import Model
from art_mcp.ports import Chat, Tracer
from art_mcp.wiring.stage import Setting

OURS = ("lora", "deterministic", "in_process", "lenient", "engine", "engine_python", "engine_args")
"""Settings that say how a model runs here."""


class NamedModel(Model[None]):
    """A remote model as a command line names it: what is wrong with the address, the key or the name ends the command, and
    is no failed rollout."""

    @asynccontextmanager
    async def chat(self) -> AsyncGenerator[Chat]:
        client = self.openai_client()
        from art_mcp.sampling.remote import RemoteChat

        async with client:
            yield RemoteChat(client, self.model, doubted=True)


async def remote_model(setting: Setting, *, api_key: str | None) -> Model[None]:
    """The model `URL#NAME`; without a name the only one that the endpoint has. Raises ConfigError where it has several, or
    none, and for settings that only a model on this machine heeds."""
    defaults = {one.name: one for one in fields(Setting)}
    unheeded = [name for name in OURS if getattr(setting, name) not in (defaults[name].default, {})]
    if unheeded:
        options = ", ".join(f"--{name.removesuffix('s').replace('_', '-')}" for name in unheeded)
        raise ConfigError(
            f"{without_login(setting.model)} is an endpoint, which runs its model as it likes: leave out {options}"
        )
    url, name = urldefrag(setting.model)
    url = url.rstrip("/")
    return NamedModel(name="remote", base_url=url, api_key=api_key, model=name or await only_model(url, api_key))


async def only_model(url: str, api_key: str | None) -> str:
    from openai import OpenAIError

    shown = without_login(url)
    with boundary(ConfigError, f"asking {shown} for its models", OpenAIError):
        async with Model(name="remote", base_url=url, api_key=api_key).openai_client() as client:
            listed = [model async for model in client.models.list()]
    names = without_aliases({model.id: (model.model_extra or {}).get("root") for model in listed})
    if len(names) != 1:
        raise ConfigError(f"name the model, as in {shown}#NAME; the endpoint has {', '.join(names[:20]) or 'none'}")
    return names[0]


def without_aliases(roots: Mapping[str, object]) -> list[str]:
    """One name of each model, by all names and what the endpoint says they stand for, if anything. Our own endpoints list a
    policy by its name, which is always the newest, as `name@step`, and where it is a run's, by the run's name."""
    first: dict[object, str] = {}
    for name, root in roots.items():
        if name.rpartition("@")[0] not in roots:
            first.setdefault(root or name, name)
    return list(first.values())


@asynccontextmanager
async def weave_tracer(project: str | None) -> AsyncGenerator[Tracer | None]:
    """Traces into a weave project within the block; None without one."""
    if project is None:
        yield None
        return
    from art_mcp.observe.weave_calls import open_weave

    tracer = await open_weave(project)
    try:
        yield tracer
    finally:
        await tracer.close()
