"""What the plays of a check say of an environment, in words: what is wrong with it. Nothing is played here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from art_mcp.core.advantage import TIE
from art_mcp.core.complaints import clip
from art_mcp.environment import Environment
from art_mcp.errors import explained
from art_mcp.types import Malformed, ScoredTrajectory, ToolCall, ToolUse

Why = Callable[[str], str]
"""What the server of the tool of this name wrote of its last error; "" if nothing."""

REFERENCE, EMPTY = "reference solution", "empty turn"
NOTHING_TO_COMPARE = "whether lazy policies score less than the reference solution, since it solves none of the scenarios"
NO_REFERENCE = (
    "whether lazy policies score less than a reference solution, since the environment has none: give it a `solution`, a "
    "function that returns the calls and the answer of a scenario"
)
OWN_CALLS = (
    "let the reward depend on this rollout's own calls (trajectory.uses), and give each scenario an id that its calls carry"
)
README = "the README has more under Servers with state"
NAMED, LENGTH = 3, 400
"""How many failed calls one line names, and how many characters of each error and its call are shown."""


@dataclass(frozen=True, slots=True)
class Example:
    """What was played in a scenario where something is wrong, and in `words` by whom and where."""

    words: str
    scored: ScoredTrajectory


@dataclass(frozen=True, slots=True)
class Verdict:
    """Mean reward and share solved of the reference solution and of each lazy policy compared with it, over the same scenarios.

    `failures` says what is wrong, causes first; `unchecked` what could not be found out for that; `warnings` what may be
    meant. `example`: of the first failure, where there is one."""

    rewards: dict[str, float]
    solved: dict[str, float]
    failures: tuple[str, ...]
    unchecked: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    example: Example | None = None


def judge(
    environment: Environment,
    played: Mapping[str, Sequence[ScoredTrajectory]],
    reasons: Sequence[str],
    *,
    before: Sequence[ScoredTrajectory],
    after: Sequence[ScoredTrajectory],
    together: Sequence[ScoredTrajectory] = (),
) -> Verdict:
    """The verdict on what each policy `played`, the reference solution among them. Where that solves nothing, there is nothing
    with which the lazy policies could be compared. `reasons`: of each of its plays, what `blame` said. `before`, `after`: empty
    turns before anything else, and right after the reference solution of the same scenario. `together`: that solution once
    more, with others under way."""
    rewards, solved = means(played, environment=environment)
    reference = played[REFERENCE]
    failures = [*refusals(reference, reasons, environment=environment), *unexplained(reference, environment=environment)]
    unchecked: tuple[str, ...] = ()
    winners = [name for name, reward in rewards.items() if name != REFERENCE and reward >= rewards[REFERENCE]]
    if not solved[REFERENCE]:
        unchecked, winners = (NOTHING_TO_COMPARE,), []
    example = None
    if failures:
        example = example_of(REFERENCE, worst(reference, environment=environment))
    elif winners:
        example = example_of(winners[0], farthest(played[winners[0]], reference))
    failures += [
        f"{name} scores {rewards[name]:.3f}, not below the reference solution's {rewards[REFERENCE]:.3f}" for name in winners
    ]
    failures += meetings(reference, together, environment=environment)
    warnings = (
        *gifts(before, environment=environment),
        *leaks(before, after, played.get(EMPTY, after), environment=environment),
        *tolerated(reference, reasons, environment=environment),
    )
    return Verdict(rewards, solved, tuple(failures), unchecked, warnings, example)


def judge_alone(
    environment: Environment,
    played: Mapping[str, Sequence[ScoredTrajectory]],
    *,
    before: Sequence[ScoredTrajectory],
    after: Sequence[ScoredTrajectory],
) -> Verdict:
    """The verdict where there is no reference solution: what each lazy policy scores, and those that solve everything.
    `before`, `after`: empty turns before anything else, and after all of it."""
    rewards, solved = means(played, environment=environment)
    winners = [name for name, share in solved.items() if share == 1]
    warnings = (*gifts(before, environment=environment), *leaks(before, before, after, environment=environment))
    example = example_of(winners[0], played[winners[0]][0]) if winners else None
    failures = tuple(f"{name} solves every scenario" for name in winners)
    return Verdict(rewards, solved, failures, (NO_REFERENCE,), warnings, example)


def means(
    played: Mapping[str, Sequence[ScoredTrajectory]], *, environment: Environment
) -> tuple[dict[str, float], dict[str, float]]:
    """The mean reward of each policy, and the share that it solved."""
    rewards = {name: fmean([one.reward for one in plays]) for name, plays in played.items()}
    return rewards, {name: fmean([environment.solved(one) for one in plays]) for name, plays in played.items()}


def gifts(before: Sequence[ScoredTrajectory], *, environment: Environment) -> list[str]:
    """Where an empty turn scores while nothing has been played."""
    given = [one for one in before if one.reward > TIE or environment.solved(one)]
    if not given:
        return []
    return [
        f"an empty turn, which calls no tool and answers nothing, already scores {given[0].reward:.3f}{place_of(given[0])} "
        f"({share(given, before)}): {OWN_CALLS}; {README}"
    ]


def leaks(
    before: Sequence[ScoredTrajectory],
    after: Sequence[ScoredTrajectory],
    at_last: Sequence[ScoredTrajectory],
    *,
    environment: Environment,
) -> list[str]:
    """Where what one rollout does is counted for another: an empty turn does not score what it did before."""
    for later, when in ((after, "after its reference solution was played"), (at_last, "after the other scenarios were played")):
        changed = [(old, new) for old, new in zip(before, later, strict=True) if abs(new.reward - old.reward) > TIE]
        if changed:
            old, new = changed[0]
            return [
                f"state leaks from one rollout into another: an empty turn{place_of(old)} scores {new.reward:.3f} {when}, "
                f"{old.reward:.3f} before ({share(changed, before)}): {remedy_for(environment)}; {README}"
            ]
    return []


def meetings(alone: Sequence[ScoredTrajectory], together: Sequence[ScoredTrajectory], *, environment: Environment) -> list[str]:
    """Where the reference solution fails once other rollouts are under way: what each should have alone is one server."""
    lost = [new for old, new in zip(alone, together, strict=False) if environment.solved(old) and not environment.solved(new)]
    if not lost:
        return []
    return [
        f"the reference solution{place_of(lost[0])} solves it alone and not while {environment.copies} rollouts play at the "
        f"same time ({share(lost, together)}): the copies share their state, as connections to one URL do: keep it by session "
        f"there, or name the server's command, which is started for each copy; {README}"
    ]


def remedy_for(environment: Environment) -> str:
    """How rollouts get to be alone with their servers, or stay so."""
    if not environment.copies:
        return f"give each rollout servers of its own, by Environment(copies=8), or {OWN_CALLS}"
    if environment.reset is not None:
        return "though each rollout has servers of its own, `reset` does not bring back all that the one before it left there"
    return "though each rollout has servers of its own, they keep something outside: in a file, a database or behind a url"


def share(some: Sequence[object], among: Sequence[object]) -> str:
    return f"so in {len(some)} of {len(among)} scenarios"


def example_of(policy: str, scored: ScoredTrajectory) -> Example:
    level = f" (level {scored.trajectory.scenario.level})" if scored.trajectory.scenario else ""
    return Example(f"{policy}{place_of(scored)}{level}", scored)


def place_of(scored: ScoredTrajectory) -> str:
    scenario = scored.trajectory.scenario
    return f" in scenario {scenario.id!r}" if scenario else ""


def worst(played: Sequence[ScoredTrajectory], *, environment: Environment) -> ScoredTrajectory:
    """The first that is not solved and has a call that failed; else that has the one or the other."""

    def badness(one: ScoredTrajectory) -> tuple[bool, bool]:
        return not environment.solved(one), any(use.result.is_error for use in one.trajectory.uses)

    return max(played, key=badness)


def farthest(played: Sequence[ScoredTrajectory], reference: Sequence[ScoredTrajectory]) -> ScoredTrajectory:
    """The one whose reward is the farthest above (or the least below) that of the reference solution in the same scenario."""
    pairs = zip(played, reference, strict=True)
    return max(pairs, key=lambda pair: pair[0].reward - pair[1].reward)[0]


def wrong_calls(scored: ScoredTrajectory) -> list[ToolUse]:
    """The calls that a tool answered with an error."""
    return [use for use in scored.trajectory.uses if use.result.is_error and isinstance(use.call, ToolCall)]


def blame(scored: ScoredTrajectory, why: Why) -> str:
    """The last call that a tool answered with an error, and what its server says of that; "" where there was none."""
    wrong = wrong_calls(scored)
    if not wrong or not isinstance(wrong[-1].call, ToolCall):
        return ""
    text, reason = wrong[-1].result.text, why(wrong[-1].call.name)
    told = explained(text, reason)
    return named(wrong[-1].call, told, where=scored)


def named(call: ToolCall | Malformed, error: str, *, where: ScoredTrajectory) -> str:
    """A call with its arguments (or what there is of one that cannot be made), its scenario and its error, on one line."""
    asked = (call.name, call.arguments) if isinstance(call, ToolCall) else call.asked
    text = call.text if isinstance(call, Malformed) else ""
    if asked:
        text = f"{asked[0]}({json.dumps(dict(asked[1]), ensure_ascii=False)})"
    return f"{clip(text, LENGTH)}{place_of(where)}: {clip(' '.join(error.split()), LENGTH)}"


def refusals(played: Sequence[ScoredTrajectory], reasons: Sequence[str], *, environment: Environment) -> list[str]:
    """What the tools say against the reference solution's calls, which a reward that reads only the answer does not see.
    Errors may be meant, as long as their scenarios are solved (`tolerated`), unless there is nothing else."""
    uses = [(one, use) for one in played for use in one.trajectory.uses]
    malformed = [named(use.call, use.result.text, where=one) for one, use in uses if isinstance(use.call, Malformed)]
    spoiled = [place for place, one in enumerate(played) if wrong_calls(one) and not environment.solved(one)]
    if all_wrong(played) and not malformed:
        return [f"each of the reference solution's {len(uses)} calls is answered with an error: {next(filter(None, reasons))}"]
    found: list[str] = []
    if malformed:
        found.append(f"{len(malformed)} of the reference solution's {len(uses)} calls cannot be made: {some(malformed)}")
    if spoiled:
        found.append(f"{count(played, spoiled)}, in scenarios that it does not solve: {some(reasons[at] for at in spoiled)}")
    return found


def tolerated(played: Sequence[ScoredTrajectory], reasons: Sequence[str], *, environment: Environment) -> list[str]:
    """The errors in scenarios that the reference solution solves all the same."""
    solved = [place for place, one in enumerate(played) if wrong_calls(one) and environment.solved(one)]
    if not solved or all_wrong(played):
        return []
    return [
        f"{count(played, solved)}, in scenarios that it solves all the same: {some(reasons[at] for at in solved)}; "
        "if that is not meant, mend the solution or the tool"
    ]


def all_wrong(played: Sequence[ScoredTrajectory]) -> bool:
    """Whether there are calls, and none of them did what it was to do."""
    uses = [use for one in played for use in one.trajectory.uses]
    return bool(uses) and all(use.result.is_error for use in uses)


def count(played: Sequence[ScoredTrajectory], places: Sequence[int]) -> str:
    wrong, all_uses = sum(len(wrong_calls(played[at])) for at in places), sum(len(one.trajectory.uses) for one in played)
    return f"{wrong} of the reference solution's {all_uses} calls are answered with an error"


def some(lines: Iterable[str]) -> str:
    """The first few of what is not empty, and how many more there are."""
    told = [line for line in lines if line]
    more = f"; and {len(told) - NAMED} more" if len(told) > NAMED else ""
    return "; ".join(told[:NAMED]) + more


def unexplained(played: Sequence[ScoredTrajectory], *, environment: Environment) -> list[str]:
    """How many scenarios are solved, unless each that is not has a call that went wrong, which is told as `refusals`."""
    unsolved = [one for one in played if not environment.solved(one)]
    if all(one.trajectory.malformed or wrong_calls(one) for one in unsolved):
        return []
    return [f"the reference solution solves only {1 - len(unsolved) / len(played):.0%} of the scenarios"]
