"""What the plays of a check say of an environment, in words: what is wrong with it. Nothing is played here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from art_mcp.environment import Environment
from art_mcp.types import Malformed, ScoredTrajectory, ToolCall, ToolUse

Why = Callable[[str], str]
"""What the server of the tool of this name wrote of its last error; "" if nothing."""

REFERENCE = "reference solution"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Mean reward and share solved of the reference solution and of each lazy policy that was played, over the same scenarios.
    `failures` says what is wrong, causes first; `unchecked` what could not be found out for that."""

    rewards: dict[str, float]
    solved: dict[str, float]
    failures: tuple[str, ...]
    unchecked: tuple[str, ...] = ()


def judge(environment: Environment, played: Mapping[str, Sequence[ScoredTrajectory]], reasons: Sequence[str]) -> Verdict:
    """The verdict on what each policy `played`, the reference solution among them. Where that solves nothing, there is nothing
    with which the lazy policies could be compared. `reasons`: of each of its plays, what `reason_of` said."""
    rewards = {name: fmean([one.reward for one in plays]) for name, plays in played.items()}
    solved = {name: fmean([environment.solved(one) for one in plays]) for name, plays in played.items()}
    failures = [
        *refusals(played[REFERENCE], reasons, environment=environment),
        *unexplained(played[REFERENCE], environment=environment),
    ]
    if not solved[REFERENCE]:
        unchecked = "whether lazy policies score less than the reference solution, since it solves none of the scenarios"
        return Verdict(rewards, solved, tuple(failures), (unchecked,))
    return Verdict(rewards, solved, (*failures, *complaints(rewards)))


def wrong_calls(scored: ScoredTrajectory) -> list[ToolUse]:
    """The calls that a tool answered with an error."""
    return [use for use in scored.trajectory.uses if use.result.is_error and isinstance(use.call, ToolCall)]


def reason_of(scored: ScoredTrajectory, why: Why) -> str:
    """The last error that a tool answered with, and what its server says beyond that; "" where there was none."""
    wrong = wrong_calls(scored)
    if not wrong or not isinstance(wrong[-1].call, ToolCall):
        return ""
    text, reason = wrong[-1].result.text, why(wrong[-1].call.name)
    return f"{text} (its server wrote: {reason})" if reason and reason not in text else text


def refusals(played: Sequence[ScoredTrajectory], reasons: Sequence[str], *, environment: Environment) -> list[str]:
    """What the tools say against the reference solution's calls, which a reward that reads only the answer does not see.
    That some calls are answered with an error may be meant, as long as their scenarios are solved."""
    uses = [use for one in played for use in one.trajectory.uses]
    malformed = [use for use in uses if isinstance(use.call, Malformed)]
    if malformed:
        return [f"{len(malformed)} of the reference solution's {len(uses)} calls cannot be made: {malformed[0].result.text}"]
    if uses and all(use.result.is_error for use in uses):
        return [f"each of the reference solution's {len(uses)} calls is answered with an error: {next(filter(None, reasons))}"]
    spoiled = [place for place, one in enumerate(played) if wrong_calls(one) and not environment.solved(one)]
    if not spoiled:
        return []
    wrong = sum(len(wrong_calls(played[place])) for place in spoiled)
    return [
        f"{wrong} of the reference solution's {len(uses)} calls are answered with an error, in scenarios that it does not "
        f"solve: {reasons[spoiled[0]]}"
    ]


def unexplained(played: Sequence[ScoredTrajectory], *, environment: Environment) -> list[str]:
    """How many scenarios are solved, unless each that is not has a call that went wrong, which is told as `refusals`."""
    unsolved = [one for one in played if not environment.solved(one)]
    if all(one.trajectory.malformed or wrong_calls(one) for one in unsolved):
        return []
    return [f"the reference solution solves only {1 - len(unsolved) / len(played):.0%} of the scenarios"]


def complaints(rewards: Mapping[str, float]) -> list[str]:
    """The policies that score as much as the reference solution."""
    best = rewards[REFERENCE]
    return [
        f"{name} scores {reward:.3f}, not below the reference solution's {best:.3f}"
        for name, reward in rewards.items()
        if name != REFERENCE and reward >= best
    ]
