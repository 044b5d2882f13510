"""What an environment is: servers, scenarios, rewards; and how one is found by name, path or `module:attribute`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import os
import sys
import sysconfig
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias, TypeVar, cast

import anyio

from art_mcp.core.complaints import clip
from art_mcp.errors import ArtMcpError, EnvironmentLoadError, ResetError, RewardError, boundary, describe, explained
from art_mcp.ports import Toolbox
from art_mcp.types import Limits, Scenario, ScoredTrajectory, Tool, ToolCall, ToolResult, Trajectory

Given = TypeVar("Given")

Reward: TypeAlias = Callable[..., float | Awaitable[float]]
"""`reward(trajectory)` or `reward(trajectory, toolbox)`, plain or async; the toolbox is still open, and has every tool of the
servers, those that the policy is not offered too. An async one is ended after `Limits.code_seconds`; a plain
one cannot be interrupted, and all rollouts wait for it: what may take long belongs in an async one."""

Solution: TypeAlias = Callable[[Scenario], "tuple[Sequence[ToolCall | Sequence[ToolCall]], str]"]
"""The reference solution of a scenario: calls in order, one a turn (or a sequence of them, made together in one turn), and
the final answer. Checks and warm starts use it."""

Reset: TypeAlias = Callable[[Scenario, Toolbox], "Awaitable[None] | None"]
"""`reset(scenario, toolbox)`, plain or async, brings servers that another rollout had before to where this one begins. The
toolbox has every tool of the servers, and what a tool answers with an error is an error here."""

NOT_THEIRS = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), os.path.dirname(__file__), "<frozen")
"""Where a failure of an environment's own code is not to be looked for."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What to attempt and what counts as good.

    `servers`: names from config.json, a `mcpServers` entry (a mapping), or "file.py:server" for an in-process one.
    `scenarios(split)`: the scenarios of each of `splits`, in a fixed order. `tools`: the names to offer to the policy (None:
    all); rewards may call the others too. `copies`: 0, and all rollouts share one set of servers; or how many sets there are
    at most, of which each rollout in flight has one for itself, in processes of its own, started anew for it unless there is
    a `reset`, which brings back one that another rollout had.
    The reward of a trajectory is the sum of all `rewards`; it counts as solved when the one named `solved_by` (default:
    the first) gives 1. Raises EnvironmentLoadError without rewards, where `solved_by` is none of them, for a `reset` without
    `copies`, and for a name where a list of names belongs.
    """

    servers: Sequence[str | Mapping[str, Any]]
    scenarios: Callable[[str], Sequence[Scenario]]
    rewards: Mapping[str, Reward]
    system: str = ""
    tools: Sequence[str] | None = None
    limits: Limits = field(default_factory=Limits)
    splits: Sequence[str] = ("train", "test")
    solution: Solution | None = None
    solved_by: str = ""
    copies: int = 0
    reset: Reset | None = None
    name: str = ""
    _takes_toolbox: dict[str, bool] = field(default_factory=dict[str, bool], init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("servers", "tools", "splits"):
            if isinstance(value := getattr(self, name), str):
                raise EnvironmentLoadError(f"{name} is a list: write {name}=[{value!r}] in place of {name}={value!r}")
        if not self.rewards:
            raise EnvironmentLoadError('an environment needs a reward, such as rewards={"correct": correct}')
        if self.solved_by and self.solved_by not in self.rewards:
            raise EnvironmentLoadError(f"solved_by is {self.solved_by!r}, but the rewards are {', '.join(self.rewards)}")
        if type(self.copies) is not int or self.copies < 0:
            raise EnvironmentLoadError(f"copies is how many sets of servers there are at most, such as 8, not {self.copies!r}")
        if self.reset is not None and not self.copies:
            raise EnvironmentLoadError("reset is for servers that one rollout has for itself: say how many, such as copies=8")

    def split(self, name: str) -> Sequence[Scenario]:
        """The scenarios of one split. Raises EnvironmentLoadError where there is none of this name, or nothing in it, or two
        scenarios have the same id (which would make them draw the same random numbers)."""
        if name not in self.splits:
            known = ", ".join(self.splits)
            raise EnvironmentLoadError(f"environment {self.name!r} has no split {name!r}; it has {known}")
        what = f"the scenarios of {self.name!r}, split {name!r}"
        with own_code(EnvironmentLoadError, what):
            found = plainly(self.scenarios(name))
            if not isinstance(cast("object", found), Sequence):  # a generator's can be drawn but once
                found = tuple(found)
        for member in cast("Sequence[object]", found):
            if not isinstance(member, Scenario):
                raise EnvironmentLoadError(f"{what}: each is a Scenario(id, prompt), not {clip(repr(member))}")
        if not found:
            raise EnvironmentLoadError(f"environment {self.name!r} has no scenarios in its split {name!r}")
        twice, count = Counter(scenario.id for scenario in found).most_common(1)[0]
        if count > 1:
            raise EnvironmentLoadError(f"{count} scenarios of {self.name!r} have the id {twice!r}: give each its own")
        return found

    def solve(self, scenario: Scenario) -> tuple[list[tuple[ToolCall, ...]], str]:
        """What the reference solution, which there must be, does in a scenario: its calls, turn by turn, and the answer. Raises
        EnvironmentLoadError, with what to write, where it raises or gives something else."""
        assert self.solution is not None
        what = f"the solution of scenario {scenario.id!r}"
        with own_code(EnvironmentLoadError, what):
            given = plainly(self.solution(scenario))
        try:
            steps, answer = given
            turns = [(step,) if isinstance(step, ToolCall) else tuple(step) for step in steps]
        except (TypeError, ValueError):
            turns, answer = [], None
        calls: list[object] = [call for turn in turns for call in turn]
        if not isinstance(answer, str) or not all(isinstance(call, ToolCall) for call in calls):
            raise EnvironmentLoadError(
                f'{what}: it gives its calls and the answer, such as [ToolCall("add", {{"a": 1, "b": 2}})], "3", '
                f"not {clip(repr(given))}"
            )
        return turns, answer

    async def bring_back(self, scenario: Scenario, toolbox: Toolbox) -> None:
        """Resets the servers for a rollout of `scenario`, where they need it. Raises ResetError, with what to do, when the
        environment's `reset` raises or does not end, or a tool that it calls answers with an error."""
        if self.reset is None:
            return
        try:
            with own_code(ResetError, what := f"the reset before scenario {scenario.id!r}"):
                done = self.reset(scenario, Obeyed(toolbox.unrestricted))
                await ended(done, self.limits.code_seconds, failure=ResetError, what=what)
        except ResetError as error:
            remedy = "mend `reset`, or leave it out of the environment: then servers are started anew for each rollout"
            raise ResetError(f"{error}; {remedy}") from error.__cause__

    async def score(self, trajectory: Trajectory, toolbox: Toolbox) -> ScoredTrajectory:
        """The trajectory with the sum of all rewards and each part by name. Raises RewardError when one of them raises, does
        not end, or gives what is no finite number."""
        parts: dict[str, float] = {}
        for name, reward in self.rewards.items():
            with own_code(RewardError, what := f"reward {name!r}"):
                given = reward(trajectory, toolbox.unrestricted) if self._asks(name) else reward(trajectory)
                value = await ended(given, self.limits.code_seconds, failure=RewardError, what=what)
            parts[name] = number_of(value)
            if not math.isfinite(parts[name]):
                raise RewardError(f"reward {name!r} gave {clip(repr(value))}: it has to return a finite number")
        return trajectory.scored(sum(parts.values()), parts)

    def _asks(self, name: str) -> bool:
        """Whether this reward takes the toolbox: looked up once, for the looking takes longer than most rewards do."""
        if name not in self._takes_toolbox:
            self._takes_toolbox[name] = takes_toolbox(self.rewards[name])
        return self._takes_toolbox[name]

    def solved(self, scored: ScoredTrajectory) -> bool:
        """Whether the reward that tells success gave 1 (or more)."""
        return scored.parts.get(self.solved_by or next(iter(self.rewards)), 0.0) >= 1 - 1e-9


