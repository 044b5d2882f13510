"""Small real things to play on: tool servers in this process, the packaged policy's dialect, policies that do as told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import anyio
from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations

from art_mcp.environment import Environment
from art_mcp.local.models import load_dialect, load_tokenizer, model_source
from art_mcp.model import TrainableModel
from art_mcp.sampling.scripted import ScriptedSampler
from art_mcp.sampling.tokenizer import BackendTokenizer
from art_mcp.tools import open_tools
from art_mcp.types import (
    Completion,
    FailedRollout,
    ModelSpec,
    Policy,
    SamplingParams,
    Scenario,
    ScoredTrajectory,
    Span,
    Trajectory,
)

USER = {"role": "user", "content": "Please."}


@cache
def dialect():
    return load_dialect(ModelSpec("tiny"))


@cache
def hugging_face():
    return load_tokenizer(model_source("tiny"))


@cache
def tokenizer() -> BackendTokenizer:
    return BackendTokenizer(hugging_face())


def tokens(text: str) -> list[int]:
    """A turn that the policy writes, with the template's stop token."""
    return tokenizer().encode(f"{text}<|im_end|>")


def calls(*named: tuple[str, dict[str, Any]]) -> str:
    """Calls as the template writes them."""
    rendered = {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "id": f"call{at:05d}", "function": {"name": name, "arguments": arguments}}
            for at, (name, arguments) in enumerate(named)
        ],
    }
    return tokenizer().decode(dialect().written([USER], rendered, ())).removesuffix("<|im_end|>")


@dataclass
class Desk:
    """A tool server and what happened at it."""

    log: list[str] = field(default_factory=list)
    waiting: int = 0
    both: anyio.Event = field(default_factory=anyio.Event)

    def server(self) -> MCPServer:
        desk = MCPServer("desk", log_level="CRITICAL")
        hints = ToolAnnotations(read_only_hint=True)
        for tool in (self.add, self.fail, self.nap, self.meet):
            desk.add_tool(tool, annotations=hints)
        desk.add_tool(self.write, annotations=ToolAnnotations(destructive_hint=True))
        return desk

    async def add(self, a: int, b: int) -> int:
        """Adds."""
        return a + b

    async def fail(self) -> str:
        raise ToolError("not today")

    async def nap(self, seconds: float) -> str:
        await anyio.sleep(seconds)
        return "rested"

    async def meet(self) -> str:
        """Answers when two calls are in at the same time."""
        self.waiting += 1
        if self.waiting == 2:
            self.both.set()
        await self.both.wait()
        return "met"

    async def write(self, text: str, pause: float = 0.0) -> str:
        self.log.append(f"begin {text}")
        await anyio.sleep(pause)
        self.log.append(f"end {text}")
        return "written"


@asynccontextmanager
async def desk_tools(desk: Desk | None = None, *, only: Sequence[str] | None = None):
    async with open_tools([(desk or Desk()).server()], only=only) as toolbox:
        yield toolbox


def whole(trajectory: Trajectory, toolbox: Any) -> str:
    """What transformers' own rendering makes of the conversation, the next generation prompt included."""
    schemas = [tool.schema() for tool in toolbox.tools]
    return hugging_face().apply_chat_template(
        [dict(message) for message in trajectory.messages], tools=schemas, tokenize=False, add_generation_prompt=True
    )


def text_of(trajectory: Trajectory) -> str:
    return tokenizer().decode(trajectory.token_ids)


class Obedient:
    """A Sampler that writes what the user's prompt tells it to: its turns, separated by " | ". `in_flight` counts."""

    def __init__(self, step: int = 0) -> None:
        self.policy, self.context_length = Policy("obedient", step), 100_000
        self.in_flight = self.most = 0
        self.temperatures: list[float] = []

    async def sample(
        self, token_ids: Sequence[int], *, params: SamplingParams, stop: frozenset[int], shared: int = 0
    ) -> Completion:
        self.temperatures.append(params.temperature)
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        for _ in range(3):
            await anyio.lowlevel.checkpoint()
        self.in_flight -= 1
        told = tokenizer().decode(token_ids).partition("<|im_start|>user\n")[2]
        turns = told.partition("<|im_end|>")[0].split(" | ")
        turn = tokens(turns[told.count("<|im_start|>assistant") - 1])
        return Completion(Span(tuple(turn), (-0.5,) * len(turn), self.policy.step), stopped=True)


class Watcher:
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.seen: list[ScoredTrajectory | FailedRollout] = []

    def finished(self, outcome: ScoredTrajectory | FailedRollout) -> None:
        self.seen.append(outcome)


@dataclass
class Playhouse:
    """A Backend whose policy is any Sampler; training counts steps and keeps the groups."""

    sampler_of: Callable[[], Any]
    step: int = 0
    trained: list[Any] = field(default_factory=list)
    own_dialect: Any = None
    tracer: Any = None

    async def register(self, trainable: Any) -> None:
        pass

    async def ready(self, trainable: Any) -> None:
        pass

    async def train(self, trainable: Any, groups: Any, *, config: Any) -> Mapping[str, float]:
        self.trained.append(groups)
        self.step += 1
        return {"loss": 0.25}

    async def get_step(self, trainable: Any) -> int:
        return self.step

    def sampler(self, trainable: Any) -> Any:
        return self.sampler_of()

    def dialect(self, trainable: Any) -> Any:
        return self.own_dialect or dialect()

    async def save(self, trainable: Any, folder: str) -> None:
        pass


async def obedient(backend: Playhouse | None = None) -> TrainableModel[None]:
    """A model that writes what it is told."""
    sampler = Obedient()
    model = TrainableModel(name="obedient")
    await model.register(backend or Playhouse(lambda: sampler))
    return model


def scenario(*turns: str, id: str = "one", level: int = 1, **facts: Any) -> Scenario:
    return Scenario(id, " | ".join(turns), level, facts)


def said(trajectory: Trajectory) -> float:
    """1 for the answer that the scenario asks for."""
    return float(trajectory.answer == (trajectory.scenario.facts.get("answer", "5") if trajectory.scenario else None))


def environment(*scenarios: Scenario, **fields: Any) -> Environment:
    fields = {"rewards": {"said": said}, "name": "desk", "splits": ("train", "test"), **fields}
    return Environment(servers=["desk"], scenarios=lambda split: scenarios, **fields)


__all__ = ["ScriptedSampler"]
