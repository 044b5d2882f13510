"""The handles that users hold: `Model`, `TrainableModel`, each with the user's own typed config. Others do the work."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Generic, TypeVar, overload

from pydantic import BaseModel

from art_mcp.core.address import without_login
from art_mcp.errors import ModelError
from art_mcp.ports import Backend, Chat, Dialect, Sampler, Tracer
from art_mcp.types import LoraSpec, ModelSpec, Patience, TrainConfig, TrajectoryGroup

if TYPE_CHECKING:
    from openai import AsyncOpenAI

ModelConfig = TypeVar("ModelConfig", bound=BaseModel | None)


class Model(Generic[ModelConfig]):
    """A named model with a user's own `config` (a pydantic model, or None); type checkers know the config's type.

    With `base_url` it is one behind an OpenAI-compatible chat endpoint, which can be played and evaluated but not trained:
    `model` is the endpoint's name of it (default: `name`), `api_key` its key (default: the environment's OPENAI_API_KEY, or
    none), `patience` how long the endpoint's failures are borne.
    """

    config: ModelConfig

    @overload
    def __init__(
        self: Model[None],
        *,
        name: str,
        config: None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        model: str | None = None,
        patience: Patience | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self,
        *,
        name: str,
        config: ModelConfig,
        base_url: str | None = None,
        api_key: str | None = None,
        model: str | None = None,
        patience: Patience | None = None,
    ) -> None: ...

    def __init__(
        self,
        *,
        name: str,
        config: ModelConfig | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        model: str | None = None,
        patience: Patience | None = None,
    ) -> None:
        if not name or any(character in name for character in "/@\\ \t\n"):
            raise ModelError(f"a model's name is a plain word without '/', '@' or spaces, not {name!r}")
        if base_url is not None and not base_url.startswith(("http://", "https://")):
            raise ModelError(f"base_url is an address such as http://127.0.0.1:8000/v1, not {without_login(base_url)!r}")
        self.name = name
        self.config = config  # pyright: ignore[reportAttributeAccessIssue]  # the overloads tie None to Model[None]
        self.base_url, self.model = base_url, model or name
        self._api_key, self._patience = api_key, patience

    @property
    def tracer(self) -> Tracer | None:
        """Watches what this model plays; a remote model's is given where it plays."""
        return None

    def openai_client(self) -> AsyncOpenAI:
        """A client of the model's endpoint, for any agent; `async with` closes it. Raises ModelError without a base_url."""
        if self.base_url is None:
            raise ModelError(f"model {self.name!r} has no base_url: give it one, or take a TrainableModel")
        from openai import AsyncOpenAI

        return AsyncOpenAI(base_url=self.base_url, api_key=self._api_key or os.environ.get("OPENAI_API_KEY") or "none")

    @asynccontextmanager
    async def chat(self) -> AsyncGenerator[Chat]:
        """A Chat with the remote model, whose connections end with the block. Raises ModelError without a base_url."""
        client = self.openai_client()
        from art_mcp.sampling.remote import RemoteChat

        async with client:
            yield RemoteChat(client, self.model, patience=self._patience)


class TrainableModel(Model[ModelConfig]):
    """A model that a backend samples and trains: `await model.register(backend)` first, then everything else.

    `base_model`: "tiny" (the policy in this package), a folder, a run ("runs/x", "x@50"), or a hub id. `lora`: None trains all
    weights.
    """

    @overload
    def __init__(
        self: TrainableModel[None],
        *,
        name: str,
        base_model: str = "tiny",
        config: None = None,
        lora: LoraSpec | None = None,
        seed: int = 0,
        spec: ModelSpec | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self,
        *,
        name: str,
        base_model: str = "tiny",
        config: ModelConfig,
        lora: LoraSpec | None = None,
        seed: int = 0,
        spec: ModelSpec | None = None,
    ) -> None: ...

    def __init__(
        self,
        *,
        name: str,
        base_model: str = "tiny",
        config: ModelConfig | None = None,
        lora: LoraSpec | None = None,
        seed: int = 0,
        spec: ModelSpec | None = None,
    ) -> None:
        super().__init__(name=name, config=config)  # pyright: ignore[reportArgumentType, reportCallIssue]
        self.spec = spec or ModelSpec(source=base_model, lora=lora, seed=seed)
        self._backend: Backend | None = None

    @property
    def backend(self) -> Backend:
        """The backend that this model is registered with. Raises ModelError before `register`."""
        if self._backend is None:
            raise ModelError(f"model {self.name!r} has no backend yet: `await model.register(LocalBackend())` first")
        return self._backend

    @property
    def tracer(self) -> Tracer | None:
        """Watches what this model plays: its backend's."""
        return self.backend.tracer

    async def register(self, backend: Backend) -> None:
        """Loads the model on `backend`, which from then on samples and trains it."""
        await backend.register(self)
        self._backend = backend

    async def train(self, groups: Sequence[TrajectoryGroup], *, config: TrainConfig | None = None) -> Mapping[str, float]:
        """One optimizer step on `groups`; the new policy is published before it returns. Returns the step's metrics. Raises
        TrainError where every rollout failed, with the first failure."""
        return await self.backend.train(self, groups, config=config or TrainConfig())

    async def get_step(self) -> int:
        """How many training steps this model has taken."""
        return await self.backend.get_step(self)

    async def ready(self) -> None:
        """Returns when `sampler` can be used: where its engine died, once another one answers. Raises EngineError."""
        await self.backend.ready(self)

    def sampler(self) -> Sampler:
        """Samples from the current policy."""
        return self.backend.sampler(self)

    def dialect(self) -> Dialect:
        """How this model's conversations become tokens and back."""
        return self.backend.dialect(self)

    def get_inference_name(self) -> str:
        """The current policy as an endpoint calls it, `name@step`; its name alone is always the current one."""
        return str(self.sampler().policy)

    def openai_client(self) -> AsyncOpenAI:
        """A client of this model's own OpenAI-compatible endpoint, for any agent: `model=` is this model's `name`, or
        `get_inference_name()` for this policy and no later one. Called where the backend's event loop runs."""
        from openai import AsyncOpenAI

        base_url, key = self.backend.endpoint(self)
        return AsyncOpenAI(base_url=base_url, api_key=key)