@dataclass(frozen=True, slots=True)
class Obeyed:
    """A toolbox for code that asks its tools for nothing they may refuse: what one answers with an error raises."""

    toolbox: Toolbox

    @property
    def tools(self) -> tuple[Tool, ...]:
        return self.toolbox.tools

    @property
    def unrestricted(self) -> Obeyed:
        return self

    async def call(self, call: ToolCall) -> ToolResult:
        result = await self.toolbox.call(call)
        if result.is_error:
            raise ValueError(explained(f"{call.name} answers with an error: {result.text}", self.last_error(call.name)))
        return result

    def last_error(self, name: str) -> str:
        return self.toolbox.last_error(name)


def plainly(given: Given) -> Given:
    """What a function gave. Raises TypeError where it is an async one, which is nothing to wait for here."""
    if inspect.iscoroutine(given):
        given.close()
        raise TypeError("it is asynchronous: write `def` in place of `async def`")
    return given


async def ended(given: Given | Awaitable[Given], within: float, *, failure: type[ArtMcpError], what: str) -> Given:
    """What an environment's own code gave, awaited where it is asynchronous: raises `failure` after so many seconds."""
    if not inspect.isawaitable(given):
        return given
    with anyio.move_on_after(within):
        return await given
    raise failure(f"{what} had not ended after {within:g} s, all that Limits(code_seconds=…) allows it")


