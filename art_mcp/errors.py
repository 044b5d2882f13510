"""Every failure, named by the boundary where it happens. A model's mistake is not here: it is an observation (`Malformed`)."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import cast


class ArtMcpError(Exception):
    """The root: one clear line that says what to do. The command line prints it and exits with 2."""


class ConfigError(ArtMcpError):
    """config.json, a flag or a `TrainConfig` value is wrong."""


class ModelError(ArtMcpError):
    """A model, its tokenizer or its checkpoint cannot be loaded or is not what was asked for."""


class TemplateError(ArtMcpError):
    """A chat template cannot render, or cannot be bridged exactly."""


class EnvironmentLoadError(ArtMcpError):
    """An environment cannot be found, or its module does not hold what it must."""


class TrainError(ArtMcpError):
    """The trainer was given what it cannot learn from, or its process failed."""


class RunError(ArtMcpError):
    """A run folder is missing, incomplete or cannot be written."""


class RolloutError(ArtMcpError):
    """The world failed during a rollout: caught once per rollout, recorded, never turned into reward 0."""


class ToolServerError(RolloutError):
    """A tool server did not start, died, or did not answer in time."""


class EngineError(RolloutError):
    """The sampling engine failed, or was asked for more than it can hold."""


class NoRoomError(EngineError):
    """A remote model's context is full."""


class AgentError(RolloutError):
    """An agent of somebody else's raised, gave up, did not end in time, or never asked the policy."""


class RewardError(RolloutError):
    """A reward function raised, or did not end in time."""


class ResetError(RolloutError):
    """An environment's `reset` did not bring a rollout's servers to where its scenario begins."""


def sole_cause(error: BaseException) -> BaseException:
    """The one exception inside nested groups of one, or the first where all members are the world's failures (several
    calls lost the same server); the error itself where it is not such a group."""
    members = members_of(error)
    if len(members) == 1 or (members and all(isinstance(sole_cause(member), RolloutError) for member in members)):
        return sole_cause(members[0])
    return error


def members_of(error: BaseException) -> tuple[BaseException, ...]:
    if isinstance(error, BaseExceptionGroup):
        return cast("BaseExceptionGroup[BaseException]", error).exceptions
    return ()


@contextmanager
def boundary(failure: type[ArtMcpError], what: str, *expected: type[BaseException]) -> Generator[None]:
    """Names what fails inside the block by this boundary: `failure("<what>: <reason>")`.

    Only the `expected` kinds (default: OSError) are renamed, alone or as the sole member of an exception group. An
    `ArtMcpError` has its name already and passes, freed of groups of one; anything else is a bug and passes unchanged.
    """
    kinds = expected or (OSError,)
    try:
        yield
    except BaseException as error:  # every path below re-raises; groups of one hide their cause from `except` clauses
        cause = sole_cause(error)
        if isinstance(cause, ArtMcpError):
            if cause is error:
                raise
            raise cause from error
        if isinstance(cause, kinds):
            raise failure(f"{what}: {describe(cause)}") from error
        raise


def rebuilt(kind: str, message: str, *, trace: str) -> Exception:
    """An error of another process: one of these by its name; anything else is a bug there, of which `trace` says where."""
    known = globals().get(kind)
    if isinstance(known, type) and issubclass(known, ArtMcpError):
        return known(message)
    bug = RuntimeError(f"{kind}: {message}")
    bug.add_note(f"in the other process:\n{trace}")
    return bug


def explained(text: str, wrote: str) -> str:
    """An error as a server answered with it, and what it `wrote` of it elsewhere, where that says more."""
    return f"{text} (its server wrote: {wrote})" if wrote and wrote not in text else text


def describe(error: BaseException) -> str:
    """One line: the message, or the kind of error where it carries no message."""
    text = " ".join(str(error).split())
    return text or type(error).__name__
