"""Single plays for people: one rollout to read, and the check of an environment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from art_mcp.environment import load_environment
from art_mcp.errors import EnvironmentLoadError
from art_mcp.model import Model, TrainableModel
from art_mcp.observe.waiting import waiting
from art_mcp.types import Message, ScoredTrajectory, Trajectory, Usage
from art_mcp.wiring.stage import Setting, model_spec, note_unseen_tools, open_scene

if TYPE_CHECKING:
    from art_mcp.agent.verdict import Verdict
    from art_mcp.ports import Progress


@dataclass(frozen=True, slots=True)
class Played:
    """One rollout for the terminal: (author, text) `parts` of the token stream (a remote model has none), `lines` of the
    conversation, `usage` as a remote model's endpoint counted it."""

    parts: list[tuple[str, str]]
    lines: list[tuple[str, str]]
    stop_reason: str
    reward: float
    rewards: dict[str, float]
    usage: Usage | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


async def play_one(
    setting: Setting, *, split: str, number: int, temperature: float, stream: Any, api_key: str | None = None
) -> Played:
    """Plays one scenario; a terminal on `stream` is shown that it takes its time. Raises EnvironmentLoadError where the split
    has fewer."""
    from art_mcp.agent.group import Play, door_to

    async with open_scene(setting, splits=(split,), api_key=api_key, stream=stream) as scene:
        scenarios = scene.environment.split(split)
        if number >= len(scenarios):
            raise EnvironmentLoadError(
                f"split {split!r} has {len(scenarios)} scenarios: --number is at most {len(scenarios) - 1}"
            )
        note_unseen_tools(scene, stream=stream)
        async with door_to(scene.model) as chat:
            key = (setting.seed, 0)
            play = Play(scene.model, chat, scene.environment, scene.toolbox, temperature, key, scene.tracer)
            with waiting(stream, "playing"):
                scored = await play.score(scenarios[number], 0, chat=chat)
        return played(scored, token_stream(scene.model, scored.trajectory))


def played(scored: ScoredTrajectory, parts: list[tuple[str, str]]) -> Played:
    trajectory = scored.trajectory
    lines, reason = spoken(trajectory.messages), trajectory.stop_reason.value
    return Played(parts, lines, reason, scored.reward, dict(scored.parts), trajectory.usage)


def token_stream(model: Model[None], trajectory: Trajectory) -> list[tuple[str, str]]:
    """(author, text) of each span; empty for a remote model, whose tokens nobody sees."""
    if not isinstance(model, TrainableModel):
        return []
    from art_mcp.local.models import load_tokenizer, model_source
    from art_mcp.sampling.tokenizer import BackendTokenizer

    tokenizer = BackendTokenizer(load_tokenizer(model_source(model.spec.source)))
    return [("world" if span.logprobs is None else "policy", tokenizer.decode(span.token_ids)) for span in trajectory.spans]


def spoken(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Who said what: the user, the policy (its thoughts, its calls as name and arguments), the tools."""
    lines: list[tuple[str, str]] = []
    for message in messages:
        author = "policy" if message["role"] == "assistant" else str(message["role"])
        if message.get("reasoning_content"):
            lines.append((author, f"thinks {message['reasoning_content']}"))
        if message.get("content") or not message.get("tool_calls"):
            lines.append((author, str(message.get("content") or "")))
        for made in message.get("tool_calls") or ():
            function = made["function"]
            lines.append((author, f"calls {function['name']}({json.dumps(function['arguments'], ensure_ascii=False)})"))
    return lines


def context_ahead(source: str) -> int:
    """The most tokens that the model of `source` was made for, without loading it; 32768 where no file here says it."""
    from art_mcp.local.doctor_model import read_json
    from art_mcp.local.models import base_of
    from art_mcp.local.shape import context_of

    config = Path(base_of(source)) / "config.json"
    return context_of(read_json(config) if config.is_file() else {})


async def check(setting: Setting, *, split: str, n: int, stream: TextIO) -> tuple[str, Verdict, Played | None]:
    """What the model would see of the first scenario, whether lazy policies stay below the reference solution within its
    context, and the conversation of the verdict's example, if it has one; `stream` is told how far it is."""
    from art_mcp.agent.check import check_environment, plays_of
    from art_mcp.agent.rollout import opening_of
    from art_mcp.local.models import load_dialect, load_tokenizer, model_source
    from art_mcp.observe.console import ConsoleProgress
    from art_mcp.sampling.scripted import ScriptedSampler
    from art_mcp.sampling.tokenizer import BackendTokenizer
    from art_mcp.tools import open_servers

    environment = load_environment(setting.environment, **setting.options)
    spec = model_spec(setting)
    dialect = load_dialect(spec)
    scenarios = environment.split(split)
    with ConsoleProgress(stream, label="playing", rollouts=plays_of(environment) * min(n, len(scenarios))) as console:
        progress: Progress = console
        async with open_servers(environment, config=setting.config) as toolbox:
            messages = opening_of(scenarios[0].prompt, environment.system)
            shared, rest = dialect.opening(messages, toolbox.tools)
            opening = BackendTokenizer(load_tokenizer(model_source(spec.source))).decode([*shared, *rest])
            verdict = await check_environment(
                environment,
                dialect=dialect,
                toolbox=toolbox,
                play=partial(ScriptedSampler, context_length=context_ahead(spec.source)),
                split=split,
                n=n,
                progress=progress,
            )
    example = verdict.example
    return opening, verdict, played(example.scored, []) if example else None
