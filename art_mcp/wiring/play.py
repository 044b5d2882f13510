"""Single plays for people: one rollout to read, and the check of an environment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from art_mcp.environment import load_environment
from art_mcp.errors import EnvironmentLoadError
from art_mcp.types import Message
from art_mcp.wiring.stage import Setting, model_spec, open_stage

if TYPE_CHECKING:
    from art_mcp.agent.check import Verdict


@dataclass(frozen=True, slots=True)
class Played:
    """One rollout for the terminal: (author, text) `parts` of the token stream, `lines` of the conversation."""

    parts: list[tuple[str, str]]
    lines: list[tuple[str, str]]
    stop_reason: str
    reward: float
    rewards: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


async def play_one(setting: Setting, *, split: str, number: int, temperature: float) -> Played:
    """Plays one scenario. Raises EnvironmentLoadError where the split has fewer."""
    from art_mcp.agent.rollout import rollout
    from art_mcp.local.models import load_tokenizer, model_source
    from art_mcp.sampling.tokenizer import BackendTokenizer

    async with open_stage(setting, splits=(split,)) as stage:
        scenarios = stage.environment.split(split)
        if number >= len(scenarios):
            raise EnvironmentLoadError(
                f"split {split!r} has {len(scenarios)} scenarios: --number is at most {len(scenarios) - 1}"
            )
        await stage.model.ready()
        trajectory = await rollout(
            scenarios[number],
            sampler=stage.model.sampler(),
            dialect=stage.model.dialect(),
            toolbox=stage.toolbox,
            system=stage.environment.system,
            limits=stage.environment.limits,
            temperature=temperature,
            key=(setting.seed, 0),
        )
        scored = await stage.environment.score(trajectory, stage.toolbox)
        tokenizer = BackendTokenizer(load_tokenizer(model_source(stage.model.spec.source)))
    authors = [("world" if span.logprobs is None else "policy", tokenizer.decode(span.token_ids)) for span in trajectory.spans]
    return Played(authors, spoken(trajectory.messages), trajectory.stop_reason.value, scored.reward, dict(scored.parts))


def spoken(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Who said what: the user, the policy (its calls as name and arguments), the tools."""
    lines: list[tuple[str, str]] = []
    for message in messages:
        author = "policy" if message["role"] == "assistant" else str(message["role"])
        if message.get("content") or not message.get("tool_calls"):
            lines.append((author, str(message.get("content") or "")))
        for made in message.get("tool_calls") or ():
            function = made["function"]
            lines.append((author, f"calls {function['name']}({json.dumps(function['arguments'], ensure_ascii=False)})"))
    return lines


async def check(setting: Setting, *, split: str, n: int) -> tuple[str, Verdict]:
    """What the model would see of the first scenario, and whether lazy policies stay below the reference solution."""
    from art_mcp.agent.check import check_environment
    from art_mcp.local.models import load_dialect, load_tokenizer, model_source
    from art_mcp.sampling.scripted import ScriptedSampler
    from art_mcp.sampling.tokenizer import BackendTokenizer
    from art_mcp.tools import open_tools

    environment = load_environment(setting.environment, **setting.options)
    spec = model_spec(setting)
    dialect = load_dialect(spec)
    async with open_tools(environment.servers, config=setting.config, only=environment.tools) as toolbox:
        messages: list[Message] = [{"role": "system", "content": environment.system}] if environment.system else []
        messages.append({"role": "user", "content": environment.split(split)[0].prompt})
        shared, rest = dialect.opening(messages, toolbox.tools)
        opening = BackendTokenizer(load_tokenizer(model_source(spec.source))).decode([*shared, *rest])
        verdict = await check_environment(environment, dialect=dialect, toolbox=toolbox, play=ScriptedSampler, split=split, n=n)
    return opening, verdict
