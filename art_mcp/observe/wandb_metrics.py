"""A Recorder that sends a run's metrics to Weights & Biases. wandb is imported here and only when it is switched on."""

# pyright: reportMissingImports=false, reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import importlib.util
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from art_mcp.agent.imitation import WARM_START
from art_mcp.errors import ConfigError, RunError, boundary
from art_mcp.types import TrajectoryGroup


class WandbMetrics:
    """A Recorder of numbers by step; trajectories stay in the run's folder. Supervised steps are `sft/…` by `sft/step`. Raises
    RunError for a step that wandb does not take.

    The step is a value among others, and the axis: wandb's own only counts up, and drops what a resumed run does again.
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        self._placed: set[str] = set()
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

    def groups(self, step: int, groups: Sequence[TrajectoryGroup]) -> None:
        pass

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        part = "sft/" if values.get("phase") == WARM_START else ""
        numbers = {part + name: value for name, value in values.items() if isinstance(value, int | float)}
        with boundary(RunError, f"Weights & Biases did not take step {step}", Exception):  # it names no kinds of its own
            if part:
                self._place(numbers, axis=f"{part}step")
            self._run.log({f"{part}step": step, **numbers})

    def _place(self, names: Iterable[str], *, axis: str) -> None:
        """Gives each of `names` its `axis`. By its whole name: of two patterns that fit, wandb takes either."""
        for name in (axis, *names):
            if name not in self._placed:
                self._run.define_metric(name, step_metric=None if name == axis else axis)
                self._placed.add(name)


def refuse_missing() -> None:
    """Raises ConfigError where wandb is not installed; it is not imported."""
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("wandb is not installed: pip install 'art-mcp[wandb]'")


@contextmanager
def open_wandb(project: str, *, id: str, name: str, folder: Path, settings: Mapping[str, Any]) -> Generator[WandbMetrics]:
    """A wandb run within the block, called `name`, its files under `folder`; one of this `id` in the project goes on.
    WANDB_MODE=offline needs neither network nor login. Raises ConfigError where wandb is not installed or does not start."""
    refuse_missing()
    import wandb

    entity, _, project = project.rpartition("/")
    with boundary(ConfigError, f"wandb does not start for project {project!r}", Exception):
        run = wandb.init(
            project=project,
            entity=entity or None,
            id=id,
            name=name,
            resume="allow",
            dir=folder,
            config=dict(settings),
            settings=wandb.Settings(silent=True, console="off"),
        )
    with run:
        yield WandbMetrics(run)
