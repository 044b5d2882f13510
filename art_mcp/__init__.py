"""art_mcp: MCP tool-use environments and the local training of models that use them.

What a training script needs is exported here; `LocalBackend`, `open_servers` and `open_tools` load torch and mcp only when they
are named.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from art_mcp.agent.evaluate import Evaluation, evaluate
from art_mcp.agent.group import gather_trajectory_groups
from art_mcp.agent.rollout import rollout
from art_mcp.environment import Environment, load_environment
from art_mcp.model import Model, ModelConfig, TrainableModel
from art_mcp.ports import Toolbox
from art_mcp.types import (
    Limits,
    LoraSpec,
    Patience,
    Scenario,
    ScoredTrajectory,
    ToolCall,
    TrainConfig,
    Trajectory,
    TrajectoryGroup,
)

if TYPE_CHECKING:
    from art_mcp.local.backend import LocalBackend
    from art_mcp.tools import open_servers, open_tools

__all__ = [
    "Environment",
    "Evaluation",
    "Limits",
    "LocalBackend",
    "LoraSpec",
    "Model",
    "ModelConfig",
    "Patience",
    "Scenario",
    "ScoredTrajectory",
    "ToolCall",
    "Toolbox",
    "TrainConfig",
    "TrainableModel",
    "Trajectory",
    "TrajectoryGroup",
    "evaluate",
    "gather_trajectory_groups",
    "load_environment",
    "open_servers",
    "open_tools",
    "rollout",
]

LAZY = {"LocalBackend": "art_mcp.local.backend", "open_servers": "art_mcp.tools", "open_tools": "art_mcp.tools"}


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(import_module(LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
