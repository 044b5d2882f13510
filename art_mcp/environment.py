"""What an environment is: servers, scenarios, rewards; and how one is found by name, path or `module:attribute`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from art_mcp.errors import EnvironmentLoadError, RewardError, boundary
from art_mcp.ports import Toolbox
from art_mcp.types import Limits, Scenario, ScoredTrajectory, ToolCall, Trajectory

Reward: TypeAlias = Callable[..., float | Awaitable[float]]
"""`reward(trajectory)` or `reward(trajectory, toolbox)`, plain or async; the toolbox is still open."""

Solution: TypeAlias = Callable[[Scenario], "tuple[Sequence[ToolCall], str]"]
"""The reference solution of a scenario: calls in order, one a turn, and the final answer. Checks and warm starts use it."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What to attempt and what counts as good.

    `servers`: names from config.json, a `mcpServers` entry (a mapping), or "file.py:server" for an in-process one.
    `scenarios(split)`: the scenarios of "train", "test", … in a fixed order. `tools`: the names to offer (None: all).
    The reward of a trajectory is the sum of all `rewards`; it counts as solved when the one named `solved_by` (default:
    the first) gives 1.
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
    name: str = ""
    folder: Path = field(default_factory=Path)

    async def score(self, trajectory: Trajectory, toolbox: Toolbox) -> ScoredTrajectory:
        """The trajectory with the sum of all rewards and each part by name. Raises RewardError when one of them raises."""
        parts: dict[str, float] = {}
        for name, reward in self.rewards.items():
            with boundary(RewardError, f"reward {name!r}", Exception):
                value = reward(trajectory, toolbox) if takes_toolbox(reward) else reward(trajectory)
                parts[name] = float(await value if inspect.isawaitable(value) else value)
        return trajectory.scored(sum(parts.values()), parts)

    def solved(self, scored: ScoredTrajectory) -> bool:
        """Whether the reward that tells success gave 1 (or more)."""
        return scored.parts.get(self.solved_by or next(iter(self.rewards)), 0.0) >= 1 - 1e-9


def takes_toolbox(reward: Reward) -> bool:
    """Whether a reward asks for the toolbox, as a second positional parameter."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds for p in inspect.signature(reward).parameters.values()) > 1


def load_environment(name: str, **options: Any) -> Environment:
    """The environment `name`: "calculator" (environments/calculator.py here), a path to a .py file, or "module:attribute".

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
            f"{module.__file__} needs a value `{attribute}`: an Environment, or a function that makes one"
        )
    folder = Path(module.__file__ or ".").resolve().parent
    return replace(found, name=found.name or name.rpartition("/")[2].removesuffix(".py"), folder=folder)


def with_options(make: Callable[..., object], options: Mapping[str, Any], name: str) -> object:
    known = list(inspect.signature(make).parameters)
    unknown = sorted(set(options) - set(known))
    if unknown:
        names = ", ".join(known) or "none"
        raise EnvironmentLoadError(f"environment {name!r} has no option {', '.join(unknown)}; it has {names}")
    with boundary(EnvironmentLoadError, f"environment {name!r}", ValueError, TypeError):
        return make(**options)


def find_module(name: str) -> tuple[ModuleType, str]:
    if ":" in name:
        module, _, attribute = name.partition(":")
        if not module.endswith(".py"):
            with boundary(EnvironmentLoadError, f"environment {name!r}", ImportError):
                return importlib.import_module(module), attribute
        return module_of(Path(module)), attribute
    path = Path(name) if name.endswith(".py") else Path("environments") / f"{name}.py"
    return module_of(path), "environment"


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
    with boundary(EnvironmentLoadError, f"loading {path}", Exception):
        spec.loader.exec_module(module)
    return module
