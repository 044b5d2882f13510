"""The body of a chat completion request, read and checked: what is sampled otherwise than asked for is refused, in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from art_mcp.serve.refusal import Refusal

Count: TypeAlias = Annotated[int, Field(ge=1, le=2**31)]

FULL = "tokens are sampled from the model's full distribution, which training assumes"
UNCONSTRAINED = "what the model writes is not constrained"
NO_VARIANT = "the model's template is rendered as it is"
TEXT_ONLY = "there is only text"
OLD = "use tools, tool_choice and tool_calls"

NEUTRAL: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "top_p": ((1,), FULL),
    "top_k": ((-1, 0), FULL),
    "min_p": ((0,), FULL),
    "frequency_penalty": ((0,), FULL),
    "presence_penalty": ((0,), FULL),
    "repetition_penalty": ((1,), FULL),
    "logit_bias": (({},), FULL),
    "top_logprobs": ((0,), "only the sampled token's log probability is known"),
    "parallel_tool_calls": ((True,), UNCONSTRAINED),
    "response_format": (({"type": "text"},), UNCONSTRAINED),
    "modalities": ((["text"],), TEXT_ONLY),
    "audio": ((), TEXT_ONLY),
    "functions": (([],), OLD),
    "function_call": ((), OLD),
    "reasoning_effort": ((), NO_VARIANT),
    "verbosity": ((), NO_VARIANT),
    "chat_template_kwargs": (({},), NO_VARIANT),
    "moderation": ((), "nothing is moderated"),
    "web_search_options": ((), "there is no search"),
    "prediction": ((), "nothing is predicted"),
}
"""Fields that would change what is sampled: the values that change nothing, and why there is no other."""


class Part(BaseModel):
    """A piece of a message's content."""

    type: str
    text: str | None = None


class Named(BaseModel):
    name: Annotated[str, Field(min_length=1)]
    arguments: str


class Called(BaseModel):
    """A call that an assistant message made."""

    id: str
    type: Literal["function"] = "function"
    function: Named


class Said(BaseModel):
    """A message; what else clients put into it is no part of the conversation. An assistant's thoughts, under one of the two
    names that are in use, are not rendered: they only tell apart conversations that are remembered."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[Called] | None = None
    tool_call_id: str | None = None
    reasoning_content: Any = None
    reasoning: Any = None
    function_call: Any = None


class Function(BaseModel):
    """`strict` is kept to: a call that does not fit its schema is not handed out as one."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Offered(BaseModel):
    type: Literal["function"]
    function: Function


class StreamOptions(BaseModel):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Asked(BaseModel):
    """A request. What stands in `NEUTRAL` may stand in it too."""

    model_config = ConfigDict(extra="allow", title="ChatCompletionRequest")

    model: str
    messages: Annotated[list[Said], Field(min_length=1)]
    tools: list[Offered] | None = None
    tool_choice: Any = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    logprobs: bool | None = None
    return_token_ids: bool | None = None
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def limit(self) -> int | None:
        """The most tokens of a turn that the client wants."""
        return min((most for most in (self.max_tokens, self.max_completion_tokens) if most is not None), default=None)

    @property
    def reads_calls(self) -> bool:
        """Whether calls are looked for in what the model writes; it is told of its tools in any case."""
        return self.tool_choice != "none"


def read_asked(body: bytes) -> Asked:
    """Raises Refusal (400) that names the first field that is wrong."""
    try:
        asked = Asked.model_validate_json(body, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        raise Refusal(400, f"{where}: {first['msg']}" if where else first["msg"], param=where or None) from error
    check_neutral(asked.model_extra or {})
    check_choice(asked)
    if asked.stream_options is not None and not asked.stream:
        raise Refusal(400, "stream_options is only for stream: true", param="stream_options")
    if asked.temperature is not None and 0 < asked.temperature < 0.01:
        raise Refusal(400, "temperature is 0, which is greedy, or from 0.01 to 2", param="temperature")
    return asked


def check_neutral(extra: Mapping[str, Any]) -> None:
    for field, value in extra.items():
        if value is None:
            continue
        if field not in NEUTRAL:
            raise Refusal(400, f"unknown field {field!r}: it might change what is sampled, so it is not ignored", param=field)
        values, reason = NEUTRAL[field]
        if not any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in values):
            possible = f"leave it out, or give {json.dumps(values[0])}" if values else "leave it out"
            raise Refusal(400, f"{field} is not supported, because {reason}: {possible}", param=field, code="unsupported_value")


def check_choice(asked: Asked) -> None:
    if asked.tool_choice not in (None, "auto", "none"):
        message = f'tool_choice is "auto" or "none": {UNCONSTRAINED}, so a call cannot be made sure of'
        raise Refusal(400, message, param="tool_choice", code="unsupported_value")
    names = [offered.function.name for offered in asked.tools or ()]
    if len(names) != len(set(names)):
        raise Refusal(400, "two tools have the same name", param="tools")
