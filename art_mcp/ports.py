"""The doors between the rooms. Protocols only; what stands behind them lives in the outer rooms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any, Protocol

from art_mcp.types import (
    Completion,
    FailedRollout,
    JsonObject,
    Malformed,
    Message,
    ModelSpec,
    Policy,
    Reply,
    SamplingParams,
    ScoredTrajectory,
    Tool,
    ToolCall,
    ToolResult,
    TrainConfig,
    TrajectoryGroup,
)


class Tokenizer(Protocol):
    """Text to token ids and back."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; the spelling of a special token becomes that token, and nothing is added."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`, special tokens included, spaces left as they are."""
        ...


class Dialect(Protocol):
    """How one model's conversations become tokens, and its tokens become calls."""

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """The tokens that end a turn of the policy."""
        ...

    def opening(self, messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[list[int], list[int]]:
        """The first prompt, generation prompt included, in two parts: what is the same for every conversation with this
        system message and these tools (may be empty), and the rest."""
        ...

    def bridge(self, reply: Message, following: Sequence[Message], last_token: int) -> list[int]:
        """The tokens between the policy's turn `reply`, which ended with `last_token`, and its next turn: the rest of the
        template's end of turn, the `following` messages, the generation prompt."""
        ...

    def read(self, token_ids: Sequence[int], tools: Sequence[Tool]) -> tuple[Message, tuple[ToolCall | Malformed, ...]]:
        """The assistant message that a sampled turn stands for, and every call that the policy began in it."""
        ...

    def read_text(self, text: str, tools: Sequence[Tool]) -> tuple[Message, tuple[ToolCall | Malformed, ...]]:
        """`read` of a turn's text, without its stop token."""
        ...

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of a sampled turn, without the stop token that it may end with."""
        ...

    def spelling(self, token_id: int) -> str:
        """The text of one token; one that is a part of a character has U+FFFD in it."""
        ...

    def written(self, before: Sequence[Message], reply: Message, tools: Sequence[Tool]) -> list[int]:
        """The tokens that the policy would have sampled for `reply` in the template's own form, its stop token included."""
        ...


class Sampler(Protocol):
    """Tokens in, tokens and logprobs out, under one policy at a time."""

    @property
    def policy(self) -> Policy: ...

    @property
    def context_length(self) -> int:
        """The most tokens, prompt and turn together, that one conversation may have."""
        ...

    async def sample(
        self, token_ids: Sequence[int], *, params: SamplingParams, stop: frozenset[int], shared: int = 0
    ) -> Completion:
        """Samples one turn after `token_ids`. `shared` is a hint: so many leading tokens are the same in every
        conversation with these tools, so an engine may compute them once.

        Raises EngineError when the engine fails or the prompt leaves no room in the model's context.
        """
        ...


class Chat(Protocol):
    """Messages in, message out: a model behind somebody's chat endpoint, whose tokens nobody sees."""

    async def reply(self, conversation: Sequence[Message], *, tools: Sequence[Tool], params: SamplingParams) -> Reply:
        """The next turn of a conversation in the endpoint's own form: earlier turns are their `Reply.sent`.

        Raises NoRoomError where the conversation has outgrown the model's context, EngineError when the endpoint gives no
        usable answer.
        """
        ...


class Toolbox(Protocol):
    """Several tool servers as one set of tools."""

    @property
    def tools(self) -> tuple[Tool, ...]: ...

    async def call(self, call: ToolCall) -> ToolResult:
        """Makes a call. A tool's own error is a result; a dead or silent server raises ToolServerError."""
        ...

    @property
    def unrestricted(self) -> Toolbox:
        """The same servers with every tool that they have, for the environment's own code: a call of one that none of them has
        raises LookupError."""
        ...

    def last_error(self, name: str) -> str:
        """What the server of the tool `name` wrote when it last answered with an error, and may keep from its clients; "" if
        nothing."""
        ...


class Toolboxes(Protocol):
    """What rollouts are played on: one toolbox for all of them, or `separate` ones."""

    @property
    def tools(self) -> tuple[Tool, ...]: ...

    @property
    def separate(self) -> bool:
        """Whether a toolbox is lent to one rollout at a time."""
        ...

    def lend(self) -> AbstractAsyncContextManager[Toolbox]:
        """A toolbox for one rollout. Waits until there is one; raises ToolServerError where its servers do not start."""
        ...


class Progress(Protocol):
    """Told of rollouts as they happen."""

    def finished(self, outcome: ScoredTrajectory | FailedRollout) -> None: ...


class Recorder(Protocol):
    """Keeps what a run produced."""

    def groups(self, step: int, groups: Sequence[TrajectoryGroup]) -> None: ...

    def metrics(self, step: int, values: Mapping[str, Any]) -> None: ...


class Tracer(Protocol):
    """Watches from inside: what is begun, with what, and what comes of it. Calls nest as the blocks do, also over tasks."""

    def call(self, kind: str, inputs: JsonObject) -> AbstractContextManager[Callable[[Any], None]]:
        """A block of this kind ("rollout", "turn", "tool", …). What it gives is told the outcome, as JSON values; where an
        exception leaves the block, that is the outcome."""
        ...


class Trainable(Protocol):
    """What a backend needs to know of a model: a name and what to load."""

    @property
    def name(self) -> str: ...

    @property
    def spec(self) -> ModelSpec: ...


class Backend(Protocol):
    """Serves and trains models. `TrainableModel` delegates to it."""

    @property
    def tracer(self) -> Tracer | None:
        """Watches all that is played and trained here; None: nobody does."""
        ...

    async def register(self, trainable: Trainable) -> None: ...

    async def ready(self, trainable: Trainable) -> None:
        """Returns when the model can be sampled from. An engine that died is started anew, which takes a minute or two: awaited
        before each turn, while the rollout's time stands still. Raises EngineError where it cannot be."""
        ...

    async def train(
        self, trainable: Trainable, groups: Sequence[TrajectoryGroup], *, config: TrainConfig
    ) -> Mapping[str, float]:
        """One optimizer step; returns its metrics. Advances the policy's step even when no group carries a signal."""
        ...

    async def get_step(self, trainable: Trainable) -> int: ...

    def sampler(self, trainable: Trainable) -> Sampler: ...

    def dialect(self, trainable: Trainable) -> Dialect: ...

    def endpoint(self, trainable: Trainable) -> tuple[str, str]:
        """The base URL and the key of an OpenAI-compatible endpoint of the model, which ends with the backend. Called where
        the backend's event loop runs."""
        ...

    async def save(self, trainable: Trainable, folder: str) -> None:
        """Writes a checkpoint (weights, optimizer, RNG) from which training goes on exactly."""
        ...
