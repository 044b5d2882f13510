"""`art-mcp serve`: a model opened for clients on a host and port of the user's."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from art_mcp.errors import ConfigError
from art_mcp.model import TrainableModel
from art_mcp.wiring.stage import Setting, backend_of, model_spec

if TYPE_CHECKING:
    from art_mcp.serve.listen import Endpoint
    from art_mcp.serve.turn import Voice


@dataclass(frozen=True, slots=True)
class Place:
    """Where an endpoint listens: `port` 0 is any free one, `hosts` are the names beside loopback by which it may be called."""

    host: str = "127.0.0.1"
    port: int = 0
    hosts: Sequence[str] = ()
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Serving:
    """What a client needs. `model` is always the current policy (a run's name, where it is one's), `policy` the exact one."""

    base_url: str
    api_key: str = field(repr=False)
    model: str
    policy: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@asynccontextmanager
async def serving(setting: Setting, place: Place) -> AsyncGenerator[tuple[Serving, Endpoint]]:
    """Serves the model of `setting` until the block ends. A port in use is told before anything is loaded."""
    from art_mcp.serve.guard import LOOPBACK
    from art_mcp.serve.listen import Endpoint
    from art_mcp.serve.turn import Voice

    if place.host not in LOOPBACK and not place.hosts:
        raise ConfigError(f"--host {place.host} is not loopback: name the hosts that clients call it by, with --allow-host")
    spec = model_spec(setting)
    model = TrainableModel(name=served_name(spec.source), spec=spec)
    name = run_name(spec.source) or model.name
    voices: dict[str, Voice] = {}
    async with Endpoint(
        voices, host=place.host, port=place.port, token=place.token, hosts=place.hosts, loading=True
    ) as endpoint:
        backend = backend_of(setting)  # a slow import: only now, so that a port in use is told at once
        async with backend:
            await model.register(backend)
            voice = Voice(model.sampler(), model.dialect())
            voices.update(dict.fromkeys((name, model.name), voice))
            endpoint.desk.loading = False
            try:
                yield Serving(endpoint.base_url, endpoint.token, name, model.get_inference_name()), endpoint
            finally:
                endpoint.desk.close()  # what is asked from now on would find no engine


def served_name(source: str) -> str:
    """A plain word for a model: its folder's or repository's name; for a run's checkpoint the run's too."""
    path = Path(source)
    run = run_name(source)
    return plain(f"{run}-{path.name}" if run else path.resolve().name)


def run_name(source: str) -> str:
    """The name of the run whose checkpoint `source` is; "" where it is none."""
    path = Path(source)
    return plain(path.parent.parent.name) if path.parent.name == "checkpoints" else ""


def plain(text: str) -> str:
    return "".join("-" if character in "@\\" or character.isspace() else character for character in text) or "model"
