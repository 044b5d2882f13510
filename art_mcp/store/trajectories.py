"""Trajectories as Parquet, and back: one row each, messages as JSON, tokens exactly as they were sampled."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false, reportUnknownParameterType=false
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from art_mcp.store.whole import replacing
from art_mcp.types import FailedRollout, Scenario, ScoredTrajectory, Span, TrajectoryGroup

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("group", pa.int64()),
        ("rollout_id", pa.string()),
        ("scenario_id", pa.string()),
        ("level", pa.int64()),
        ("reward", pa.float64()),
        ("reward_parts", pa.string()),
        ("stop_reason", pa.string()),
        ("turns", pa.int64()),
        ("tool_calls", pa.int64()),
        ("malformed", pa.int64()),
        ("tool_errors", pa.int64()),
        ("seconds", pa.float64()),
        ("messages", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("span_lengths", pa.list_(pa.int32())),
        ("span_versions", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float64())),
        ("failure", pa.string()),
        ("failure_message", pa.string()),
    ]
)
"""`span_versions` is the policy step that sampled a span, -1 for the world's; `logprobs` are those of the policy's tokens, in
order; a failed rollout has `failure` and neither messages nor tokens."""


def write_groups(path: Path, groups: Sequence[TrajectoryGroup], *, step: int, keep_seconds: bool) -> None:
    """One row a trajectory, failed rollouts included; the file is whole or not there."""
    rows: list[dict[str, Any]] = []
    for number, group in enumerate(groups):
        rows += [{"step": step, "group": number, **row_of(one, keep_seconds=keep_seconds)} for one in group.trajectories]
        rows += [{"step": step, "group": number, **failed_row(one, group.scenario)} for one in group.failures]
    with replacing(path) as aside:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), aside, compression="zstd")


def row_of(scored: ScoredTrajectory, *, keep_seconds: bool) -> dict[str, Any]:
    trajectory = scored.trajectory
    return {
        "rollout_id": trajectory.rollout_id,
        **scenario_columns(trajectory.scenario),
        "reward": scored.reward,
        "reward_parts": json.dumps(scored.parts),
        "stop_reason": trajectory.stop_reason.value,
        "turns": trajectory.turns,
        "tool_calls": len(trajectory.uses),
        "malformed": trajectory.malformed,
        "tool_errors": trajectory.tool_errors,
        "seconds": trajectory.seconds if keep_seconds else None,
        "messages": json.dumps(trajectory.messages, ensure_ascii=False),
        "token_ids": trajectory.token_ids,
        "span_lengths": [len(span.token_ids) for span in trajectory.spans],
        "span_versions": [-1 if span.logprobs is None else span.policy_version or 0 for span in trajectory.spans],
        "logprobs": [logprob for span in trajectory.spans for logprob in span.logprobs or ()],
    }


def failed_row(failed: FailedRollout, scenario: Scenario | None) -> dict[str, Any]:
    return {
        "rollout_id": failed.rollout_id,
        **scenario_columns(scenario),
        "failure": failed.kind,
        "failure_message": failed.message,
    }


def scenario_columns(scenario: Scenario | None) -> dict[str, Any]:
    return {} if scenario is None else {"scenario_id": scenario.id, "level": scenario.level}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a trajectory file, with `messages` and `reward_parts` as values and `spans` as Spans."""
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    for row in rows:
        row["messages"] = json.loads(row["messages"] or "[]")
        row["reward_parts"] = json.loads(row["reward_parts"] or "{}")
        row["spans"] = spans_of(row)
    return rows


def spans_of(row: dict[str, Any]) -> tuple[Span, ...]:
    spans: list[Span] = []
    tokens, logprobs = iter(row["token_ids"] or ()), iter(row["logprobs"] or ())
    for length, version in zip(row["span_lengths"] or (), row["span_versions"] or (), strict=True):
        token_ids = tuple(next(tokens) for _ in range(length))
        spans.append(Span(token_ids) if version < 0 else Span(token_ids, tuple(next(logprobs) for _ in range(length)), version))
    return tuple(spans)
