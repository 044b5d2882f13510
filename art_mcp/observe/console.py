"""What a person sees while a run goes on: a progress line, or plain lines now and then where there is no terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from art_mcp.types import FailedRollout, ScoredTrajectory, TrajectoryGroup

QUIET_SECONDS = 10.0
"""Between two lines where stderr is no terminal."""


class ConsoleProgress:
    """Progress and Recorder for people; a block, so that the terminal is left as it was."""

    def __init__(self, stream: TextIO, *, total: int | None = None, seconds: float | None = None, label: str = "") -> None:
        self._console = Console(file=stream)
        self._live = Live(console=self._console, refresh_per_second=4, transient=True) if self._console.is_terminal else None
        self._total, self._seconds, self._label = total, seconds, label
        self._began = self._spoke = monotonic()
        self._rewards: list[float] = []
        self._failed = self._tokens = 0
        self._line = ""
        self._step: int | None = None

    def __enter__(self) -> ConsoleProgress:
        if self._live:
            self._live.start()
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
        """A step is over: its reward stays in the line until the next one's."""
        parts = [f"step {step + 1}", f"reward {values['reward']:.3f}", f"entropy {values.get('entropy', 0.0):.3f}"]
        parts.append(f"rollout {values['seconds_rollout']:.2f} s, train {values['seconds_train']:.2f} s")
        self._line, self._step = "  ".join(parts), step + 1
        self._rewards.clear()
        self._show()

    def _show(self) -> None:
        now = monotonic()
        if self._live:
            self._live.update(Text(self.line(now)))
        elif now - self._spoke >= QUIET_SECONDS:
            self._spoke = now
            self._console.print(self.line(now), highlight=False, soft_wrap=True)

    def line(self, now: float) -> str:
        """The current state in one line."""
        spent = now - self._began
        parts = [self._label, self._line]
        done = len(self._rewards) + self._failed
        if self._step is None and done:
            mean = sum(self._rewards) / max(1, len(self._rewards))
            parts.append(f"{done}{f'/{self._total}' if self._total else ''} rollouts  reward {mean:.3f}")
        if self._failed:
            parts.append(f"{self._failed} failed")
        parts.append(f"{self._tokens / max(spent, 1e-9):.0f} tokens/s")
        left = self._left(spent, done)
        if left is not None:
            parts.append(f"{left:.0f} s left")
        return "  ".join(part for part in parts if part)

    def _left(self, spent: float, done: int) -> float | None:
        by_clock = None if self._seconds is None else max(0.0, self._seconds - spent)
        reached = self._step if self._step is not None else done
        if not self._total or not reached:
            return by_clock
        by_count = spent / reached * max(0, self._total - reached)
        return by_count if by_clock is None else min(by_clock, by_count)
