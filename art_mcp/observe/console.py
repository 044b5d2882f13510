"""What a person sees while a run goes on: a progress line, or plain lines now and then where there is no terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from art_mcp.observe.ties import Ties
from art_mcp.types import FailedRollout, ScoredTrajectory, TrajectoryGroup

QUIET_SECONDS = 10.0
"""Between two lines where stderr is no terminal."""


class ConsoleProgress:
    """Progress and Recorder for people; a block, so that the terminal is left as it was.

    `rollouts` is how many there will be; or for a training run, `first` the step at which it begins, `steps` the one at
    which it ends, `seconds` how long it may take.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        label: str = "",
        rollouts: int | None = None,
        first: int = 0,
        steps: int | None = None,
        seconds: float | None = None,
    ) -> None:
        self._console = Console(file=stream)
        self._live = Live(console=self._console, refresh_per_second=4, transient=True) if self._console.is_terminal else None
        self._label, self._rollouts, self._first, self._steps, self._seconds = label, rollouts, first, steps, seconds
        self._began = self._spoke = monotonic()
        self._rewards: list[float] = []
        self._failed = self._tokens = 0
        self._line = ""
        self._step: int | None = None
        self._ties = Ties()

    def __enter__(self) -> ConsoleProgress:
        if self._live:
            self._live.start()
            self._live.update(Text(f"{self._label} …"))
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def finished(self, outcome: ScoredTrajectory | FailedRollout) -> None:
        if isinstance(outcome, ScoredTrajectory):
            self._rewards.append(outcome.reward)
            self._tokens += outcome.trajectory.policy_tokens
        else:
            self._failed += 1
        self._show()

    def groups(self, step: int, groups: Sequence[TrajectoryGroup]) -> None:
        pass

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """A step is over: its reward stays in the line until the next one's, a note above it."""
        parts = [
            f"step {of(step + 1, self._steps)}",
            f"reward {values['reward']:.3f}",
            f"entropy {values.get('entropy', 0.0):.3f}",
        ]
        parts.append(f"rollout {values['seconds_rollout']:.2f} s, train {values['seconds_train']:.2f} s")
        if values.get("samples_with_signal") == 0:
            parts.append("nothing to learn: equal rewards in each group")
        self._line, self._step = "  ".join(parts), step + 1
        self._rewards.clear()
        if note := self._ties.note(values):
            self._console.print(note, highlight=False, markup=False, soft_wrap=True)
        self._show()

    def _show(self) -> None:
        now = monotonic()
        if self._live:
            self._live.update(Text(self.line(now), no_wrap=True, overflow="ellipsis"))
        elif now - self._spoke >= QUIET_SECONDS:
            self._spoke = now
            self._console.print(self.line(now), highlight=False, soft_wrap=True)

    def line(self, now: float) -> str:
        """The current state in one line."""
        spent = max(now - self._began, 1e-9)
        parts = [self._label, self._line]
        done = len(self._rewards) + self._failed
        if self._step is None and done:
            mean = sum(self._rewards) / max(1, len(self._rewards))
            parts.append(f"{of(done, self._rollouts)} rollouts  reward {mean:.3f}")
        if self._failed:
            parts.append(f"{self._failed} failed")
        parts.append(f"{self._tokens / spent:.0f} tokens/s")
        left = [time for time in (self._left_by_clock(spent), self._left_by_count(spent, done)) if time is not None]
        if left:
            parts.append(f"{min(left):.0f} s left")
        return "  ".join(part for part in parts if part)

    def _left_by_clock(self, spent: float) -> float | None:
        return None if self._seconds is None else max(0.0, self._seconds - spent)

    def _left_by_count(self, spent: float, done: int) -> float | None:
        """At the pace so far; None before the first step, or rollout, is over."""
        if self._steps is not None:
            done, total = (self._step or self._first) - self._first, self._steps - self._first
        else:
            total = self._rollouts or 0
        return spent / done * max(0, total - done) if done and total else None


def of(done: int, total: int | None) -> str:
    return str(done) if total is None else f"{done}/{total}"
