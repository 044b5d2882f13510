"""Every noun that travels between the rooms, in the order in which it is met. Values only: nothing here does I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, TypeAlias

from art_mcp.errors import ConfigError
from art_mcp.values import AboveZero, CountFromOne, CountFromZero, FromZero, check_values

JsonObject: TypeAlias = Mapping[str, Any]
Message: TypeAlias = Mapping[str, Any]
"""A chat message as Hugging Face templates read it: `role`, `content`, and for the assistant `tool_calls`, a list of
`{"type": "function", "id": …, "function": {"name": …, "arguments": dict}}`; for role `tool` also `name` and
`tool_call_id`. Thoughts may stand apart, in `reasoning_content`."""

Transport: TypeAlias = Literal["stdio", "sse", "streamable-http", "in-process"]


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """One tool server: a command (stdio), a URL (sse, streamable-http), or `target` "file.py:server" (in-process).

    `args`, `env`, `url` and `headers` may hold secrets, so they never appear in a repr.
    """

    name: str
    transport: Transport
    command: str = ""
    args: tuple[str, ...] = field(default=(), repr=False)
    env: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    cwd: Path | None = None
    url: str = field(default="", repr=False)
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    target: str = ""


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool as the model is told of it; `parameters` is a JSON Schema of type object.

    `serial`: its server says that it changes things (an explicit `readOnlyHint: false` or `destructiveHint: true`), so
    parallel calls of it are made one after the other.
    """

    name: str
    description: str
    parameters: JsonObject
    read_only: bool = False
    serial: bool = False

    def schema(self) -> dict[str, Any]:
        """The form that chat templates expect in `tools`."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Scenario:
    """One thing to attempt. `facts` is what rewards need to know (an expected answer, a reference solution): JSON only."""

    id: str
    prompt: str
    level: int = 1
    facts: JsonObject = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model wrote and that can be made. `lenient` says that it stood outside the template's own form."""

    name: str
    arguments: JsonObject
    id: str = ""
    lenient: bool = False


class MalformedKind(StrEnum):
    """What is wrong with a call that the model began."""

    EMPTY = "empty"
    INVALID_JSON = "invalid_json"
    NOT_AN_OBJECT = "not_an_object"
    NO_NAME = "no_name"
    BAD_ARGUMENTS = "bad_arguments"
    UNKNOWN_TOOL = "unknown_tool"
    SCHEMA = "schema"
    INVALID_TAGS = "invalid_tags"


