"""Traces one group and one training step into weave, in a process of its own: weave.init changes the whole process."""

import sys

import anyio

from art_mcp import Environment, LocalBackend, Scenario, TrainableModel, gather_trajectory_groups, open_tools

CALCULATOR = f"{sys.argv[1]}/servers/calculator/server.py:server"


def correct(trajectory):
    return float("5" in trajectory.answer)


async def main():
    environment = Environment(
        servers=[CALCULATOR],
        tools=["add"],
        scenarios=lambda split: [Scenario("one", "What is 2 + 3?")],
        rewards={"correct": correct},
    )
    async with (
        LocalBackend(in_process=True, threads=1, weave="team/project") as backend,
        open_tools(environment.servers, only=environment.tools) as toolbox,
    ):
        model = TrainableModel(name="traced")
        await model.register(backend)
        groups = await gather_trajectory_groups(
            environment.split("train"), model=model, environment=environment, toolbox=toolbox, rollouts=2, temperature=0.0
        )
        await model.train(groups)
    trajectories = [scored.trajectory for scored in groups[0].trajectories]
    sys.stdout.write(" ".join(str(1 + one.turns + len(one.uses)) for one in trajectories))


anyio.run(main)