def number_of(value: object) -> float:
    """A reward as a number; NaN where it is none."""
    try:
        return float(cast("float", value))
    except (TypeError, ValueError):
        return math.nan


def takes_toolbox(reward: Reward) -> bool:
    """Whether a reward asks for the toolbox: a second positional parameter without a default."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(reward).parameters.values()
    return sum(parameter.kind in kinds and parameter.default is parameter.empty for parameter in parameters) > 1


@contextmanager
def own_code(failure: type[ArtMcpError], what: str) -> Generator[None]:
    """Names whatever an environment's own code raises: `failure("<what>: <kind>: <reason> (<file>, line <n>)")`."""
    try:
        yield
    except ArtMcpError:
        raise
    except Exception as error:
        trace = traceback.extract_tb(error.__traceback__)
        places = [f" ({step.filename}, line {step.lineno})" for step in trace if not step.filename.startswith(NOT_THEIRS)]
        raise failure(f"{what}: {type(error).__name__}: {describe(error)}{places[-1] if places else ''}") from error


def load_environment(name: str, **options: Any) -> Environment:
    """The environment `name`: "calculator" (environments/calculator.py here), a path to a .py file, or "module:attribute",
    a module that is looked for in the current folder first.

    A module's `environment` is an Environment, or a function that makes one from keyword `options`.
    Raises EnvironmentLoadError with what was looked for, and with the names there are.
    """
    module, attribute = find_module(name)
    found: object = getattr(module, attribute, None)
    if callable(found) and not isinstance(found, Environment):
        found = with_options(found, options, name)
    elif options:
        raise EnvironmentLoadError(f"environment {name!r} takes no options, got {', '.join(sorted(options))}")
    if not isinstance(found, Environment):
        raise EnvironmentLoadError(
            f"{module.__file__ or module.__name__} needs a value `{attribute}`: an Environment, or a function that makes one"
        )
    return replace(found, name=found.name or name.partition(":")[0].rpartition("/")[2].removesuffix(".py"))


def with_options(make: Callable[..., object], options: Mapping[str, Any], name: str) -> object:
    known = list(inspect.signature(make).parameters)
    unknown = sorted(set(options) - set(known))
    if unknown:
        names = ", ".join(known) or "none"
        raise EnvironmentLoadError(f"environment {name!r} has no option {', '.join(unknown)}; it has {names}")
    with (
        own_code(EnvironmentLoadError, f"environment {name!r}"),
        boundary(EnvironmentLoadError, f"environment {name!r}", ValueError, TypeError),
    ):
        return make(**options)


def find_module(name: str) -> tuple[ModuleType, str]:
    if ":" in name:
        module, _, attribute = name.partition(":")
        if not module.endswith(".py"):
            return import_here(module), attribute
        return module_of(Path(module)), attribute
    path = Path(name) if name.endswith(".py") else Path("environments") / f"{name}.py"
    return module_of(path), "environment"


def import_here(name: str) -> ModuleType:
    """The module of this name, found as by `python -m`: the script art-mcp has its own folder on the path, not this one."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    with own_code(EnvironmentLoadError, f"loading the environment module {name!r}"):
        return importlib.import_module(name)


def module_of(path: Path) -> ModuleType:
    if not path.is_file():
        here = sorted(file.stem for file in path.parent.glob("*.py")) if path.parent.is_dir() else []
        hint = "run from the folder that holds environments/, or give a path to a .py file"
        if here:
            hint = f"there are: {', '.join(here)}"
        raise EnvironmentLoadError(f"no environment at {path}; {hint}")
    spec = importlib.util.spec_from_file_location(f"art_mcp_environment_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise EnvironmentLoadError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with own_code(EnvironmentLoadError, f"loading {path}"):
        spec.loader.exec_module(module)
    return module
