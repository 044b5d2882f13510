"""Trajectories through Parquet and back: exact, failed rollouts included, the same bytes for the same rollouts."""

import json
import math
import random

import pyarrow.parquet as pq

from art_mcp.store.trajectories import read_rows, write_groups
from art_mcp.types import (
    FailedRollout,
    Malformed,
    MalformedKind,
    Scenario,
    Span,
    StopReason,
    ToolCall,
    ToolResult,
    ToolUse,
    Trajectory,
    TrajectoryGroup,
)

SCENARIO = Scenario("sum-1", "2 + 3? é 🦩", level=2, facts={"answer": "5"})
MESSAGES = (
    {"role": "user", "content": "2 + 3? é 🦩\n\t\x00 “”"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "type": "function",
                "id": "call00000",
                "function": {"name": "add", "arguments": {"a": 2, "b": 3.5, "c": [None, True, {"d": "\u2028"}], "big": 10**30}},
            }
        ],
    },
    {"role": "tool", "content": "5", "name": "add", "tool_call_id": "call00000"},
    {"role": "assistant", "content": "5"},
)
USES = (
    ToolUse(ToolCall("add", {}), ToolResult("5"), 0),
    ToolUse(ToolCall("add", {}), ToolResult("no", is_error=True), 1),
    ToolUse(Malformed("x", "y", MalformedKind.EMPTY), ToolResult("y", is_error=True), 1),
)
LOGPROBS = tuple(math.log(random.Random(7).random()) for _ in range(3))
SPANS = (Span((1, 2)), Span((3, 151_935, 0), LOGPROBS, 41), Span((4,)), Span((5, 6), (-0.0, -1e-300), 42))


def trajectory(number=0, **fields):
    values = {"messages": MESSAGES, "spans": SPANS, "stop_reason": StopReason.ANSWERED, "uses": USES, "seconds": 1.5, **fields}
    return Trajectory(SCENARIO, f"0:3:sum-1:{number}", **values)


def written(tmp_path, *groups, keep_seconds=True, step=3):
    path = tmp_path / "step-000003.parquet"
    write_groups(path, groups, step=step, keep_seconds=keep_seconds)
    return path


def test_tokens_logprobs_and_messages_come_back_to_the_last_bit(tmp_path):
    scored = trajectory().scored(0.1 + 0.2, {"correct": 0.30000000000000004})
    (row,) = read_rows(written(tmp_path, TrajectoryGroup((scored,), scenario=SCENARIO)))
    assert row["spans"] == SPANS
    assert tuple(row["token_ids"]) == scored.trajectory.token_ids
    assert tuple(row["messages"]) == MESSAGES
    assert row["reward"] == scored.reward
    assert row["reward_parts"] == scored.parts
    assert (row["step"], row["group"], row["rollout_id"], row["scenario_id"], row["level"]) == (3, 0, "0:3:sum-1:0", "sum-1", 2)
    assert (row["turns"], row["tool_calls"], row["malformed"], row["tool_errors"], row["stop_reason"]) == (
        2,
        3,
        1,
        1,
        "answered",
    )
    assert row["seconds"] == 1.5
    assert row["failure"] is None


def test_a_failed_rollout_is_a_row_without_a_reward(tmp_path):
    failed = FailedRollout("0:3:sum-1:1", "ToolServerError", "gone: é")
    path = written(
        tmp_path, TrajectoryGroup((), (), SCENARIO), TrajectoryGroup((trajectory().scored(1.0),), (failed,), SCENARIO)
    )
    good, bad = read_rows(path)
    assert (good["group"], bad["group"]) == (1, 1)
    assert (bad["failure"], bad["failure_message"]) == ("ToolServerError", "gone: é")
    assert (bad["rollout_id"], bad["scenario_id"], bad["level"]) == ("0:3:sum-1:1", "sum-1", 2)
    assert bad["reward"] is None
    assert (bad["spans"], bad["messages"], bad["reward_parts"]) == ((), [], {})


def test_a_trajectory_without_spans_or_scenario_can_be_kept(tmp_path):
    remote = Trajectory(None, "r", ({"role": "assistant", "content": ""},), (), StopReason.TIME_LIMIT)
    (row,) = read_rows(written(tmp_path, TrajectoryGroup((remote.scored(0.0),))))
    assert row["spans"] == ()
    assert row["scenario_id"] is None
    assert row["stop_reason"] == "time_limit"


def test_the_same_rollouts_are_the_same_bytes_where_times_are_left_out(tmp_path):
    groups = [[TrajectoryGroup((trajectory(seconds=seconds).scored(1.0),), scenario=SCENARIO)] for seconds in (0.25, 99.0)]
    timeless = [written(tmp_path, *group, keep_seconds=False).read_bytes() for group in groups]
    timed = [written(tmp_path, *group).read_bytes() for group in groups]
    assert timeless[0] == timeless[1]
    assert timed[0] != timed[1]


def test_a_step_without_rows_can_be_read(tmp_path):
    assert read_rows(written(tmp_path)) == []


def test_any_parquet_reader_can_read_a_file(tmp_path):
    table = pq.read_table(written(tmp_path, TrajectoryGroup((trajectory().scored(1.0),), scenario=SCENARIO)))
    assert table.num_rows == 1
    assert json.loads(table["messages"][0].as_py())[-1] == {"role": "assistant", "content": "5"}
    assert list(tmp_path.iterdir()) == [tmp_path / "step-000003.parquet"]
