"""reward.png of a run. Needs matplotlib, which is imported here and only when a plot is drawn."""

# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false, reportUnknownVariableType=false
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WINDOW = 10
"""Steps over which the smooth line averages."""


def plot_reward(path: Path, metrics: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Reward by step, each step and a running mean; nothing is drawn of a run without steps."""
    if not metrics:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [int(line["step"]) + 1 for line in metrics]
    rewards = [float(line["reward"]) for line in metrics]
    smooth = [sum(rewards[max(0, i + 1 - WINDOW) : i + 1]) / min(WINDOW, i + 1) for i in range(len(rewards))]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, rewards, color="#b9c4d6", linewidth=1, label="each step")
    axes.plot(steps, smooth, color="#1f4e9c", linewidth=2, label=f"mean of {WINDOW} steps")
    axes.set_xlabel("training step")
    axes.set_ylabel("mean reward")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130, format="png")
