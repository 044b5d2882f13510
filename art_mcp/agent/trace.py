"""What a Tracer is told, and what happens where there is none: nothing. No tracer lives here."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from art_mcp.ports import Tracer
from art_mcp.types import JsonObject, Malformed, ScoredTrajectory, ToolCall, TrajectoryGroup


@contextmanager
def traced(tracer: Tracer | None, kind: str, **inputs: Any) -> Generator[Callable[[Any], None]]:
    """A block that the tracer, if there is one, sees as a call; what it gives takes the outcome."""
    if tracer is None:
        yield ignore
        return
    with tracer.call(kind, inputs) as tell:
        yield tell


def ignore(outcome: Any) -> None:
    """Takes an outcome that nobody wants."""


def described(call: ToolCall | Malformed) -> JsonObject:
    """A tool call for a tracer."""
    if isinstance(call, ToolCall):
        return {"name": call.name, "arguments": dict(call.arguments)}
    return {"malformed": call.kind.value, "text": call.text}


def outcome_of(scored: ScoredTrajectory) -> JsonObject:
    """A scored rollout for a tracer: without its messages, which its turns have told."""
    trajectory = scored.trajectory
    return {
        "reward": scored.reward,
        "rewards": dict(scored.parts),
        "stop_reason": trajectory.stop_reason.value,
        "answer": trajectory.answer,
        "turns": trajectory.turns,
        "tool_calls": len(trajectory.uses),
        "tokens": trajectory.policy_tokens,
    }


def rewards_of(group: TrajectoryGroup) -> JsonObject:
    """A group for a tracer."""
    return {"rewards": [one.reward for one in group.trajectories], "failed": len(group.failures)}
