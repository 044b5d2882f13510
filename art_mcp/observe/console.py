"""What a person sees while a run goes on: a progress line, or plain lines now and then where there is no terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from art_mcp.observe.cuts import Cuts
from art_mcp.observe.ties import Ties
from art_mcp.types import FailedRollout, ScoredTrajectory, TrajectoryGroup

QUIET_SECONDS = 10.0
"""Between two lines where stderr is no terminal."""
DURATIONS, PACE, DETAIL, REASON, LEFT, FAILED, KEPT = range(7)
"""What a part of the line is worth: where there is no room for all, the least gives way first, and what is KEPT never."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the line, and what is `short` in it: all that stays of it where there is no room."""

    text: str
    worth: int = KEPT
    short: str = ""


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
        self._failed = self._failed_before = self._tokens = 0
        self._parts: Sequence[Part] = ()
        self._step: int | None = None
        self._told: int | None = None
        self._watched = (Ties(), Cuts())

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
        """A step is over: its reward stays in a terminal's line until the next one's, a note above it."""
        parts = [
            Part(f"reward {values['reward']:.3f}"),
            Part(f"entropy {values.get('entropy', 0.0):.3f}", DETAIL),
            Part(f"rollout {values['seconds_rollout']:.2f} s, train {values['seconds_train']:.2f} s", DURATIONS),
        ]
        if values.get("samples_with_signal") == 0:
            parts.append(Part("nothing to learn: equal rewards in each group", REASON, "nothing to learn"))
        self._over(step + 1, parts)
        for note in filter(None, [watched.note(values) for watched in self._watched]):
            self.say(note)

    def say(self, note: str) -> None:
        """A line of its own, which stays."""
        self._console.print(note, highlight=False, markup=False, soft_wrap=True)

    def _over(self, step: int, parts: Sequence[Part]) -> None:
        self._parts, self._step = parts, step
        self._rewards.clear()
        self._failed_before = self._failed
        self._show()

    def _show(self) -> None:
        now = monotonic()
        if self._live:
            self._live.update(Text(self.line(now), no_wrap=True, overflow="ellipsis"))
        elif now - self._spoke >= QUIET_SECONDS:
            self._spoke = now
            self._console.print(self.line(now), highlight=False, soft_wrap=True)
            self._told = self._step

    def line(self, now: float) -> str:
        """The current state in one line, a step that was told before by its number alone. It leaves the terminal's last column
        free, in which some terminals wrap."""
        spent = max(now - self._began, 1e-9)
        parts = [Part(self._label)]
        done = len(self._rewards) + self._failed - self._failed_before
        if self._step is not None:
            known = self._step == self._told
            parts.append(Part(f"{'after ' if known else ''}step {of(self._step, self._steps)}"))
            parts += () if known else self._parts
        if done and self._step == self._told:
            mean = sum(self._rewards) / max(1, len(self._rewards))
            parts += Part(f"{of(done, self._rollouts)} rollouts"), Part(f"reward {mean:.3f}")
        if self._failed:
            parts.append(Part(f"{self._failed} failed", FAILED))
        parts.append(Part(f"{self._tokens / spent:.0f} tokens/s", PACE))
        left = [time for time in (self._left_by_clock(spent), self._left_by_count(spent, done)) if time is not None]
        if left:
            parts.append(Part(f"{min(left):.0f} s left", LEFT))
        return fit(parts, self._console.width - 1)

    def _left_by_clock(self, spent: float) -> float | None:
        return None if self._seconds is None else max(0.0, self._seconds - spent)

    def _left_by_count(self, spent: float, done: int) -> float | None:
        """At the pace so far; None before the first step, or rollout, is over."""
        if self._steps is not None:
            done, total = (self._step or self._first) - self._first, self._steps - self._first
        else:
            total = self._rollouts or 0
        return spent / done * max(0, total - done) if done and total else None


def fit(parts: Sequence[Part], width: int) -> str:
    """The parts in their order, in at most `width` characters, unless what is KEPT takes more."""
    for least in range(KEPT):
        line = "  ".join(part.text for part in parts if part.text)
        if len(line) <= width:
            return line
        parts = [Part(part.short) if part.worth == least else part for part in parts]
    return "  ".join(part.text for part in parts if part.text)


def of(done: int, total: int | None) -> str:
    return str(done) if total is None else f"{done}/{total}"