@dataclass(frozen=True, slots=True)
class Malformed:
    """A call that cannot be made; `error` tells the model what to fix. `asked`: its name and arguments, if it has both."""

    text: str
    error: str
    kind: MalformedKind
    asked: tuple[str, JsonObject] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What the model reads of a call's outcome; `structured` is the server's structured content, for rewards."""

    text: str
    is_error: bool = False
    structured: Any = None


@dataclass(frozen=True, slots=True)
class ToolUse:
    """A call with what came back, in the turn (from 0) in which the model made it."""

    call: ToolCall | Malformed
    result: ToolResult
    turn: int


@dataclass(frozen=True, slots=True)
class Span:
    """A run of tokens by one author: the policy if it has logprobs, the world if it has none."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    policy_version: int | None = None

    def __post_init__(self) -> None:
        if self.logprobs is not None and len(self.logprobs) != len(self.token_ids):
            raise ValueError(f"a span of {len(self.token_ids)} tokens has {len(self.logprobs)} logprobs")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample one turn. `seed` alone decides the draw; temperature 0 is greedy. Always from the full distribution
    (no top-p, no top-k), because the trainer's importance ratio assumes it."""

    max_tokens: int = 256
    temperature: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled turn: its span, and whether it ended with a stop token (which is the span's last) or ran out of tokens.

    Logprobs are in nats, of the distribution sampled from; at temperature 0 they are those of temperature 1.
    """

    span: Span
    stopped: bool


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that an endpoint counted; `cached_tokens` are those of the prompt that it had already. `cost`: what it says that
    they cost, usually in US dollars (None: it does not say)."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    cost: float | None = None

    def __add__(self, other: Usage) -> Usage:
        costs = [cost for cost in (self.cost, other.cost) if cost is not None]
        prompt, completion = self.prompt_tokens + other.prompt_tokens, self.completion_tokens + other.completion_tokens
        return Usage(prompt, completion, self.cached_tokens + other.cached_tokens, sum(costs) if costs else None)


@dataclass(frozen=True, slots=True)
class Reply:
    """One turn of a remote model: its `message` in our form, `sent` as the endpoint wrote it and is to see it again, and every
    call that it began, one for each of the `tool_calls` in `sent`. `stopped`: it ended by itself, not for want of tokens."""

    message: Message
    sent: Message
    calls: tuple[ToolCall | Malformed, ...]
    stopped: bool
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a remote model's endpoint may fail to give one answer: so many `tries`, all within `seconds`, each cut off after
    `timeout` seconds. Between them `first_wait` seconds, doubled each time, or what the endpoint asks for."""

    tries: int = 6
    seconds: float = 120.0
    timeout: float = 120.0
    first_wait: float = 0.5


@dataclass(frozen=True, slots=True)
class Limits:
    """What one rollout may use: policy turns, tokens of the whole conversation, tokens of one turn, tool calls, seconds. One
    that the seconds end is scored, but nothing is learned from it (`TrajectoryGroup.compared`).
    `code_seconds`: how long an asynchronous reward, or a `reset`, of the environment may take before it fails the rollout."""

    turns: int = 8
    tokens: int = 4096
    turn_tokens: int = 512
    calls: int = 32
    seconds: float = 120.0
    code_seconds: float = 300.0


class StopReason(StrEnum):
    """Why a rollout ended."""

    ANSWERED = "answered"
    TRUNCATED = "truncated"
    TURN_LIMIT = "turn_limit"
    TOKEN_LIMIT = "token_limit"
    CALL_LIMIT = "call_limit"
    TIME_LIMIT = "time_limit"


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The record of one rollout: `messages` for people and rewards, `spans` for the trainer (empty for remote models), whose
    turns were sampled at `temperature` (None: not known, or not at one)."""

    scenario: Scenario | None
    rollout_id: str
    messages: tuple[Message, ...]
    spans: tuple[Span, ...]
    stop_reason: StopReason
    uses: tuple[ToolUse, ...] = ()
    seconds: float = 0.0
    usage: Usage | None = None
    temperature: float | None = None

    @property
    def answer(self) -> str:
        """The text of the last assistant message; empty unless the rollout ended with an answer."""
        if self.stop_reason is not StopReason.ANSWERED or not self.messages:
            return ""
        return str(self.messages[-1].get("content") or "")

    @property
    def out_of_time(self) -> bool:
        """Whether the clock ended it: the machine's doing as much as the policy's."""
        return self.stop_reason is StopReason.TIME_LIMIT

    @property
    def turns(self) -> int:
        """How often the policy spoke."""
        return sum(message["role"] == "assistant" for message in self.messages)

    @property
    def malformed(self) -> int:
        """Calls that the policy began and that could not be made."""
        return sum(isinstance(use.call, Malformed) for use in self.uses)

    @property
    def tool_errors(self) -> int:
        """Calls that were made and answered with an error."""
        return sum(use.result.is_error and isinstance(use.call, ToolCall) for use in self.uses)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All spans, concatenated."""
        return tuple(token for span in self.spans for token in span.token_ids)

    @property
    def policy_tokens(self) -> int:
        """How many tokens the policy sampled; of a remote model, as far as its endpoint told."""
        sampled = sum(len(span.token_ids) for span in self.spans if span.logprobs is not None)
        return sampled or (self.usage.completion_tokens if self.usage else 0)

    def scored(self, reward: float, parts: Mapping[str, float] | None = None) -> ScoredTrajectory:
        """This trajectory with its reward, and the named parts that add up to it."""
        return ScoredTrajectory(self, float(reward), dict(parts or {}))


@dataclass(frozen=True, slots=True)
class ScoredTrajectory:
    """A trajectory with its reward: the only kind that a group, and so the trainer, accepts."""

    trajectory: Trajectory
    reward: float
    parts: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class FailedRollout:
    """A rollout that the world broke: recorded, left out of the baseline, never a reward of 0."""

    rollout_id: str
    kind: str
    message: str
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class TrajectoryGroup:
    """The rollouts of one scenario, whose rewards are compared with each other."""

    trajectories: tuple[ScoredTrajectory, ...]
    failures: tuple[FailedRollout, ...] = ()
    scenario: Scenario | None = None

    @property
    def rollouts(self) -> tuple[ScoredTrajectory, ...]:
        """One trajectory of each rollout: its last branch, where the conversation branched."""
        return tuple({scored.trajectory.rollout_id: scored for scored in self.trajectories}.values())

    @property
    def compared(self) -> tuple[ScoredTrajectory, ...]:
        """Those of `rollouts` that the clock did not end. How fast a machine is says nothing of the policy, so the others are
        no part of the baseline, of the loss, or of what is thought of a scenario; scored and recorded they are."""
        late = {scored.trajectory.rollout_id for scored in self.trajectories if scored.trajectory.out_of_time}
        return tuple(scored for scored in self.rollouts if scored.trajectory.rollout_id not in late)


@dataclass(frozen=True, slots=True)
class Sample:
    """All that the trainer sees of a trajectory; every tuple has the length of `token_ids`.

    `trainable[i]` says that token i was sampled; `logprobs[i]` is its sampler's logprob in nats (0.0 where not
    trainable; None for a demonstration, which only the supervised objective accepts).
    """

    token_ids: tuple[int, ...]
    trainable: tuple[bool, ...]
    logprobs: tuple[float, ...] | None
    advantage: float


@dataclass(frozen=True, slots=True)
class Policy:
    """A model's weights after a number of training steps: what a Sampler samples under."""

    name: str
    step: int

    def __str__(self) -> str:
        return f"{self.name}@{self.step}"


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """Low-rank adapters on all linear layers; `rank` 16–32 is usual."""

    rank: CountFromOne = 16
    alpha: CountFromOne = 32

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What to load: a folder, a hub id, or "tiny" (the policy in this package). `lora` None means full weights.

    `dtype` "auto": bfloat16 on a GPU, float32 on a CPU; resumed full weights stay as saved. Full weights in bfloat16 are the
    rounding of float32 masters, which are trained; on a GPU the products of float32 weights are in bfloat16. `resume`: `source`
    is a checkpoint, whose optimizer, masters, RNG and step are restored too. `lenient`: bare or fenced JSON is a call as well.
    `load_in_4bit`, `exact_model`: for Unsloth, which replaces the models of hubs by its own builds unless told not to.
    """

    source: str = "tiny"
    lora: LoraSpec | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    seed: int = 0
    resume: bool = False
    lenient: bool = False
    load_in_4bit: bool = False
    exact_model: bool = False

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """The objective and the optimizer. The defaults: group mean baseline, CISPO weight ("reinforce": weight 1), token mean.
    Raises ConfigError for a word that is none of an option's, and for a number out of its bounds."""

    learning_rate: FromZero | None = None
    """None: 1e-4 for LoRA, 3e-4 for models under 10 M parameters, 1e-5 otherwise. `target_kl` bounds what a step of it does."""
    objective: Literal["cispo", "reinforce", "ppo", "gspo"] = "cispo"
    baseline: Literal["mean", "leave_one_out"] = "mean"
    scale_advantages: bool = False
    normalize: Literal["tokens", "sequences", "constant"] = "tokens"
    weight_cap: AboveZero = 5.0
    clip_low: FromZero = 0.2
    clip_high: FromZero = 0.28
    kl_beta: FromZero = 0.0
    sequence_ratio_bounds: tuple[float, float] | None = None
    max_grad_norm: AboveZero = 1.0
    target_kl: AboveZero | None = 5e-4
    """A step that moves the policy by a larger KL is scaled down to it, measured on its own samples; None: whole steps."""
    min_agreement: AboveZero | None = 3.0
    """Steps shrink where Student's t of the last gradients' agreement is below it, target_kl grows above it; None: neither."""
    warmup_steps: CountFromZero = 5
    temperature: AboveZero = 1.0
    share_prefix: bool = True
    micro_batch_tokens: CountFromOne = 4096
    control: Literal["none", "shuffled"] = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        check_values(self)
        bounds = self.sequence_ratio_bounds
        if bounds and not 0 < bounds[0] < bounds[1]:
            raise ConfigError(f"TrainConfig: sequence_ratio_bounds is {bounds}; write the lower one first, above 0")

    def with_(self, **changes: Any) -> TrainConfig:
        """A copy with some values changed."""
        return replace(self, **changes)
