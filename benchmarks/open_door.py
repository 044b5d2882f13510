"""Does an agent that knows nothing of this package learn? `python -m benchmarks.open_door --seconds 120 --json`

The tiny policy is served as an OpenAI-compatible endpoint; a loop on the `openai` package, written the usual way, plays the
calculator's questions on it over MCP; what `art_mcp.openai_patch` recorded of that is trained on. The same held-out
questions are asked before and after, greedy, by the same agent: the exact McNemar test says whether the difference is chance.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from art_mcp import LocalBackend, TrainableModel, load_environment, open_tools
from art_mcp.agent.evaluate import balanced, wilson
from art_mcp.agent.loop import pick
from art_mcp.core.samples import spread
from art_mcp.openai_patch import gather_agent_groups
from art_mcp.types import ToolCall
from benchmarks.report import describe_machine, hand_out, own_versions

GROUPS, ROLLOUTS = 16, 8


@dataclass(frozen=True)
class Loop:
    """The agent: chat completions and tool calls in turn, as everybody writes it."""

    toolbox: Any

    async def __call__(self, client: Any, scenario: Any) -> str:
        messages: list[Any] = [{"role": "user", "content": scenario.prompt}]
        tools = [tool.schema() for tool in self.toolbox.tools]
        for _ in range(6):
            answer = await client.chat.completions.create(model="gpt-4o", messages=messages, tools=tools, max_tokens=192)
            message = answer.choices[0].message
            messages.append(message)
            if not message.tool_calls:
                return message.content or ""
            for call in message.tool_calls:
                result = await self.toolbox.call(ToolCall(call.function.name, json.loads(call.function.arguments)))
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result.text})
        return ""


def mcnemar(before: list[bool], after: list[bool]) -> dict[str, Any]:
    """The exact test (McNemar 1947, binomial form) on pairs: how often chance alone parts gained and lost at least so far."""
    gained = sum(new and not old for old, new in zip(before, after, strict=True))
    lost = sum(old and not new for old, new in zip(before, after, strict=True))
    count = gained + lost
    tail = sum(math.comb(count, place) for place in range(min(gained, lost) + 1)) / 2**count
    return {"gained": gained, "lost": lost, "p": min(1.0, 2 * tail)}


def shares(solved: list[bool], scenarios: list[Any]) -> dict[str, Any]:
    """The share solved, with its 95 % Wilson interval, overall and by level."""
    levels = sorted({scenario.level for scenario in scenarios})
    parts = {f"level{level}": [on for on, one in zip(solved, scenarios, strict=True) if one.level == level] for level in levels}
    return {
        name: {"solved": sum(part) / len(part), "ci95": wilson(sum(part), len(part)), "n": len(part)}
        for name, part in {"all": solved, **parts}.items()
    }


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    environment = load_environment("calculator")
    held_out = balanced(environment.split("test"), arguments.n)
    model = TrainableModel(name="policy", base_model="tiny")
    async with AsyncExitStack() as stack:
        backend = await stack.enter_async_context(LocalBackend())
        toolbox = await stack.enter_async_context(open_tools(environment.servers, only=environment.tools))
        await model.register(backend)
        client = await stack.enter_async_context(model.openai_client())
        play = {
            "model": model,
            "client": client,
            "reward": lambda recording, _: environment.rewards["correct"](recording.trajectory),
        }

        async def measure() -> list[bool]:
            groups = await gather_agent_groups(Loop(toolbox), held_out, rollouts=1, temperature=0.0, step=-1, **play)
            return [bool(group.rollouts) and group.rollouts[0].reward == 1.0 for group in groups]

        before = await measure()
        print(f"before: {sum(before) / len(before):.3f} of {len(before)}", file=sys.stderr, flush=True)
        began, step, seconds = time.monotonic(), 0, {"rollout": 0.0, "train": 0.0}
        trajectories = tokens = failures = 0
        while time.monotonic() - began < arguments.seconds and step < arguments.steps:
            started = time.monotonic()
            batch = pick(environment.split("train"), step=step, count=GROUPS, seed=arguments.seed)
            groups = await gather_agent_groups(Loop(toolbox), batch, rollouts=ROLLOUTS, seed=arguments.seed, **play)
            rolled = time.monotonic()
            await model.train(groups)
            seconds = {"rollout": seconds["rollout"] + rolled - started, "train": seconds["train"] + time.monotonic() - rolled}
            rewards = [one.reward for group in groups for one in group.rollouts]
            trajectories += sum(len(group.trajectories) for group in groups)
            tokens += sum(sum(spread(one.trajectory.spans)[1]) for group in groups for one in group.trajectories)
            failures += sum(len(group.failures) for group in groups)
            step += 1
            if step % 10 == 0:
                print(f"step {step}: reward {sum(rewards) / len(rewards):.3f}", file=sys.stderr, flush=True)
        trained = time.monotonic() - began
        after = await measure()
    test = mcnemar(before, after)
    return {
        "date": date.today().isoformat(),
        "command": " ".join(["python -m benchmarks.open_door", *sys.argv[1:]]),
        "n": len(held_out),
        "before": shares(before, held_out),
        "after": shares(after, held_out),
        "mcnemar": test,
        "steps": step,
        "seconds": {"all": round(trained, 1), **{name: round(value, 1) for name, value in seconds.items()}},
        "rollouts": step * GROUPS * ROLLOUTS,
        "failed_rollouts": failures,
        "trajectories": trajectories,
        "sampled_tokens": tokens,
        "versions": own_versions("openai", "torch"),
        "machine": describe_machine(),
        "holds": sum(after) > sum(before) and test["p"] < 0.001,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="how long to train")
    parser.add_argument("--steps", type=int, default=sys.maxsize, help="how many steps to train at most")
    parser.add_argument("--n", type=int, default=400, help="held-out scenarios, half of each level")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the result here")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    arguments = parser.parse_args()
    summary = asyncio.run(run(arguments))
    for name in summary["before"]:
        print(f"{name:<8} {summary['before'][name]['solved']:.3f} -> {summary['after'][name]['solved']:.3f}")
    hand_out(summary, arguments)


if __name__ == "__main__":
    main()
