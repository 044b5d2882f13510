"""What type checkers must know of a model's config, written as a user would write it."""

from typing import assert_type

from pydantic import BaseModel

from art_mcp import Environment, Model, TrainableModel, load_environment


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

assert_type(load_environment("calculator"), Environment)


def turns_of(given: TrainableModel[MyConfig]) -> int:
    return given.config.turns


assert_type(turns_of(model), int)
