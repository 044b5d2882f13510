"""What one rollout of another's agent sampled, as trajectories: a branch wherever a prompt does not extend what is there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from time import monotonic
from typing import Any

from art_mcp.errors import EngineError
from art_mcp.openai_patch.wire import Choice, Terms, Unmade, as_read, uses_of
from art_mcp.types import Message, Scenario, ScoredTrajectory, Span, StopReason, Trajectory

REASONS = {"stop": StopReason.ANSWERED, "length": StopReason.TRUNCATED}
"""Why a rollout ended, by how its last answer did; one that ended with a call was not gone on with."""


@dataclass(frozen=True, slots=True)
class Branch:
    """A conversation as far as it came: the tokens of its `spans`, and the messages that they stand for. `malformed`: the calls
    that could not be made, by the turn."""

    tokens: tuple[int, ...] = ()
    spans: tuple[Span, ...] = ()
    messages: tuple[Message, ...] = ()
    finish_reason: str = ""
    malformed: Mapping[int, Sequence[Unmade]] = field(default_factory=dict[int, Sequence[Unmade]])

    def grown(self, prompt: tuple[int, ...], choice: Choice, *, messages: Sequence[Message], version: int | None) -> Branch:
        """This conversation with what the world said since, and what the policy answered."""
        world = Span(prompt[len(self.tokens) :])
        policy = Span(choice.token_ids, choice.logprobs, version)
        turn = sum(message["role"] == "assistant" for message in messages)
        return Branch(
            tokens=(*prompt, *choice.token_ids),
            spans=(*self.spans, *(span for span in (world, policy) if span.token_ids)),
            messages=(*messages, *as_read([choice.message])),
            finish_reason=choice.finish_reason,
            malformed={**self.malformed, turn: choice.malformed} if choice.malformed else self.malformed,
        )


class Recording:
    """One rollout while it is played, and afterwards. `record` makes one; nothing is recorded any more when that ends.

    `policy` is the exact name (`name@step`) that answered first and that every later call is sent to. `dropped` says of each
    answer that is in no trajectory why that is.
    """

    def __init__(
        self,
        scenario: Scenario | None,
        rollout_id: str,
        terms: Terms,
        ready: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.scenario, self.rollout_id, self.ready = scenario, rollout_id, ready
        self.policy, self.closed = "", False
        self.calls = self.unread = 0
        self._terms, self._lock = terms, Lock()
        self._asked_for = ""
        self._branches: list[Branch] = []
        self._dropped: list[str] = []
        self._temperatures: set[float] = set()
        self._broken = ""
        self._began = monotonic()
        self._seconds: float | None = None

    @property
    def dropped(self) -> tuple[str, ...]:
        """Why each answer that is not recorded is not."""
        return tuple(self._dropped)

    @property
    def trajectories(self) -> tuple[Trajectory, ...]:
        """The branches of this rollout in the order in which they were last added to: all with its id, so that one reward
        counts for all of them. Every sampled token is the policy's own in one branch, and a part of the prompt in others.

        Raises EngineError where two versions of the policy answered in it.
        """
        if self._broken:
            raise EngineError(self._broken)
        return tuple(self._trajectory(branch) for branch in self._branches)

    @property
    def trajectory(self) -> Trajectory:
        """The branch that was added to last: all of the rollout, where nothing branched. Raises EngineError where nothing was
        recorded."""
        trajectories = self.trajectories
        if not trajectories:
            raise EngineError("; ".join(["nothing that the policy said was recorded", *dict.fromkeys(self._dropped)]))
        return trajectories[-1]

    def scored(self, reward: float, parts: Mapping[str, float] | None = None) -> tuple[ScoredTrajectory, ...]:
        """All branches with the rollout's one reward, as a group takes them. Raises EngineError where nothing was recorded."""
        *others, last = *self.trajectories[:-1], self.trajectory
        return tuple(trajectory.scored(reward, parts) for trajectory in (*others, last))

    def asked(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The body of the agent's next call as it is to be sent: to the policy's version that answered before.

        Raises EngineError where two versions have answered already.
        """
        with self._lock:
            if self._broken:
                raise EngineError(self._broken)
            sent = self._terms.apply(body, self.calls)
            self.calls += 1
            name = str(sent.get("model"))
            self._asked_for = self._asked_for or name
            told = sent.get("temperature")
            self._temperatures.add(told if isinstance(told, int | float) else 1.0)  # what an endpoint takes where none is told
            if self.policy and name in (self._asked_for, self.policy, self.policy.partition("@")[0]):
                sent["model"] = self.policy
            return sent

    def take(self, model: str, prompt: tuple[int, ...], choices: Sequence[Choice], messages: Sequence[Message]) -> None:
        """Takes in whole choices of one answer. The first of them goes on with the conversation that the prompt extends; the
        others, and the answers to what extends nothing, are conversations of their own."""
        with self._lock:
            if self.closed or not self._is_of(model):
                return
            before = as_read(messages)
            _, at, tail = model.rpartition("@")
            version = int(tail) if at and tail.isdigit() else None
            for choice in choices:
                known = [branch for branch in self._branches if prompt[: len(branch.tokens)] == branch.tokens]
                longest = max(known, key=lambda branch: len(branch.tokens), default=Branch())
                if longest in self._branches:
                    self._branches.remove(longest)
                self._branches.append(longest.grown(prompt, choice, messages=before, version=version))

    def drop(self, reason: str) -> None:
        """Notes that an answer, or a part of one, is not recorded."""
        with self._lock:
            if not self.closed:
                self._dropped.append(reason)

    def close(self) -> None:
        """Ends the recording: what comes later is not in it."""
        with self._lock:
            self._dropped.extend(["a stream was not read to its end"] * self.unread)
            self.closed, self._seconds = True, monotonic() - self._began

    def _is_of(self, model: str) -> bool:
        self.policy = self.policy or model
        if model == self.policy:
            return True
        if model.partition("@")[0] == self.policy.partition("@")[0]:
            self._broken = f"{self.policy} answered, and then {model}: one rollout is of one version of the policy"
        else:
            self._dropped.append(f"{model!r} answered, and the recording is of {self.policy!r}")
        return False

    def _trajectory(self, branch: Branch) -> Trajectory:
        return Trajectory(
            scenario=self.scenario,
            rollout_id=self.rollout_id,
            messages=branch.messages,
            spans=branch.spans,
            stop_reason=REASONS.get(branch.finish_reason, StopReason.TURN_LIMIT),
            uses=uses_of(branch.messages, branch.malformed),
            seconds=monotonic() - self._began if self._seconds is None else self._seconds,
            temperature=min(self._temperatures) if len(self._temperatures) == 1 else None,
        )
