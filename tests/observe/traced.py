"""Traces one group and one training step into weave, in a process of its own, since weave.init changes all of it; prints what
the tree of calls must be by what was played. Then does the command of art-mcp that follows."""

import json
import sys

import anyio

from art_mcp import LocalBackend, TrainableModel, gather_trajectory_groups, load_environment, open_tools
from art_mcp.cli.main import main as art


def kinds(trajectory):
    """Every turn, and after it the tools that it called; then the reward."""
    found = []
    for turn in range(trajectory.turns):
        found += ["art_mcp.turn", *("art_mcp.tool" for use in trajectory.uses if use.turn == turn)]
    return [*found, "art_mcp.reward"]


async def main():
    environment = load_environment(sys.argv[1])
    async with (
        LocalBackend(in_process=True, threads=1, weave="team/project") as backend,
        open_tools(environment.servers, only=environment.tools) as toolbox,
    ):
        model = TrainableModel(name="traced")
        await model.register(backend)
        (group,) = await gather_trajectory_groups(
            environment.split("train")[:1], model=model, environment=environment, toolbox=toolbox, rollouts=3
        )
        metrics = await model.train([group])
    told = {
        "prompt": group.scenario.prompt,
        "kinds": [kinds(one.trajectory) for one in group.trajectories],
        "rewards": [one.reward for one in group.trajectories],
        "results": [use.result.text for one in group.trajectories for use in one.trajectory.uses],
        "loss": metrics["loss"],
    }
    sys.stdout.write(json.dumps(told) + "\n")


anyio.run(main)
sys.argv[1:] = sys.argv[2:]
art()
