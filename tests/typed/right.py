"""What type checkers must know of a model's config, written as a user would write it."""

from typing import assert_type

from openai import AsyncOpenAI
from pydantic import BaseModel

from art_mcp import (
    Environment,
    Evaluation,
    Model,
    TrainableModel,
    TrajectoryGroup,
    evaluate,
    gather_trajectory_groups,
    load_environment,
    open_tools,
)


class MyConfig(BaseModel):
    turns: int = 3


model = TrainableModel(name="x", config=MyConfig())
assert_type(model, TrainableModel[MyConfig])
assert_type(model.config, MyConfig)
assert_type(model.config.turns, int)
assert_type(Model(name="x", config=MyConfig()).config, MyConfig)

assert_type(TrainableModel(name="x").config, None)
assert_type(TrainableModel(name="x", base_model="tiny", config=None).config, None)
assert_type(Model(name="x").config, None)

remote = Model(name="x", base_url="http://127.0.0.1:8000/v1", api_key="key", model="gpt", config=MyConfig())
assert_type(remote, Model[MyConfig])
assert_type(Model(name="x", base_url="http://127.0.0.1:8000/v1").config, None)
assert_type(remote.openai_client(), AsyncOpenAI)
assert_type(model.openai_client(), AsyncOpenAI)


async def play(played: Model[MyConfig] | TrainableModel[MyConfig] | TrainableModel[None], place: Environment) -> None:
    async with open_tools(place.servers) as toolbox:
        groups = await gather_trajectory_groups(place.split("train"), model=played, environment=place, toolbox=toolbox)
        assert_type(groups, list[TrajectoryGroup])
        assert_type(await evaluate(remote, place, toolbox=toolbox), Evaluation)


assert_type(load_environment("calculator"), Environment)


def turns_of(given: TrainableModel[MyConfig]) -> int:
    return given.config.turns


assert_type(turns_of(model), int)
