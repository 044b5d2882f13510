"""What a person sees: the line as a function of time, one now and then without a terminal, nothing left on one."""

import io

import pytest

from art_mcp.observe import console as module
from art_mcp.observe.console import ConsoleProgress
from art_mcp.types import FailedRollout, Scenario, Span, StopReason, Trajectory


def played(reward, tokens=10):
    span = Span(tuple(range(tokens)), (-0.1,) * tokens, 0)
    return Trajectory(Scenario("s", ""), "r", (), (Span((1, 2, 3)), span), StopReason.ANSWERED).scored(reward)


FAILED = FailedRollout("r", "ToolServerError", "gone")
METRICS = {"reward": 0.5, "entropy": 0.25, "seconds_rollout": 1.0, "seconds_train": 2.0}


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(module, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def wide(monkeypatch):
    """Room for all parts of a line."""
    monkeypatch.setenv("COLUMNS", "200")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_rollouts_are_counted_with_their_mean_reward_pace_and_what_is_left(clock):
    progress = ConsoleProgress(io.StringIO(), rollouts=8, label="evaluating")
    assert progress.line(1000.0) == "evaluating  0 tokens/s"
    progress.finished(played(1.0))
    progress.finished(played(0.0))
    assert progress.line(1010.0) == "evaluating  2/8 rollouts  reward 0.500  2 tokens/s  30 s left"


def test_failed_rollouts_are_told_apart_and_are_no_rewards(clock):
    progress = ConsoleProgress(io.StringIO(), rollouts=4)
    progress.finished(FAILED)
    assert progress.line(1001.0) == "1/4 rollouts  reward 0.000  1 failed  0 tokens/s  3 s left"
    progress.finished(played(1.0))
    assert "reward 1.000  1 failed" in progress.line(1002.0)


def test_a_training_run_shows_its_last_step_and_what_is_left_of_its_steps(clock, wide):
    progress = ConsoleProgress(io.StringIO(), steps=10, label="training")
    progress.finished(played(1.0))
    assert progress.line(1001.0) == "training  1 rollouts  reward 1.000  10 tokens/s"
    progress.metrics(0, METRICS)
    progress.metrics(1, METRICS)
    progress.finished(played(1.0))
    expected = "training  step 2/10  reward 0.500  entropy 0.250  rollout 1.00 s, train 2.00 s  2 tokens/s  40 s left"
    assert progress.line(1010.0) == expected


def test_a_step_whose_groups_all_have_equal_rewards_is_said_to_teach_nothing(clock, wide):
    progress = ConsoleProgress(io.StringIO(), steps=10)
    progress.metrics(0, METRICS | {"samples_with_signal": 0.0})
    assert "train 2.00 s  nothing to learn: equal rewards in each group  0 tokens/s" in progress.line(1010.0)
    progress.metrics(1, METRICS | {"samples_with_signal": 8.0})
    assert "nothing to learn" not in progress.line(1020.0)


def noted(steps):
    """What stays on a stream after so many steps, each given by its metrics, beside the progress."""
    stream = io.StringIO()
    with ConsoleProgress(stream, label="training") as progress:
        for step, values in enumerate(steps):
            progress.metrics(step, METRICS | {"samples": 16.0} | values)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize(
    ("solved", "why"),
    [
        (1.0, "nearly all of them solve their scenario, so stop here"),
        (0.0, "hardly any of them solves its scenario, so begin with demonstrations (--warm-start N)"),
        (0.5, "some scenarios are always solved and others never, so draw what lies between (--curriculum)"),
    ],
)
def test_most_groups_of_ten_steps_with_equal_rewards_are_told_once_with_what_to_try(clock, solved, why):
    mixed, tied = {"samples_with_signal": 16.0, "solved": 0.5}, {"samples_with_signal": 0.0, "solved": solved}
    assert noted([tied] * 9) == noted([mixed] * 2 + [tied] * 8) == []
    (note,) = noted([mixed] * 2 + [tied] * 50)
    begin = "note: 90 % of the last 10 steps' rollouts taught nothing, as rewards tie in their groups: "
    assert note.startswith(begin + why)
    assert noted([{"samples_with_signal": 2.0, "solved": 0.9}] * 30) == []


def test_a_clock_that_ends_more_than_a_few_rollouts_is_told_once_with_what_to_try(clock):
    few, many = {"rollouts": 16.0, "out_of_time": 0.05}, {"rollouts": 16.0, "out_of_time": 0.25}
    assert noted([few] * 50) == noted([many]) == []  # a moment is not enough
    (note,) = noted([few] * 9 + [many] * 50)
    assert note.startswith("note: the time limit ended 7 % of the last 10 steps' rollouts, and nothing is learned from those: ")
    assert note.endswith("raise Limits(seconds=…) in the environment, or play fewer at once (a lower --concurrency)")
    (note,) = noted([{"rollouts": 128.0, "out_of_time": 1.0}] * 20)
    assert note.startswith("note: the time limit ended 100 % of the last step's rollouts")


def test_a_resumed_run_tells_its_pace_from_its_own_steps(clock):
    progress = ConsoleProgress(io.StringIO(), first=90, steps=100)
    progress.metrics(90, METRICS)
    assert progress.line(1010.0).startswith("step 91/100")
    assert progress.line(1010.0).endswith("90 s left")


def test_the_nearer_end_counts(clock):
    progress = ConsoleProgress(io.StringIO(), steps=100, seconds=60.0)
    assert progress.line(1010.0).endswith("50 s left")
    progress.metrics(0, METRICS)
    assert progress.line(1010.0).endswith("50 s left")
    for step in range(1, 50):
        progress.metrics(step, METRICS)
    assert progress.line(1010.0).endswith("10 s left")
    assert progress.line(2000.0).endswith("  0 s left")


def test_without_a_terminal_there_is_a_plain_line_about_every_ten_seconds(clock):
    stream = io.StringIO()
    with ConsoleProgress(stream, rollouts=1000, label="evaluating") as progress:
        for _ in range(350):
            clock.now += 0.1
            progress.finished(played(1.0))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert all(line.startswith("evaluating  ") and "/1000 rollouts" in line for line in lines)
    assert "\x1b" not in stream.getvalue()


NO_SIGNAL = {**METRICS, "samples_with_signal": 0.0, "seconds_rollout": 1000.0}
SHOWN = "training  step 100/200  reward 0.500"
TIED = "nothing to learn: equal rewards in each group"
NARROW = {
    160: f"{SHOWN}  entropy 0.250  {TIED}  1 failed  0 tokens/s  10 s left",
    120: f"{SHOWN}  entropy 0.250  {TIED}  1 failed  10 s left",
    110: f"{SHOWN}  {TIED}  1 failed  10 s left",
    80: f"{SHOWN}  nothing to learn  1 failed  10 s left",
    70: f"{SHOWN}  nothing to learn  1 failed",
    40: f"{SHOWN}  nothing to learn",
}


@pytest.mark.parametrize(("columns", "shown"), NARROW.items())
def test_where_there_is_no_room_for_all_of_a_line_the_least_of_it_is_left_out(clock, monkeypatch, columns, shown):
    monkeypatch.setenv("COLUMNS", str(columns))
    progress = ConsoleProgress(io.StringIO(), steps=200, label="training")
    progress.finished(FAILED)
    progress.metrics(99, NO_SIGNAL)
    assert progress.line(1010.0) == shown


@pytest.mark.parametrize("label", ["before training, sampled", "after the warm start, sampled"])
def test_eighty_columns_hold_what_an_evaluation_and_a_step_show_of_time_and_reward(clock, label):
    evaluation = ConsoleProgress(io.StringIO(), rollouts=1000, label=label)
    for _ in range(999):
        evaluation.finished(played(1.0, tokens=100))
    evaluation.finished(FAILED)
    assert evaluation.line(1010.0).startswith(f"{label}  1000/1000 rollouts  reward 1.000  1 failed")
    training = ConsoleProgress(io.StringIO(), steps=200, label="training")
    training.metrics(12, METRICS)
    assert training.line(1100.0).startswith("training  step 13/200  reward 0.500  entropy 0.250")
    assert training.line(1100.0).endswith("  1438 s left")
    assert max(len(evaluation.line(1010.0)), len(training.line(1100.0))) < 80


def test_without_a_terminal_no_step_is_told_twice_and_a_long_one_tells_how_far_its_rollouts_are(clock):
    stream = io.StringIO()
    with ConsoleProgress(stream, steps=10, label="training") as progress:
        for step in range(2):
            progress.finished(FAILED)
            progress.metrics(step, METRICS)
            for reward in (1.0, 0.0, 0.0):
                clock.now += 11
                progress.finished(played(reward))
    first, second, third, *others = stream.getvalue().splitlines()
    assert first.startswith("training  step 1/10  reward 0.500  entropy 0.250")
    assert second.startswith("training  after step 1/10  2 rollouts  reward 0.500  1 failed")
    assert third.startswith("training  after step 1/10  3 rollouts  reward 0.333  1 failed")
    assert [" ".join(line.split()[1:4]) for line in others] == ["step 2/10 reward", "after step 2/10", "after step 2/10"]


def test_a_long_line_stays_one_line_without_a_terminal(clock):
    stream = io.StringIO()
    with ConsoleProgress(stream, label="x" * 300) as progress:
        clock.now += 11
        progress.finished(played(1.0))
    assert len(stream.getvalue().splitlines()) == 1


def test_a_terminal_is_left_as_it_was(monkeypatch):
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    with ConsoleProgress(stream, rollouts=2, label="evaluating") as progress:
        progress.finished(played(1.0))
    written = stream.getvalue()
    assert "1/2 rollouts" in written
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1
    assert "\x1b[2K" in written.rpartition("1/2 rollouts")[2]
